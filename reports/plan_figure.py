"""Figure of the plan: how each setting at the target differs from the base model's, for every role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from mutransfer.errors import FrameError
from mutransfer.reports.style import DIVERGING, GREY, INK, ReportFigure, literal, number, plain, power_of_two, styled
from mutransfer.schemas import PARAMETERS

__all__ = ["PlanFigure"]

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
