"""Which hyperparameters matter, by Optuna: how differently their values are spread among the best trials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

from mutransfer.errors import RequestError
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.optuna_plots import plotted
from mutransfer.reports.study import as_losses, drawable, hyperparameters, is_lost, study_of
from mutransfer.reports.style import colour, literal, styled
from mutransfer.reports.words import plain

__all__ = ["ImportanceFigure"]

FEWEST = 20  # complete trials: the best tenth has to be more than one


@dataclass(frozen=True, eq=False)
class ImportanceFigure(ReportFigure):
    """`optuna.visualization.matplotlib.plot_param_importances` of the trials (schema TRIALS) that ended with a loss.

    Optuna's default evaluator, PED-ANOVA (2304.10255). It knows no diverged trials: those are counted in the caption.

    Raises:
        RequestError: the frame lacks a column, or there are too few trials or hyperparameters to rank.
    """

    trials: pd.DataFrame
    maximize: bool = False
    title = "Importance of the hyperparameters"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", as_losses(drawable(self.trials), self.maximize))
        losses, count = self.trials["value"][self._complete], len(hyperparameters(self.trials))
        if len(losses) < FEWEST or count < 2 or losses.nunique() < 2:
            raise RequestError(
                f"{len(losses)} complete trials with {losses.nunique()} different losses over {count} hyperparameters tell no "
                f"importances (at least {FEWEST}, 2 and 2): run `mutransfer tune EXPERIMENT.yaml` on."
            )

    @property
    def _complete(self) -> pd.Series:
        return self.trials["state"].eq("COMPLETE") & ~is_lost(self.trials)

    def frame(self) -> pd.DataFrame:
        """Return the trials: one row each (schema TRIALS, hyperparameters behind)."""
        return as_losses(self.trials, self.maximize)

    @property
    def caption(self) -> str:
        """How to read the figure."""
        lost = int(is_lost(self.trials).sum())
        return (
            "How much more tightly a hyperparameter's values lie among the best tenth of the trials than among all, as a "
            f"share of the sum (PED-ANOVA, Optuna's default), over {self._complete.sum()} complete trials"
            + (f"; {lost} that diverged or failed are not in it, see the crosses above" if lost else "")
            + ". A guide to what to search next and not a measurement: with fewer than a hundred trials the order of "
            "neighbours is chance, and a hyperparameter whose whole range is good looks unimportant."
        )

    def draw(self) -> Figure:
        """Return the drawing."""
        study = study_of(self.trials, self.trials["value"].where(self._complete))
        with styled():
            figure = plotted("plot_param_importances", study)
            (axes,) = figure.axes
            figure.set_size_inches(6.4, 0.9 + 0.3 * len(axes.patches))
            axes.set(title="", xlabel="share of the importance", ylabel="")
            axes.set_title("", loc="left")
            if legend := axes.get_legend():
                legend.remove()
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            bars: list[Any] = list(axes.patches)
            for bar in bars:
                bar.set(color=colour("mup"), height=0.62)
            for label in axes.texts:
                _beside(label)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlim(0, 1.12 * max(bar.get_width() for bar in bars))
            axes.set_yticks(axes.get_yticks(), [plain(label.get_text()) for label in axes.get_yticklabels()])
            literal(axes.get_yticklabels())
        return figure


def _beside(label: Text) -> None:
    """Set a bar's number a little off the bar's end, as a percentage."""
    share = label.get_text()
    text = f"{float(share):.0%}" if share[:1].isdigit() else "under 1%"
    label.set(text=f" {text}", fontsize=8.5)
