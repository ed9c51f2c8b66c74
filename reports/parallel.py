"""All hyperparameters of all trials at once, by Optuna: each trial a line, the loss its colour, clipped at the bad end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from optuna.distributions import FloatDistribution

from mutransfer.errors import RequestError
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.optuna_plots import plotted
from mutransfer.reports.study import as_losses, drawable, fence_of, hyperparameters, is_lost, search_space, study_of
from mutransfer.reports.style import ORDER, colour, literal, styled, value_axis
from mutransfer.reports.words import counted, number, plain

__all__ = ["ParallelFigure"]

MOST_AXES = 8
SHELF = 0.08  # of the loss axis, above what is shown: where diverged trials lie


@dataclass(frozen=True, eq=False)
class ParallelFigure(ReportFigure):
    """`optuna.visualization.matplotlib.plot_parallel_coordinate` of the complete trials and the diverged ones.

    Losses beyond Tukey's fence (the upper quartile and 1.5 times the quartiles' distance) are drawn at it: one bad trial
    would press all others into a line. Diverged trials lie on a shelf above.

    Raises:
        RequestError: the frame lacks a column, or fewer than two hyperparameters vary.
    """

    trials: pd.DataFrame
    maximize: bool = False
    title = "All hyperparameters at once"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", as_losses(drawable(self.trials), self.maximize))
        if len(hyperparameters(self.trials)) < 2:
            raise RequestError("one hyperparameter took more than one value, and lines between axes need at least two.")

    def frame(self) -> pd.DataFrame:
        """Return the trials: one row each (schema TRIALS, hyperparameters behind)."""
        return as_losses(self.trials, self.maximize)

    @property
    def names(self) -> list[str]:
        """The hyperparameters that are drawn, in the order of the axes."""
        return sorted(hyperparameters(self.trials))[:MOST_AXES]

    @property
    def clipped(self) -> tuple[pd.Series, float, int]:
        """Return the height of every trial that is drawn, the fence, and how many finite losses lie beyond it."""
        lost = is_lost(self.trials)
        values = self.trials["value"].where(self.trials["state"].eq("COMPLETE") & ~lost)
        fence, low = fence_of(values), float(values.min())
        shelf = fence + SHELF * ((fence - low) or abs(fence) or 1.0)
        return values.clip(upper=fence).mask(lost, shelf), fence, int((values > fence).sum())

    @property
    def caption(self) -> str:
        """How to read the figure, and what it leaves out."""
        _, fence, beyond = self.clipped
        text = (
            "Each line is one trial, from its loss on the left through the values that it tried; dark is good. Where dark "
            "lines cross an axis in a bundle, that value matters; where they spread over all of it, it does not."
        )
        if beyond:
            text += f" Drawn at the height of {number(fence)}: {counted(beyond, 'trial')} with a larger loss."
        if is_lost(self.trials).any():
            text += " Dashed lines from the top are trials that diverged or failed."
        hidden = len(hyperparameters(self.trials)) - len(self.names)
        return text + (f" In the CSV only: {counted(hidden, 'more hyperparameter')}." if hidden else "")

    def draw(self) -> Figure:
        """Return the drawing."""
        heights, fence, beyond = self.clipped
        space, gone = search_space(self.trials), is_lost(self.trials).any()
        # The best are drawn last, on top of the others.
        ranked = self.trials.assign(number=heights.rank(ascending=False, method="first", na_option="top").astype(int))
        with styled():
            figure = plotted("plot_parallel_coordinate", study_of(ranked, heights), params=self.names)
            main, bar, *others = figure.axes
            figure.set_size_inches(max(1.35 * len(self.names) + 2.4, 6.4), 3.9)
            main.set_title("")
            main.grid(visible=False)
            main.set_xticks(
                range(len(self.names) + 1),
                ["−metric" if self.maximize else "loss", *(plain(name, 18) for name in self.names)],
                rotation=0,
            )
            (lines,) = (found for found in main.collections if isinstance(found, LineCollection))
            _restyle(lines, fence)
            bottom = float(heights.min())
            ticks = [
                tick
                for tick in MaxNLocator(5).tick_values(bottom, fence)
                if bottom <= tick < fence - 0.06 * (fence - bottom)
            ]
            main.set_yticks(
                [*ticks, fence], [*map(number, ticks), ("≥\u00a0" if beyond else "") + number(float(f"{fence:.3g}"))]
            )
            if bottom < fence:
                bar.set_ylim(bottom, fence)
            bar.set_ylabel("negated metric" if self.maximize else "validation loss")
            for axes, name in zip(others, self.names, strict=True):
                axes.grid(visible=False)
                axes.spines["right"].set_visible(True)
                if isinstance(values := space[name], FloatDistribution):
                    value_axis(axes.yaxis, values.low, values.high, powers=name == "lr")
                else:
                    choices = [plain(label.get_text(), 14) for label in axes.get_yticklabels()]
                    axes.set_yticks(axes.get_yticks(), choices)
                    literal(axes.get_yticklabels())
                for label in axes.get_yticklabels():
                    label.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.6})
            literal(main.get_xticklabels())
            if gone:
                dashes = Line2D(
                    [], [], color=colour("sp"), linestyle=(0, (3, 2)), linewidth=1, label="diverged or failed"
                )
                figure.legend(handles=[dashes], loc="outside upper left")
        return figure


def _restyle(lines: LineCollection, fence: float) -> None:
    """Set colours by loss, dark for low and the best quarter strong; dashes in another colour for lines from the shelf."""
    starts = np.array([segment[0, 1] for segment in lines.get_segments()])
    lost = starts > fence
    best = starts <= np.quantile(starts[~lost], 0.25)
    crowd = min(1.0, 60 / len(starts))  # many lines have to be faint, or they hide each other
    shades = ORDER.reversed().with_extremes(over=colour("sp"))
    lines.set(cmap=shades, clim=(float(starts.min()), fence), gid="trials")
    lines.set_alpha(np.where(best, 0.6 + 0.3 * crowd, 0.25 + 0.5 * crowd).tolist())
    lines.set_linewidth(np.where(best, 1.4, 0.9).tolist())
    lines.set_linestyle([(0, (3, 2)) if gone else "-" for gone in lost])
