"""The coordinate check as a grid: the size of every module's output and of its change, against width or depth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mutransfer.errors import RequestError
from mutransfer.frames import COORDINATES, SLOPES, varying
from mutransfer.reports.coordinate_panel import coordinate_panel, expected_range, octaves_spanned
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.style import GREY, colour, literal, size_axis, styled
from mutransfer.reports.words import label, ordered, plain

__all__ = ["CoordinateFigure"]

# What a panel shows of a module; a readout's update is drawn where it fails, and the parameters' own rows are in the table.
SHOWN = ("activation", "change")
MOST_MODULES = 12
MOST_COLUMNS = 4


@dataclass(frozen=True, eq=False)
class CoordinateFigure(ReportFigure):
    """Module × (statistic, step): the mean over seeds against width or depth, the range of slopes that should be seen behind it.

    ``coordinates`` and ``slopes`` are frames of the schemas COORDINATES and SLOPES. The parametrization of the slopes
    is the checked one; any other in ``coordinates`` is drawn in grey as the control.

    Raises:
        RequestError: a frame lacks a column, or there is no slope, or no coordinate of the parametrization in it.
    """

    coordinates: pd.DataFrame
    slopes: pd.DataFrame
    title = "Coordinate check"
    modules: list[str] = field(init=False)
    columns: list[tuple[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        slopes = SLOPES.frame(self.slopes)
        fails = slopes["ok"].eq(False).fillna(False)
        slopes = slopes[slopes["statistic"].isin(SHOWN) | slopes["statistic"].eq("update") & fails]
        object.__setattr__(self, "coordinates", COORDINATES.frame(self.coordinates))
        object.__setattr__(self, "slopes", slopes)
        if slopes.empty or slopes["parametrization"].iloc[0] not in set(self.coordinates["parametrization"]):
            raise RequestError("there is no slope, or no coordinate behind it, to draw: run `mutransfer check MODEL`.")
        excess = slopes.assign(excess=[_excess(row.slope, row.expected) for row in slopes.itertuples()])
        worst = excess.groupby("module")["excess"].max().nlargest(MOST_MODULES).index
        object.__setattr__(self, "modules", [name for name in slopes["module"].unique() if name in set(worst)])
        object.__setattr__(self, "columns", _columns(excess))

    def frame(self) -> pd.DataFrame:
        """Return the coordinates: one row per module, statistic, step, seed and size (schema COORDINATES)."""
        return self.coordinates.copy()

    @property
    def checked(self) -> str:
        """The parametrization that the slopes belong to."""
        return str(self.slopes["parametrization"].iloc[0])

    @property
    def caption(self) -> str:
        """How to read the figure, and what of the check it leaves out."""
        along = varying(self.coordinates)
        text = (
            f"Each panel is one module's mean |x| against {along} on log scales, all panels with the same height in octaves, "
            "so a slope looks the same everywhere: the line is the mean over seeds, the band their range. Above it stands "
            "the slope with its 95% interval over seeds. The line has to follow the dotted line, or stay in the shaded fan: "
            f"the slopes of {along}-stable feature learning, but for a small margin. Falling logits at initialization are "
            "right. ✓ holds, ✗ (and a thick frame) fails, ? needs more evidence; × on the top edge is a value that was "
            "not finite."
        )
        hidden = self.slopes["module"].nunique() - len(self.modules)
        if hidden:
            text += f" Shown are the {len(self.modules)} modules furthest from what is expected; {hidden} more are in the table."
        pairs = len(self.slopes[["statistic", "step"]].drop_duplicates())
        if pairs > len(self.columns):
            text += f" {len(self.columns)} of {pairs} measurements per module are shown."
        return text

    def draw(self) -> Figure:
        """Return the drawing."""
        names = [self.checked, *(n for n in ordered(list(self.coordinates["parametrization"])) if n != self.checked)]
        along, shape = varying(self.coordinates), (len(self.modules), len(self.columns))
        panels = dict(list(self.coordinates.groupby(["module", "statistic", "step"])))
        span = max((octaves_spanned(rows) for rows in panels.values()), default=1.0)
        with styled():
            figure = Figure(figsize=(2.3 * shape[1] + 1.6, 1.32 * shape[0] + 1.0), layout="constrained")
            grid = figure.subplots(*shape, squeeze=False)  # sharex: quadratic in panels
            for row, module in enumerate(self.modules):
                for column, (statistic, step) in enumerate(self.columns):
                    axes = grid[row, column]
                    rows = panels.get((module, statistic, step))
                    if rows is None:
                        axes.set_axis_off()
                        continue
                    size_axis(axes, self.coordinates[along])
                    axes.tick_params(labelbottom=row == shape[0] - 1)
                    key = self.slopes[["module", "statistic", "step"]].eq([module, statistic, step]).all(axis=1)
                    coordinate_panel(axes, rows, self.slopes[key], names, span, along)
                heading = {"rotation": 0, "ha": "right", "va": "center", "parse_math": False}
                grid[row, 0].set_ylabel(plain(module, 26), labelpad=8, **heading)
            for column, (statistic, step) in enumerate(self.columns):
                top = grid[0, column]
                place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
                top.annotate(_heading(statistic, step), (0, 1), (0, 20), weight="bold", **place)
            figure.supxlabel(along, fontsize=9)
            literal(figure.legend(handles=_legend(names), loc="outside upper left", ncols=len(names) + 1))
        return figure


def _excess(slope: float, expected: str) -> float:
    """Return how far a slope lies from the middle of what is expected, outside the range counting much more."""
    low, high = expected_range(expected)
    if math.isnan(slope) or math.isnan(low):
        return 0.0
    ends = [end for end in (low, high) if math.isfinite(end)]
    outside = max(low - slope, slope - high, 0.0)
    return 100 * outside + (abs(slope - sum(ends) / 2) if len(ends) == 2 else 0.0)


def _columns(excess: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the (statistic, step) pairs to draw: first and last of each statistic, then those with the worst slopes."""
    pairs = excess.groupby(["statistic", "step"])["excess"].max()
    steps = {name: sorted(step for statistic, step in pairs.index if statistic == name) for name, _ in pairs.index}
    ends = [(name, found[0]) for name, found in steps.items()] + [("change", steps["change"][-1])] * ("change" in steps)
    chosen = list(dict.fromkeys([*ends, *pairs.sort_values(ascending=False).index]))[:MOST_COLUMNS]
    return sorted(chosen)


def _heading(statistic: str, step: int) -> str:
    when = "at initialization" if step == 0 else "after 1 step" if step == 1 else f"after {step} steps"
    return f"{statistic} {when}"


def _legend(names: list[str]) -> list[Line2D | Patch]:
    checked = Line2D([], [], color=colour(names[0]), marker="o", label=f"{plain(label(names[0]))}, checked")
    grey: dict[str, Any] = {"color": GREY, "linestyle": "--", "marker": "s", "markersize": 3}
    controls = [Line2D([], [], label=f"{plain(label(name))}, control", **grey) for name in names[1:]]
    return [checked, Patch(color=colour(names[0]), alpha=0.2, label="expected slopes"), *controls]
