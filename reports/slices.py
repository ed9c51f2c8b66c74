"""Loss against each hyperparameter, by Optuna: where the good values lie, and where runs diverge."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution

from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.optuna_plots import plotted
from mutransfer.reports.study import as_losses, drawable, fence_of, hyperparameters, is_lost, search_space, study_of
from mutransfer.reports.style import INK, ORDER, colour, literal, log_loss, styled, value_axis
from mutransfer.reports.words import counted, plain

__all__ = ["SliceFigure"]

MOST_PANELS = 8
HEADROOM = 0.1  # of the height, for the crosses


@dataclass(frozen=True, eq=False)
class SliceFigure(ReportFigure):
    """`optuna.visualization.matplotlib.plot_slice` of the complete trials (schema TRIALS), with the diverged ones on top.

    Raises:
        RequestError: the frame lacks a column, or there is too little to compare.
    """

    trials: pd.DataFrame
    maximize: bool = False
    title = "Loss against each hyperparameter"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", as_losses(drawable(self.trials), self.maximize))

    def frame(self) -> pd.DataFrame:
        """Return the trials: one row each (schema TRIALS, hyperparameters behind)."""
        return as_losses(self.trials, self.maximize)

    @property
    def names(self) -> list[str]:
        """The hyperparameters that are drawn, in the order of the panels."""
        return sorted(hyperparameters(self.trials))[:MOST_PANELS]

    @property
    def caption(self) -> str:
        """How to read the figure, and what it leaves out."""
        pruned = int((self.trials["state"].eq("PRUNED") & ~is_lost(self.trials)).sum())
        text = (
            "Each dot is one complete trial, the later the darker; the ring is the best. × along the top are trials that "
            "diverged or failed, at the value that they tried; triangles below them had a loss off the scale. All other "
            "hyperparameters vary as well, so what counts is the lower edge of the cloud: a bottom inside the range is an "
            "optimum, one at its end asks for a wider range."
        )
        text += f" Not drawn: {counted(pruned, 'pruned trial')}." if pruned else ""
        hidden = len(hyperparameters(self.trials)) - len(self.names)
        return text + (f" In the CSV only: {counted(hidden, 'more hyperparameter')}." if hidden else "")

    def draw(self) -> Figure:
        """Return the drawing."""
        lost = is_lost(self.trials)
        values = self.trials["value"].where(self.trials["state"].eq("COMPLETE") & ~lost)
        shown = self.trials[
            [column for column in self.trials if column not in hyperparameters(self.trials)] + self.names
        ]
        fence, count = fence_of(values), len(self.names)
        study = study_of(shown, values.where(values <= fence))
        with styled():
            figure = plotted("plot_slice", study, target_name="negated metric" if self.maximize else "validation loss")
            figure.set_size_inches(max(2.0 * count + 1.2, 5.6), 3.3)
            figure.suptitle("")
            *panels, bar = figure.axes
            bar.set_ylabel("trial")
            _height(panels[0], values[values <= fence])
            beyond = self.trials[values > fence]
            best = self.trials.loc[values.idxmin()]
            for axes, name in zip(panels, self.names, strict=True):
                self._panel(axes, name, best)
                self._on_top(axes, name, self.trials[lost], "x", 1 - 0.4 * HEADROOM, "lost")
                self._on_top(axes, name, beyond, "^", 1 - 0.9 * HEADROOM, "beyond")
        return figure

    def _panel(self, axes: Axes, name: str, best: pd.Series) -> None:
        """Restyle one of Optuna's panels, and mark the best trial in it."""
        axes.collections[0].set(cmap=ORDER, sizes=[20], edgecolor="white", linewidth=0.4, alpha=0.9, gid="complete")
        axes.set_title("")
        axes.set_xlabel(plain(name, 22), parse_math=False)
        space = search_space(self.trials)[name]
        if isinstance(space, CategoricalDistribution):
            axes.set_xticks(_places(axes, space.choices), [plain(str(choice), 12) for choice in space.choices])
            axes.set_xlim(-0.6, len(space.choices) - 0.4)
            literal(axes.get_xticklabels())
        elif isinstance(space, FloatDistribution):
            value_axis(axes.xaxis, space.low, space.high, powers=name == "lr")
            pad = 0.05 * (math.log(space.high / space.low) if space.log else space.high - space.low)
            factor = math.exp(pad)
            axes.set_xlim(
                *((space.low / factor, space.high * factor) if space.log else (space.low - pad, space.high + pad))
            )
        at = _places(axes, [best[name]])
        axes.plot(at, [best["value"]] * len(at), "o", markersize=10, mfc="none", color=INK, gid="best")

    def _on_top(self, axes: Axes, name: str, trials: pd.DataFrame, mark: str, height: float, gid: str) -> None:
        """Mark trials that have no place at their loss, at ``height`` (a fraction of the panel)."""
        x = _places(axes, trials[name])
        style: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "color": colour("sp"), "markersize": 4.5}
        axes.plot(x, [height] * len(x), mark, mfc="none", gid=gid, **style)


def _height(axes: Axes, values: pd.Series) -> None:
    """Set the y axis around the losses that are shown, with room on top for what has no place there."""
    low, high = float(values.min()), float(values.max())
    if log_loss(axes, values, ratio=2.5):
        axes.set_ylim(low / (high / low) ** 0.07, high * (high / low) ** (0.04 + 1.3 * HEADROOM))
    else:
        span = high - low or abs(high) or 1.0
        axes.set_ylim(low - 0.07 * span, high + (0.04 + 1.3 * HEADROOM) * span)


def _places(axes: Axes, values: Iterable[Any]) -> list[float]:
    """Where values lie on the x axis: Optuna writes categories as their ``repr``, and a new one gets the next place."""
    there = [value for value in values if not pd.isna(value)]
    if not axes.xaxis.have_units():
        return [float(value) for value in there]
    return [float(axes.xaxis.convert_units(repr(str(value)))) for value in there]
