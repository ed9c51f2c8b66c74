"""One panel of the coordinate check: a module's size against width or depth, the slopes it may have, and the one it has."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mutransfer.reports.style import GREY, INK, colour
from mutransfer.reports.words import interval, label, plain

__all__ = ["coordinate_panel", "expected_range", "octaves_spanned"]

FAILS = "#b3261e"


def expected_range(text: str) -> tuple[float, float]:
    """Return the ends of a range written as "low..high"; a missing one is (nan, nan)."""
    low, _, high = str(text).partition("..")
    try:
        return float(low), float(high or low)
    except ValueError:
        return math.nan, math.nan


def octaves_spanned(rows: pd.DataFrame) -> float:
    """Return how many octaves the panel of these rows has to span."""
    values = np.log2(rows["value"].where((rows["value"] > 0) & np.isfinite(rows["value"])).dropna())
    return float(values.max() - values.min()) if len(values) else 0.0


def coordinate_panel(
    axes: Axes, rows: pd.DataFrame, slopes: pd.DataFrame, names: list[str], span: float, along: str
) -> None:
    """Draw one module, statistic and step: ``names[0]`` is the checked parametrization, the others stand in grey.

    ``slopes`` holds the panel's slope in one row, or none; ``span`` is the height in octaves that all panels share, and
    ``along`` the column on the x axis.
    """
    rows = rows.assign(log=np.log2(rows["value"].where((rows["value"] > 0) & np.isfinite(rows["value"]))))
    middle = (rows["log"].max() + rows["log"].min()) / 2
    half = min(max(span, 1.0), 16.0) * 0.58
    axes.set_yscale("log", base=2)
    axes.autoscale(enable=False)
    axes.set_xlim(rows[along].min() / 1.18, rows[along].max() * 1.18)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{math.log2(value):.0f}}}$"))
    if not math.isnan(middle):
        axes.set_ylim(2 ** (middle - half), 2 ** (middle + half))
    for name in reversed(names):  # the checked one last, on top
        here = rows[rows["parametrization"] == name]
        over = here.groupby(along)["log"].agg(["mean", "min", "max"])
        hue, control = (colour(name), False) if name == names[0] else (GREY, True)
        if not control and len(slopes):
            _fan(axes, over["mean"].dropna(), *expected_range(slopes["expected"].iloc[0]), hue)
        axes.fill_between(
            over.index, 2 ** over["min"], 2 ** over["max"], color=hue, alpha=0.12 if control else 0.3, lw=0
        )
        line = {"linestyle": "--", "marker": "s", "markersize": 2.5, "linewidth": 1.2} if control else {"marker": "o"}
        axes.plot(over.index, 2 ** over["mean"], color=hue, gid=name, **line)
        lost = here[~np.isfinite(here["value"])]
        if len(lost):
            axes.plot(lost[along], [0.96] * len(lost), "x", color=hue, transform=axes.get_xaxis_transform(), gid="lost")
        if len(here) and (here["value"] == 0).all():
            axes.text(
                0.04,
                0.1,
                f"{plain(label(name))}: exactly 0",
                transform=axes.transAxes,
                fontsize=7.5,
                color=hue,
                parse_math=False,
            )
    _mark(axes, slopes)


def _fan(axes: Axes, means: pd.Series, low: float, high: float, hue: str) -> None:
    """Shade the lines through the smallest size's mean with the expected slopes."""
    if means.empty or math.isnan(low):
        return
    ratio = means.index.to_numpy(float) / means.index[0]
    ends = [2 ** means.iloc[0] * ratio**slope for slope in (low, high)]
    axes.fill_between(means.index, *ends, color=hue, alpha=0.13, linewidth=0)
    for end in [end for slope, end in zip((low, high), ends, strict=True) if math.isfinite(slope)]:
        axes.plot(means.index, end, color=hue, linestyle=":", linewidth=0.8, alpha=0.8)


def _mark(axes: Axes, slopes: pd.DataFrame) -> None:
    """Write the slope above the panel, with the outcome as a sign, a word and a frame."""
    if slopes.empty:
        return
    row = slopes.iloc[0]
    words = interval(row["slope"], row["low"], row["high"])
    fails = row["ok"] is not pd.NA and not row["ok"]
    sign = "?" if row["ok"] is pd.NA else ("✗" if fails else "✓")
    weight = "bold" if fails else "normal"
    axes.set_title(f"{sign} {words}", fontsize=8, weight=weight, color=FAILS if fails else INK, pad=4)
    if fails:
        axes.set_facecolor("#fdf0ee")
        for spine in axes.spines.values():
            spine.set(visible=True, edgecolor=FAILS, linewidth=2.0)
