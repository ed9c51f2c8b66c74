"""One parametrization's basins: the loss lines with their diverged runs, and the strip of optima below them."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from mutransfer.reports.style import GREY, INK, log_loss
from mutransfer.reports.words import across, counted, interval, long_label, plain

__all__ = ["basin_panel", "optimum_strip", "share_loss_scale"]


def basin_panel(
    axes: Axes, name: str, runs: pd.DataFrame, optima: pd.DataFrame, colours: dict[int, str], seeds: int
) -> None:
    """Draw one parametrization's ``runs`` (schema BASINS), a line per width, with its ``optima`` sorted by width.

    Points that are means over fewer than ``seeds`` losses are hollow.
    """
    axes.set_title(plain(long_label(name), 60), pad=21, parse_math=False)
    axes.annotate(_headline(optima, runs), (0, 1), (0, 6), "axes fraction", "offset points", va="bottom")
    axes.tick_params(labelbottom=False, length=0)
    if len(optima):
        axes.axvline(optima["log2_lr"].iloc[0], color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    for row, (width, hue) in enumerate(colours.items()):
        here = runs[runs["width"] == width]
        over_seeds = here.dropna(subset="loss").groupby("log2_lr")["loss"].agg(["mean", "min", "max", "count"])
        axes.fill_between(over_seeds.index, over_seeds["min"], over_seeds["max"], color=hue, alpha=0.18, linewidth=0)
        axes.plot(over_seeds.index, over_seeds["mean"], color=hue, marker="o", markersize=2.5, gid=f"width {width}")
        few = over_seeds[over_seeds["count"] < seeds]
        ring: dict[str, Any] = {"color": hue, "marker": "o", "markersize": 4.5, "mfc": "white", "linestyle": ""}
        axes.plot(few.index, few["mean"], zorder=4, gid="fewer seeds", **ring)
        _crosses(axes, here[here["diverged"].fillna(False) | here["loss"].isna()], 0.965 - 0.035 * row, hue)
    for best in optima.itertuples():
        hue = colours.get(best.width, INK)
        axes.plot([best.log2_lr] * 2, [axes.get_ylim()[0], best.best_loss], color=hue, linewidth=0.9, alpha=0.8)
        axes.plot(best.log2_lr, best.best_loss, "o", color=hue, markersize=8, markeredgecolor="white", zorder=5)


def share_loss_scale(axes: Axes, basins: pd.DataFrame, rows: int) -> None:
    """Set the y axis that all panels share: every loss inside, and room on top for a row of crosses per width."""
    finite = basins["loss"].dropna()
    if finite.empty:
        return
    logarithmic = log_loss(axes, finite)
    low, high = finite.min(), finite.max()
    top = 0.05 + 0.035 * rows if basins["loss"].isna().any() or basins["diverged"].any() else 0.05
    if logarithmic:
        span = high / low
        axes.set_ylim(low / span**0.08, high * span ** (1.08 * top / (1 - top)))
    else:
        span = high - low or abs(high) or 1.0
        axes.set_ylim(low - 0.08 * span, high + span * 1.08 * top / (1 - top))


def _crosses(axes: Axes, diverged: pd.DataFrame, height: float, hue: str) -> None:
    """Draw one cross per diverged run at ``height`` (a fraction of the panel), the seeds of one lr side by side."""
    if diverged.empty:
        return
    rank = diverged.groupby("log2_lr").cumcount()
    count = diverged.groupby("log2_lr")["seed"].transform("size")
    x = diverged["log2_lr"] + 0.13 * (rank - (count - 1) / 2)
    y = [height] * len(x)
    axes.plot(x, y, "x", color=hue, markersize=3.6, transform=axes.get_xaxis_transform(), gid="diverged", clip_on=False)


def optimum_strip(axes: Axes, optima: pd.DataFrame, colours: dict[int, str], limits: tuple[float, float]) -> None:
    """Draw one row per width: its optimum, the 95% interval, and the drift in words on the side with more room."""
    rows = {width: row for row, width in enumerate(colours)}
    axes.set_yticks(list(rows.values()), [str(width) for width in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    if optima.empty:
        return
    axes.axvline(optima["log2_lr"].iloc[0], color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    # What bounds no optimum goes on to the edge of the picture.
    optima = optima.assign(
        log2_lr_low=optima["log2_lr_low"].clip(lower=limits[0]),
        log2_lr_high=optima["log2_lr_high"].clip(upper=limits[1]),
    )
    for index, best in enumerate(optima.itertuples()):
        row, hue = rows.get(best.width, 0), colours.get(best.width, INK)
        axes.plot([best.log2_lr_low, best.log2_lr_high], [row, row], color=hue, linewidth=2.5, alpha=0.6)
        face = "white" if best.at_edge else hue
        axes.plot(best.log2_lr, row, "o", markersize=6, color=hue, markerfacecolor=face, markeredgewidth=1.2)
        words = "drift in octaves:" if index == 0 else interval(best.drift, best.drift_low, best.drift_high)
        words += " (edge of the grid)" if best.at_edge else ""
        # By itself for every row: optima that drift leave no side free for all.
        low, high = min(best.log2_lr, best.log2_lr_low), max(best.log2_lr, best.log2_lr_high)
        right = limits[1] - high >= low - limits[0]
        side: dict[str, Any] = {"x": 0.995, "ha": "right"} if right else {"x": 0.005, "ha": "left"}
        axes.text(y=row, s=words, va="center", transform=axes.get_yaxis_transform(), fontsize=8, color=INK, **side)


def _headline(optima: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Return what the panel shows in one line: how far the optimum moved from the smallest width to the largest."""
    if optima.empty:
        some = runs["loss"].notna().any()
        return f"no verdict yet, {counted(len(runs), 'run')} so far" if some else "no optimum: no run ended with a loss"
    if len(optima) < 2:
        return "one width: no drift to tell"
    last = optima.iloc[-1]
    words = interval(last["drift"], last["drift_low"], last["drift_high"], 1)
    return f"best lr drifts {words} octaves, {across([*optima['width']])}"
