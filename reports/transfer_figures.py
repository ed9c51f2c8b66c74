"""Figures of transfer: loss against learning rate with the optimum of every width, loss against width, and the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mutransfer.errors import FrameError
from mutransfer.reports.style import (
    DIVERGING,
    GREY,
    INK,
    ReportFigure,
    across,
    colour,
    counted,
    interval,
    label,
    literal,
    log_loss,
    long_label,
    lr_axis,
    number,
    ordered,
    plain,
    power_of_two,
    regret,
    size_axis,
    styled,
    width_colours,
)
from mutransfer.schemas import BASINS, OPTIMA, PARAMETERS

__all__ = ["BasinFigure", "PlanFigure", "WiderFigure", "basin_panel", "optimum_strip", "share_loss_scale"]


def basin_panel(
    axes: Axes, name: str, runs: pd.DataFrame, optima: pd.DataFrame, colours: dict[int, str], seeds: int
) -> None:
    """Draw the ``runs`` (schema BASINS) of one parametrization, one line per width, with its ``optima`` sorted by width.

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
    """Set the shared y axis to cover all losses, with room at the top for one row of crosses per width."""
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
    """Draw one cross per diverged run at ``height`` (a fraction of the panel), with the seeds of one lr next to each other."""
    if diverged.empty:
        return
    rank = diverged.groupby("log2_lr").cumcount()
    count = diverged.groupby("log2_lr")["seed"].transform("size")
    x = diverged["log2_lr"] + 0.13 * (rank - (count - 1) / 2)
    y = [height] * len(x)
    axes.plot(x, y, "x", color=hue, markersize=3.6, transform=axes.get_xaxis_transform(), gid="diverged", clip_on=False)


def optimum_strip(axes: Axes, optima: pd.DataFrame, colours: dict[int, str], limits: tuple[float, float]) -> None:
    """Draw one row per width: its optimum, the 95% interval, and the drift as text on the side with more room."""
    rows = {width: row for row, width in enumerate(colours)}
    axes.set_yticks(list(rows.values()), [str(width) for width in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    if optima.empty:
        return
    axes.axvline(optima["log2_lr"].iloc[0], color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    # An interval without a bound extends to the edge of the axes.
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
        # The side is chosen for each row: if the optima drift, no side is free in all rows.
        low, high = min(best.log2_lr, best.log2_lr_low), max(best.log2_lr, best.log2_lr_high)
        right = limits[1] - high >= low - limits[0]
        side: dict[str, Any] = {"x": 0.995, "ha": "right"} if right else {"x": 0.005, "ha": "left"}
        axes.text(y=row, s=words, va="center", transform=axes.get_yaxis_transform(), fontsize=8, color=INK, **side)


def _headline(optima: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Return a one-line summary of the panel: how far the optimum moves from the smallest width to the largest."""
    if optima.empty:
        some = runs["loss"].notna().any()
        return f"no verdict yet, {counted(len(runs), 'run')} so far" if some else "no optimum: no run ended with a loss"
    if len(optima) < 2:
        return "one width: no drift to measure"
    last = optima.iloc[-1]
    words = interval(last["drift"], last["drift_low"], last["drift_high"], 1)
    return f"best lr drifts {words} octaves, {across([*optima['width']])}"


@dataclass(frozen=True, eq=False)
class BasinFigure(ReportFigure):
    """Learning-rate basins, one panel per parametrization, with the optimum of every width and its interval below.

    ``basins`` and ``optima`` are frames of the schemas BASINS and OPTIMA. Every run is drawn, diverged ones as crosses along
    the top. A point that is the mean of fewer losses than ``seeds`` (by default the number of seeds in the frame) is hollow.
    Without optima, for example while runs are missing, only the lines are drawn.

    Raises:
        FrameError: if a frame lacks a column, or there is no run.
    """

    basins: pd.DataFrame
    optima: pd.DataFrame
    seeds: int | None = None
    title = "Learning-rate basins across widths"

    def __post_init__(self) -> None:
        object.__setattr__(self, "basins", BASINS.frame(self.basins))
        object.__setattr__(self, "optima", OPTIMA.frame(self.optima))
        if self.basins.empty:
            raise FrameError("the basins frame holds no run to draw: run `mutransfer verify RUN`.")

    def frame(self) -> pd.DataFrame:
        """Return the basins: one row per run (schema BASINS)."""
        return self.basins.copy()

    @property
    def whole(self) -> int:
        """Number of losses in the mean of a point if none diverged or is missing."""
        return self.seeds or int(self.basins["seed"].nunique())

    @property
    def hollow(self) -> bool:
        """Whether some point is the mean of fewer losses than `whole`."""
        counts = self.basins.groupby(["parametrization", "width", "log2_lr"])["loss"].count()
        return bool(((counts > 0) & (counts < self.whole)).any())

    @property
    def _diverged(self) -> pd.Series:
        return self.basins["diverged"].fillna(False) | self.basins["loss"].isna()

    @property
    def _why_fewer(self) -> str:
        runs = self.basins.groupby(["parametrization", "width", "log2_lr"])["seed"].count()
        reasons = ["because some runs diverged"] if self._diverged.any() else []
        return " or ".join(reasons + (["because some are not done yet"] if (runs < self.whole).any() else []))

    @property
    def caption(self) -> str:
        """How to read the figure."""
        text = self._lines
        if self.hollow:
            text += (
                f" Hollow points are means over fewer than {self.whole} losses, {self._why_fewer}: do not compare them with "
                "the others."
            )
        return (
            text if len(self.optima) else text + " No optimum is marked because there is no verdict on these runs yet."
        )

    @property
    def _lines(self) -> str:
        if self.optima.empty:
            text = "Each line is one width: the mean validation loss over the finished seeds, with a band from the best seed to "
            text += "the worst."
            crosses = " × along the top are runs that diverged, one per seed, in their width's colour."
            return text + (crosses if self._diverged.any() else "")
        return (
            "Each line is one width: the mean validation loss over seeds, with a band from the best seed to the worst. "
            "× along the top are runs that diverged, one per seed, in their width's colour; the mean leaves them out. "
            "Dots mark each width's fitted optimum, and the strip below shows it again with its 95% interval over seeds "
            "and its drift in octaves (factors of 2 in the learning rate) from the smallest width, whose optimum is the "
            "dotted line. The learning rate transfers if the dots stay on that line."
        )

    def draw(self) -> Figure:
        """Return the figure."""
        names = ordered(list(self.basins["parametrization"]))
        colours = width_colours(self.basins["width"])
        lrs = self.basins["log2_lr"]
        with styled():
            figure = Figure(figsize=(max(4.9 * len(names), 6.4), 4.2 + 0.24 * len(colours)), layout="constrained")
            engine: Any = figure.get_layout_engine()
            engine.set(h_pad=0.04, w_pad=0.08, hspace=0.0, wspace=0.03)
            grid = figure.subplots(
                2, len(names), sharex=True, sharey="row", squeeze=False, height_ratios=[3.6, 0.3 + 0.25 * len(colours)]
            )
            share_loss_scale(grid[0, 0], self.basins, rows=len(colours))
            for panel, strip, name in zip(*grid, names, strict=True):
                optima = self.optima[self.optima["parametrization"] == name].sort_values("width")
                basin_panel(
                    panel, name, self.basins[self.basins["parametrization"] == name], optima, colours, self.whole
                )
                optimum_strip(strip, optima, colours, (lrs.min(), lrs.max()))
                strip.set_xlabel("base learning rate")
                lr_axis(strip, lrs.min(), lrs.max())
            grid[0, 0].set_xlim(lrs.min() - 0.4, lrs.max() + 0.4)
            grid[0, 0].set_ylabel("validation loss")
            grid[1, 0].set_ylabel("width")
            figure.legend(
                handles=_legend(colours, self.hollow, len(self.optima) > 0, bool(self._diverged.any())),
                loc="outside upper left",
                ncols=len(colours) + 4,
                handlelength=1.6,
            )
        return figure


def _legend(colours: dict[int, str], hollow: bool, judged: bool, diverged: bool) -> list[Line2D]:
    lines = [Line2D([], [], color=hue, linewidth=2.4, label=f"width {width}") for width, hue in colours.items()]
    dot = Line2D([], [], color=GREY, marker="o", markersize=7, linestyle="", label="optimum")
    cross = Line2D([], [], color=GREY, marker="x", markersize=5, linestyle="", label="diverged run")
    reference = Line2D([], [], color=GREY, linestyle=":", label=f"optimum of width {min(colours)}")
    ring = Line2D([], [], color=GREY, marker="o", markersize=4.5, mfc="white", linestyle="", label="fewer seeds")
    return [*lines, *([dot, reference] if judged else []), *([cross] if diverged else []), *([ring] if hollow else [])]


@dataclass(frozen=True, eq=False)
class WiderFigure(ReportFigure):
    """Loss against width for each parametrization; the gap between its two lines is the regret of the transferred lr.

    ``basins`` and ``optima`` are frames of the schemas BASINS and OPTIMA. The means come from ``optima``, the range over seeds
    at each width's own best learning rate from ``basins``.

    Raises:
        FrameError: if a frame lacks a column, or there is no optimum.
    """

    basins: pd.DataFrame
    optima: pd.DataFrame
    maximize: bool = False
    title = "Wider is better"

    def __post_init__(self) -> None:
        object.__setattr__(self, "basins", BASINS.frame(self.basins))
        object.__setattr__(self, "optima", OPTIMA.frame(self.optima))
        if self.optima.empty:
            raise FrameError("the optima frame is empty, so there is no curve to draw: run `mutransfer verify RUN`.")

    def frame(self) -> pd.DataFrame:
        """Return one row per parametrization, width and learning rate ("transferred", "own best"): loss, low, high.

        The interval is the 95% interval of the regret for "transferred", and the range over seeds for "own best".
        """
        rows = []
        for best in self.optima.sort_values(["parametrization", "width"]).itertuples():
            key = {"parametrization": best.parametrization, "width": best.width}
            sign = -1 if self.maximize else 1
            ends = sorted(
                best.transferred_loss + sign * (end - best.regret) for end in (best.regret_low, best.regret_high)
            )
            rows.append({**key, "rate": "transferred", "loss": best.transferred_loss, "low": ends[0], "high": ends[1]})
            seeds = self._seeds_at_best(best.parametrization, best.width)
            rows.append({**key, "rate": "own best", "loss": best.best_loss, "low": seeds.min(), "high": seeds.max()})
        return pd.DataFrame(rows)

    @property
    def caption(self) -> str:
        """How to read the figure."""
        return (
            "Solid: trained with the learning rate transferred from the small proxy, with the 95% interval of its regret. "
            "Dashed: trained with the best learning rate of the grid at that width, with a band from the best seed to the worst. "
            "The number is the regret: the cost of not tuning again, in the unit of the loss. If transfer holds, the two lines "
            "stay together and fall with width; × on the top edge means that the runs at the transferred learning rate diverged."
        )

    def draw(self) -> Figure:
        """Return the figure."""
        frame = self.frame()
        frame.insert(2, "diverged", np.isinf(frame["loss"]))  # a missing loss was not run, and is not drawn
        frame = frame.replace([np.inf, -np.inf], np.nan)
        with styled():
            figure = Figure(figsize=(6.4, 3.9), layout="constrained")
            axes = figure.subplots()
            log_loss(axes, frame["loss"], ratio=2.5)
            for name in ordered(list(self.optima["parametrization"])):
                rows = frame[frame["parametrization"] == name].set_index("width")
                _curve(axes, name, rows[rows["rate"] == "transferred"], rows[rows["rate"] == "own best"])
            self._regrets(axes)
            size_axis(axes, self.optima["width"])
            axes.margins(x=0.06, y=0.14)
            axes.set_xlabel("width")
            axes.set_ylabel("validation metric" if self.maximize else "validation loss")
            literal(figure.legend(loc="outside upper left", ncols=2, handlelength=3.2))
        return figure

    def _seeds_at_best(self, name: str, width: int) -> pd.Series:
        runs = self.basins[(self.basins["parametrization"] == name) & (self.basins["width"] == width)]
        whole = runs.groupby("log2_lr").filter(lambda group: group["loss"].notna().all())
        runs = whole if len(whole) else runs.dropna(subset="loss")
        means = runs.groupby("log2_lr")["loss"].mean()
        return (
            runs["loss"][runs["log2_lr"] == (-means if self.maximize else means).idxmin()]
            if len(runs)
            else runs["loss"]
        )

    def _regrets(self, axes: Axes) -> None:
        """Write each parametrization's regret right of its last point: below the point for the lowest loss, above for others."""
        last = self.optima.sort_values("width").groupby("parametrization").tail(1)
        last = last[np.isfinite(last["transferred_loss"])]
        for rank, row in enumerate(last.sort_values("transferred_loss").itertuples()):
            words = f"{plain(label(row.parametrization), 14)}: regret\n{regret(row.regret, row.regret_low, row.regret_high)}"
            style: dict[str, Any] = {
                "ha": "left",
                "va": "bottom" if rank else "top",
                "parse_math": False,
                "fontsize": 8.5,
            }
            place = (row.width, row.transferred_loss)
            axes.annotate(words, place, (9, 0), textcoords="offset points", color=colour(row.parametrization), **style)


def _curve(axes: Axes, name: str, carried: pd.DataFrame, best: pd.DataFrame) -> None:
    """Draw the two lines of a parametrization, and a cross at the top where the runs at the transferred lr diverged."""
    hue, short = colour(name), plain(label(name), 16)
    axes.fill_between(best.index, best["low"], best["high"], color=hue, alpha=0.13, linewidth=0)
    axes.plot(best.index, best["loss"], "--", marker="D", markersize=3.5, color=hue, label=f"{short}, own best lr")
    errors = [(carried["loss"] - carried["low"]).clip(lower=0), (carried["high"] - carried["loss"]).clip(lower=0)]
    line: dict[str, Any] = {"marker": "o", "markersize": 5.5, "capsize": 3, "elinewidth": 1.0, "gid": "transferred"}
    axes.errorbar(carried.index, carried["loss"], yerr=errors, color=hue, label=f"{short}, transferred lr", **line)
    bad = carried.index[carried["diverged"]]
    axes.plot(bad, [0.97] * len(bad), "x", color=hue, markersize=7, transform=axes.get_xaxis_transform(), gid="lost")


SETTINGS = {
    "init_factor": "initial std",
    "lr_factor": "learning rate",
    "wd_factor": "weight decay",
    "eps_factor": "epsilon",
}
ROLES = ("input", "vector", "hidden", "output", "bottleneck", "finite")


@dataclass(frozen=True, eq=False)
class PlanFigure(ReportFigure):
    """Grid of role × setting with the factor on the base model's value, from the settings per parameter (schema PARAMETERS).

    Raises:
        FrameError: if the frame lacks a column, or has no parameter.
    """

    parameters: pd.DataFrame
    title = "What the plan changes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", PARAMETERS.frame(self.parameters))
        if self.parameters.empty:
            raise FrameError(
                "the parameters frame is empty, so there is no plan to draw: run `mutransfer transfer RUN`."
            )

    def frame(self) -> pd.DataFrame:
        """Return the settings, one row per parameter (schema PARAMETERS)."""
        return self.parameters.copy()

    @property
    def cells(self) -> pd.DataFrame:
        """One row per role and setting, with its smallest and largest factor; NaN where no parameter has a factor."""
        roles = self.parameters["role"].unique()
        ordered = [role for role in ROLES if role in roles] + sorted(set(roles) - set(ROLES))
        rows = []
        for role in ordered:
            here = self.parameters[self.parameters["role"] == role]
            for setting in SETTINGS:
                found = here[setting].dropna()
                ends = (found.min(), found.max()) if len(found) else (math.nan, math.nan)
                rows.append({"role": role, "count": len(here), "setting": setting, "low": ends[0], "high": ends[1]})
        return pd.DataFrame(rows)

    @property
    def caption(self) -> str:
        """How to read the figure."""
        return (
            "Each cell is the factor from the base model's value to the target's: 2⁻⁴ is a sixteenth of it, 1 is no change. "
            "Two numbers are the ends of a range if the parameters of one role grow differently. Blue (hatched ╱) is "
            "smaller than at the base, orange (hatched ╲) larger, and the colour is stronger further from 1. Dashes: constants "
            "have no initial spread, and some optimizers have no epsilon. The table below lists every parameter."
        )

    def draw(self) -> Figure:
        """Return the figure."""
        cells = self.cells
        roles = list(dict.fromkeys(cells["role"]))
        low, high = (np.log2(cells[end].where(cells[end] > 0)) for end in ("low", "high"))
        reach = max(1.0, float(pd.concat([low.abs(), high.abs()]).max()) if low.notna().any() else 1.0)
        with styled():
            figure = Figure(figsize=(1.42 * len(SETTINGS) + 2.0, 0.52 * len(roles) + 0.75), layout="constrained")
            axes = figure.subplots()
            for index, cell in cells.iterrows():
                place = list(SETTINGS).index(cell["setting"]), roles.index(cell["role"])
                _cell(axes, *place, float(low[index]), float(high[index]), cell, reach)
            axes.set_xlim(0, len(SETTINGS))
            axes.set_ylim(len(roles), 0)
            axes.grid(visible=False)
            axes.tick_params(length=0, labelsize=9)
            axes.xaxis.tick_top()
            axes.spines[:].set_visible(False)
            counts = cells.groupby("role")["count"].first()
            labels = [f"{plain(role, 20)} ({counts[role]})" for role in roles]
            axes.set_xticks([x + 0.5 for x in range(len(SETTINGS))], SETTINGS.values(), weight="bold")
            axes.set_yticks([y + 0.5 for y in range(len(roles))], labels)
            literal(axes.get_yticklabels())
            axes.set_xlabel(
                "target's value / base model's value; parameters per role in brackets", fontsize=8, color=GREY
            )
        return figure


def _cell(axes: Axes, column: int, row: int, low: float, high: float, cell: pd.Series, reach: float) -> None:
    """Draw one cell: colour and hatch show the middle of the factors' log2, and the text gives the factor or its range."""
    x, y, edge = [column + 0.03, column + 0.97], [row + 0.06] * 2, [row + 0.94] * 2
    middle = (low + high) / 2
    shade: Any = "#f3f4f6"
    hatch: str | None = None
    if not math.isnan(middle):
        shade = DIVERGING(TwoSlopeNorm(0.0, -reach, reach)(middle))
        hatch = "///" if middle < -0.01 else "\\\\\\" if middle > 0.01 else None
    axes.fill_between(x, y, edge, facecolor=shade, hatch=hatch, edgecolor="#ffffff59", linewidth=0, gid="cell")
    dark = abs(middle) > 0.55 * reach
    paper = {"facecolor": shade, "linewidth": 0, "pad": 1.5}  # keeps the hatch from running through the exponent
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if dark else INK, "bbox": paper}
    if math.isnan(cell["low"]):
        axes.text(column + 0.5, row + 0.5, "–", **{**style, "color": GREY})
        return
    words = (
        _factor(cell["low"])
        if math.isclose(cell["low"], cell["high"])
        else f"{_factor(cell['low'])} to {_factor(cell['high'])}"
    )
    axes.text(column + 0.5, row + 0.5, words, weight="bold", fontsize=10.5, **style)


def _factor(value: float) -> str:
    """Return "1", "2⁻⁴" or "2⁻²·⁵"; "0" for a factor of 0."""
    if value <= 0 or not math.isfinite(value):
        return number(float(value))
    exponent = math.log2(value)
    return "1" if abs(exponent) < 0.005 else power_of_two(exponent)
