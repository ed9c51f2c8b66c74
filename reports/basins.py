"""The picture of transfer: loss against learning rate at every width, and where each width's best lr lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mutransfer.errors import RequestError
from mutransfer.reports.basin_panel import basin_panel, optimum_strip, share_loss_scale
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.style import GREY, lr_axis, styled, width_colours
from mutransfer.reports.words import ordered
from mutransfer.schemas import BASINS, OPTIMA

__all__ = ["BasinFigure"]


@dataclass(frozen=True, eq=False)
class BasinFigure(ReportFigure):
    """Learning-rate basins, one panel per parametrization; below each, every width's optimum with its interval.

    ``basins`` and ``optima`` are frames of the schemas BASINS and OPTIMA; every run is drawn, the diverged ones as
    crosses along the top. A point that is the mean of fewer losses than ``seeds`` (as many as the frame has, unless given)
    is hollow. Without optima, as while runs are missing, the lines stand alone.

    Raises:
        RequestError: a frame lacks a column, or holds no run.
    """

    basins: pd.DataFrame
    optima: pd.DataFrame
    seeds: int | None = None
    title = "Learning-rate basins across widths"

    def __post_init__(self) -> None:
        object.__setattr__(self, "basins", BASINS.frame(self.basins))
        object.__setattr__(self, "optima", OPTIMA.frame(self.optima))
        if self.basins.empty:
            raise RequestError("the basins frame holds no run to draw: run `mutransfer verify RUN`.")

    def frame(self) -> pd.DataFrame:
        """Return the basins: one row per run (schema BASINS)."""
        return self.basins.copy()

    @property
    def whole(self) -> int:
        """How many losses a point's mean is over, unless some diverged or are missing."""
        return self.seeds or int(self.basins["seed"].nunique())

    @property
    def hollow(self) -> bool:
        """Whether some point is the mean of fewer losses than the others."""
        counts = self.basins.groupby(["parametrization", "width", "log2_lr"])["loss"].count()
        return bool(((counts > 0) & (counts < self.whole)).any())

    @property
    def _diverged(self) -> pd.Series:
        return self.basins["diverged"].fillna(False) | self.basins["loss"].isna()

    @property
    def _why_fewer(self) -> str:
        runs = self.basins.groupby(["parametrization", "width", "log2_lr"])["seed"].count()
        reasons = ["as some runs diverged"] if self._diverged.any() else []
        return " or ".join(reasons + (["as some are not done yet"] if (runs < self.whole).any() else []))

    @property
    def caption(self) -> str:
        """How to read the figure."""
        text = self._lines
        if self.hollow:
            text += (
                f" Hollow points are means over fewer than {self.whole} losses, {self._why_fewer}: do not compare them with "
                "the others."
            )
        return text if len(self.optima) else text + " No optimum is marked, as there is no verdict on these runs yet."

    @property
    def _lines(self) -> str:
        if self.optima.empty:
            text = "Each line is one width: the mean validation loss over the seeds that are done, with a band from the best "
            text += "seed to the worst."
            crosses = " × along the top are runs that diverged, one per seed, in their width's colour."
            return text + (crosses if self._diverged.any() else "")
        return (
            "Each line is one width: the mean validation loss over seeds, with a band from the best seed to the worst. "
            "× along the top are runs that diverged, one per seed, in their width's colour; the mean is over the others. "
            "Dots mark each width's fitted optimum, and the strip below shows it again with its 95% interval over seeds "
            "and its drift in octaves (factors of 2 in the learning rate) from the smallest width, whose optimum is the "
            "dotted line. A learning rate transfers when the dots stay on that line."
        )

    def draw(self) -> Figure:
        """Return the drawing."""
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


def _legend(colours: dict[int, str], hollow: bool, judged: bool, lost: bool) -> list[Line2D]:
    lines = [Line2D([], [], color=hue, linewidth=2.4, label=f"width {width}") for width, hue in colours.items()]
    dot = Line2D([], [], color=GREY, marker="o", markersize=7, linestyle="", label="optimum")
    cross = Line2D([], [], color=GREY, marker="x", markersize=5, linestyle="", label="diverged run")
    reference = Line2D([], [], color=GREY, linestyle=":", label=f"optimum of width {min(colours)}")
    ring = Line2D([], [], color=GREY, marker="o", markersize=4.5, mfc="white", linestyle="", label="fewer seeds")
    return [*lines, *([dot, reference] if judged else []), *([cross] if lost else []), *([ring] if hollow else [])]
