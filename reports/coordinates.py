"""The coordinate check as a grid: the sizes of outputs, changes and settings by group of modules, against width or depth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mutransfer.errors import RequestError
from mutransfer.reports.coordinate_panel import coordinate_panel, octaves_spanned
from mutransfer.reports.coordinate_rows import column_pairs, ranked_rows
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.style import GREY, colour, literal, size_axis, styled
from mutransfer.reports.words import label, ordered, plain
from mutransfer.schemas import COORDINATES, SLOPES, varying

__all__ = ["CoordinateFigure"]

MOST_GROUPS = 12
HEADINGS = {
    "weight": "weight size",
    "step": "step size",
    "decay": "lr · weight decay",
    "gradient": "gradient / epsilon",
}


@dataclass(frozen=True, eq=False)
class CoordinateFigure(ReportFigure):
    """Group of modules × (statistic, step): the mean over seeds against width or depth, and the slopes that should be seen.

    Modules whose names differ in numbers only are a group, and so are a module and its weight. Each panel draws the one
    furthest from what is expected.

    ``coordinates`` and ``slopes`` are frames of the schemas COORDINATES and SLOPES. The parametrization of the slopes
    is the checked one; any other in ``coordinates`` is drawn in grey as the control.

    Raises:
        RequestError: a frame lacks a column, or there is no slope, or no coordinate of the parametrization in it.
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
            raise RequestError("there is no slope, or no coordinate behind it, to draw: run `mutransfer check MODEL`.")
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
        """The parametrization that the slopes belong to."""
        return str(self.slopes["parametrization"].iloc[0])

    @property
    def caption(self) -> str:
        """How to read the figure, and what of the check it leaves out."""
        along = varying(self.coordinates)
        text = (
            f"Each panel is one measurement of one module (mean |x| of its output, unless the heading says otherwise) against "
            f"{along} on log scales, all panels with the same height in octaves, so a slope looks the same everywhere: the line "
            "is the mean over seeds, the band their range. Above it stands the slope with its 95% interval over seeds. The "
            "line has to follow the dotted line, or stay in the shaded fan: the slopes of "
            f"{along}-stable feature learning, but for a small margin. Falling logits at initialization are right. ✓ holds, ✗ "
            "(and a thick frame) fails, ? needs more evidence; × on the top edge is a value that was not finite."
        )
        if any("*" in name for name in self.groups):
            text += (
                " A row with * stands for all modules whose names differ in that number only; each panel draws the one that "
                "is furthest from what is expected, and names it."
            )
        hidden = self.slopes["module"].nunique() - sum(map(len, self.groups.values()))
        if hidden:
            text += f" Shown are the {len(self.groups)} rows furthest from what is expected; in the table: {hidden} more modules."
        pairs = len(self.slopes[["statistic", "step"]].drop_duplicates())
        if pairs > len(self.columns):
            text += f" {len(self.columns)} of {pairs} measurements per module are shown."
        return text

    def draw(self) -> Figure:
        """Return the drawing."""
        names = [self.checked, *(n for n in ordered(list(self.coordinates["parametrization"])) if n != self.checked)]
        along, shape = varying(self.coordinates), (len(self.groups), len(self.columns))
        panels = dict(list(self.coordinates.groupby(["module", "statistic", "step"])))
        drawn = [
            (name, *pair) for group in self.groups for pair in self.columns if (name := self.panels.get((group, *pair)))
        ]
        span = max((octaves_spanned(panels[key]) for key in drawn if key in panels), default=1.0)
        with styled():
            figure = Figure(figsize=(2.3 * shape[1] + 1.6, 1.32 * shape[0] + 1.0), layout="constrained")
            grid = figure.subplots(*shape, squeeze=False)  # sharex: quadratic in panels
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
    """Leave a panel empty, its row's name kept."""
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
