"""Figure of the coordinate check: sizes of outputs, changes and settings per group of modules, against width or depth."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mutransfer.errors import FrameError
from mutransfer.reports.style import (
    GREY,
    INK,
    ReportFigure,
    colour,
    interval,
    label,
    literal,
    ordered,
    plain,
    size_axis,
    styled,
)
from mutransfer.schemas import COORDINATES, SLOPES, varying

__all__ = ["CoordinateFigure", "column_pairs", "coordinate_panel", "expected_range", "octaves_spanned", "ranked_rows"]

FAILS = "#b3261e"


def expected_range(text: str) -> tuple[float, float]:
    """Return the ends of a range written as "low..high"; (nan, nan) if there is no range."""
    low, _, high = str(text).partition("..")
    try:
        return float(low), float(high or low)
    except ValueError:
        return math.nan, math.nan


def octaves_spanned(rows: pd.DataFrame) -> float:
    """Return the number of octaves that the values in ``rows`` span."""
    values = np.log2(rows["value"].where((rows["value"] > 0) & np.isfinite(rows["value"])).dropna())
    return float(values.max() - values.min()) if len(values) else 0.0


def coordinate_panel(
    axes: Axes, rows: pd.DataFrame, slopes: pd.DataFrame, names: list[str], span: float, along: str
) -> None:
    """Draw the panel of one module, statistic and step.

    Args:
        axes: axes to draw on.
        rows: the coordinates of the panel (schema COORDINATES).
        slopes: the slope of the panel in one row, or no row.
        names: parametrizations; the first is the checked one, the others are drawn in grey.
        span: height in octaves that all panels share.
        along: column of the x axis, "width" or "depth".
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
    for name in reversed(names):  # the checked parametrization last, so that it is drawn on top
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
        bad = here[~np.isfinite(here["value"])]
        if len(bad):
            axes.plot(bad[along], [0.96] * len(bad), "x", color=hue, transform=axes.get_xaxis_transform(), gid="lost")
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
    """Shade the area between the lines with the expected slopes through the mean at the smallest size."""
    if means.empty or math.isnan(low):
        return
    ratio = means.index.to_numpy(float) / means.index[0]
    ends = [2 ** means.iloc[0] * ratio**slope for slope in (low, high)]
    axes.fill_between(means.index, *ends, color=hue, alpha=0.13, linewidth=0)
    for end in [end for slope, end in zip((low, high), ends, strict=True) if math.isfinite(slope)]:
        axes.plot(means.index, end, color=hue, linestyle=":", linewidth=0.8, alpha=0.8)


def _mark(axes: Axes, slopes: pd.DataFrame) -> None:
    """Write the slope and the sign of its outcome above the panel; a failing panel also gets a frame."""
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


MOST_COLUMNS = 5
ALWAYS = ("activation", "change")  # other statistics get a column only if one of their slopes does not hold
NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


def ranked_rows(slopes: pd.DataFrame) -> pd.DataFrame:
    """Return the slopes (schema SLOPES) with two more columns: ``group`` of modules, and ``excess`` over the expected slope."""
    outputs = set(slopes["module"][slopes["statistic"].isin(ALWAYS)])
    groups = [NUMBER.sub(r"\1*", _owner(name, outputs)) for name in slopes["module"]]
    excess = [_excess(row.slope, row.expected, row.ok) for row in slopes.itertuples()]
    return slopes.assign(group=groups, excess=excess)


def _owner(name: str, outputs: set[str]) -> str:
    """Return the module that a weight belongs to if its output is measured as well, otherwise the name itself."""
    module = name.removesuffix(".weight")
    return module if module in outputs else name


def _excess(slope: float, expected: str, ok: bool | None) -> float:
    """Return how far a slope lies from the middle of the expected range; being outside it, or failing, counts much more."""
    low, high = expected_range(expected)
    fails = 0.0 if ok is pd.NA or ok else 1e6
    if math.isnan(slope) or math.isnan(low):
        return fails
    ends = [end for end in (low, high) if math.isfinite(end)]
    outside = max(low - slope, slope - high, 0.0)
    return fails + 100 * outside + (abs(slope - sum(ends) / 2) if len(ends) == 2 else 0.0)


def column_pairs(ranked: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the (statistic, step) pairs to draw: first and last activations and changes, then those with the most excess."""
    pairs = ranked.groupby(["statistic", "step"])["excess"].max()
    steps = {name: sorted(step for statistic, step in pairs.index if statistic == name) for name, _ in pairs.index}
    ends = [(name, end) for name in ALWAYS if name in steps for end in (steps[name][0], steps[name][-1])]
    holds = ranked["ok"].fillna(False).groupby([ranked["statistic"], ranked["step"]]).all()
    others = [pair for pair in pairs.sort_values(ascending=False).index if pair[0] in ALWAYS or not holds[pair]]
    chosen = list(dict.fromkeys([*ends, *others])) or list(pairs.index)
    order = {name: rank for rank, name in enumerate(ALWAYS)}
    return sorted(chosen[:MOST_COLUMNS], key=lambda pair: (order.get(pair[0], len(order)), pair))


MOST_GROUPS = 12
HEADINGS = {
    "weight": "weight size",
    "step": "step size",
    "decay": "lr · weight decay",
    "gradient": "gradient / epsilon",
}


@dataclass(frozen=True, eq=False)
class CoordinateFigure(ReportFigure):
    """Grid of panels, one row per group of modules and one column per (statistic, step).

    Each panel shows the mean over seeds against width or depth, and the expected slopes. Modules whose names differ only in
    numbers form a group, and so do a module and its weight. The panel shows the member furthest from its expected slope.

    ``coordinates`` and ``slopes`` are frames of the schemas COORDINATES and SLOPES. The parametrization of the slopes
    is the checked one; any other in ``coordinates`` is drawn in grey as a control.

    Raises:
        FrameError: if a frame lacks a column, there is no slope, or the coordinates do not include the slopes'
            parametrization.
    """

    coordinates: pd.DataFrame
    slopes: pd.DataFrame
    title = "Coordinate check"
    groups: dict[str, set[str]] = field(init=False)
    panels: dict[tuple[str, str, int], str] = field(init=False)
    columns: list[tuple[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        slopes = SLOPES.frame(self.slopes)
        object.__setattr__(self, "coordinates", COORDINATES.frame(self.coordinates))
        object.__setattr__(self, "slopes", slopes)
        if slopes.empty or slopes["parametrization"].iloc[0] not in set(self.coordinates["parametrization"]):
            raise FrameError("there are no slopes with their coordinates to draw: run `mutransfer check MODEL`.")
        ranked = ranked_rows(slopes)
        worst = set(ranked.groupby("group")["excess"].max().nlargest(MOST_GROUPS).index)
        names = {str(name): set(found) for name, found in ranked.groupby("group", sort=False)["module"]}
        shown = ranked.loc[ranked.groupby(["group", "statistic", "step"])["excess"].idxmax()]
        keys = zip(shown["group"], shown["statistic"], shown["step"], strict=True)
        object.__setattr__(self, "groups", {name: found for name, found in names.items() if name in worst})
        object.__setattr__(self, "panels", dict(zip(keys, shown["module"], strict=True)))
        object.__setattr__(self, "columns", column_pairs(ranked))

    def frame(self) -> pd.DataFrame:
        """Return the coordinates: one row per module, statistic, step, seed and size (schema COORDINATES)."""
        return self.coordinates.copy()

    @property
    def checked(self) -> str:
        """The parametrization of the slopes."""
        return str(self.slopes["parametrization"].iloc[0])

    @property
    def caption(self) -> str:
        """How to read the figure, and which parts of the check it leaves out."""
        along = varying(self.coordinates)
        text = (
            f"Each panel shows one measurement of one module (mean |x| of its output, unless the heading says otherwise) against "
            f"{along} on log scales. All panels have the same height in octaves, so equal slopes look equal. The line is the "
            "mean over seeds and the band their range; above the panel is the slope with its 95% interval over seeds. The line "
            "should follow the dotted line or stay within the shaded fan, which show the slopes of "
            f"{along}-stable feature learning, up to a small margin. Logits that fall at initialization are correct. ✓ holds, "
            "✗ (with a thick frame) fails, ? needs more evidence; × on the top edge is a value that was not finite."
        )
        if any("*" in name for name in self.groups):
            text += (
                " A row with * stands for all modules whose names differ only in that number; each panel shows the one "
                "furthest from its expected slope, and names it."
            )
        hidden = self.slopes["module"].nunique() - sum(map(len, self.groups.values()))
        if hidden:
            text += (
                f" Only the {len(self.groups)} rows furthest from their expected slopes are shown; in the table: {hidden} more "
                "modules."
            )
        pairs = len(self.slopes[["statistic", "step"]].drop_duplicates())
        if pairs > len(self.columns):
            text += f" {len(self.columns)} of {pairs} measurements per module are shown."
        return text

    def draw(self) -> Figure:
        """Return the figure."""
        names = [self.checked, *(n for n in ordered(list(self.coordinates["parametrization"])) if n != self.checked)]
        along, shape = varying(self.coordinates), (len(self.groups), len(self.columns))
        panels = dict(list(self.coordinates.groupby(["module", "statistic", "step"])))
        drawn = [
            (name, *pair) for group in self.groups for pair in self.columns if (name := self.panels.get((group, *pair)))
        ]
        span = max((octaves_spanned(panels[key]) for key in drawn if key in panels), default=1.0)
        with styled():
            figure = Figure(figsize=(2.3 * shape[1] + 1.6, 1.32 * shape[0] + 1.0), layout="constrained")
            grid = figure.subplots(*shape, squeeze=False)  # sharex would take time quadratic in the number of panels
            for row, group in enumerate(self.groups):
                for column, (statistic, step) in enumerate(self.columns):
                    axes, module = grid[row, column], self.panels.get((group, statistic, step))
                    rows = panels.get((module, statistic, step))
                    if rows is None:
                        _blank(axes)
                        continue
                    size_axis(axes, self.coordinates[along])
                    below = list(self.groups)[row + 1 :]
                    axes.tick_params(labelbottom=not any((name, statistic, step) in self.panels for name in below))
                    key = self.slopes[["module", "statistic", "step"]].eq([module, statistic, step]).all(axis=1)
                    coordinate_panel(axes, rows, self.slopes[key], names, span, along)
                    if "*" in group:
                        place = {"transform": axes.transAxes, "fontsize": 6.5, "color": GREY, "parse_math": False}
                        axes.text(0.03, 0.04, plain(str(module), 30), **place)
                heading = {"rotation": 0, "ha": "right", "va": "center", "parse_math": False}
                grid[row, 0].set_ylabel(plain(group, 26), labelpad=8, **heading)
            for column, (statistic, step) in enumerate(self.columns):
                top = grid[0, column]
                place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
                top.annotate(_heading(statistic, step), (0, 1), (0, 20), weight="bold", **place)
            figure.supxlabel(along, fontsize=9)
            literal(figure.legend(handles=_legend(names), loc="outside upper left", ncols=len(names) + 1))
        return figure


def _blank(axes: Axes) -> None:
    """Leave a panel empty, but keep the name of its row."""
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[])


def _heading(statistic: str, step: int) -> str:
    when = "at initialization" if step == 0 else "after 1 step" if step == 1 else f"after {step} steps"
    return f"{HEADINGS.get(statistic, statistic)} {when}"


def _legend(names: list[str]) -> list[Line2D | Patch]:
    checked = Line2D([], [], color=colour(names[0]), marker="o", label=f"{plain(label(names[0]))}, checked")
    grey: dict[str, Any] = {"color": GREY, "linestyle": "--", "marker": "s", "markersize": 3}
    controls = [Line2D([], [], label=f"{plain(label(name))}, control", **grey) for name in names[1:]]
    return [checked, Patch(color=colour(names[0]), alpha=0.2, label="expected slopes"), *controls]
