"""Rebuild an Optuna study from a trials frame, and draw Optuna's plots without pyplot."""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import matplotlib
import optuna
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from mutransfer.errors import FrameError
from mutransfer.schemas import TRIALS

__all__ = ["as_losses", "drawable", "fence_of", "hyperparameters", "is_lost", "plotted", "search_space", "study_of"]

# plot function → the module in which it looks up `plt`
HOMES = {
    "plot_slice": "optuna.visualization.matplotlib._slice",
    "plot_param_importances": "optuna.visualization.matplotlib._param_importances",
    "plot_parallel_coordinate": "optuna.visualization.matplotlib._parallel_coordinate",
}
_LOCK = threading.Lock()


class _Pyplot:
    """Replacement for the parts of pyplot that Optuna's plots use.

    The real pyplot would choose a backend for the whole process (that of a window system, if there is one) and keep a
    reference to every figure, and the plots would set the style "ggplot" for everything drawn afterwards.
    """

    def __init__(self) -> None:
        self.style = SimpleNamespace(use=lambda name: None)
        self.figure = Figure()

    def subplots(self, *shape: int, figsize: Any = None, **options: Any) -> tuple[Figure, Any]:
        self.figure = Figure(figsize=figsize, layout="constrained")
        FigureCanvasAgg(self.figure)  # bar labels are measured while they are drawn
        return self.figure, self.figure.subplots(*shape, **options)

    def get_cmap(self, name: str) -> Any:
        return matplotlib.colormaps[name]

    def xticks(self, ticks: Sequence[float], labels: Sequence[str], **style: Any) -> None:
        self.figure.axes[0].set_xticks(ticks, labels, **style)


def plotted(name: str, study: optuna.Study, **options: Any) -> Figure:
    """Return the figure that the function ``name`` of ``optuna.visualization.matplotlib`` draws of ``study``."""
    with _replaced_pyplot(_Pyplot(), HOMES[name]) as pyplot, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        getattr(optuna.visualization.matplotlib, name)(study, **options)
    return pyplot.figure


@contextlib.contextmanager
def _replaced_pyplot(pyplot: _Pyplot, home: str) -> Iterator[_Pyplot]:
    """Replace ``plt`` in Optuna's module ``home`` by ``pyplot``, in one thread at a time."""
    module: Any = importlib.import_module(home)
    with _LOCK:
        original, module.plt = module.plt, pyplot
        try:
            yield pyplot
        finally:
            module.plt = original


LOG_FROM = 3.0  # a positive hyperparameter that spans at least this factor gets a log axis
FEWEST = 2


def hyperparameters(trials: pd.DataFrame) -> list[str]:
    """Return the hyperparameter columns (those that are not in schema TRIALS) that took more than one value."""
    return [str(name) for name in trials.columns if name not in TRIALS.columns and trials[name].nunique() > 1]


def is_lost(trials: pd.DataFrame) -> pd.Series:
    """Return a mask of the trials that diverged or failed; they have no loss to compare and are drawn as crosses.

    An interrupted trial, which is retried under another number, counts as neither: it has no steps.
    """
    ended = trials["state"].isin(["COMPLETE", "PRUNED"])
    return (trials["state"].eq("FAIL") & trials["steps"].notna()) | (
        ended & (trials["diverged"].fillna(False) | trials["value"].isna())
    )


def drawable(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials (schema TRIALS) if there are enough to draw the search.

    Raises:
        FrameError: if a column is missing, no hyperparameter varies, or fewer than two trials ended with a loss.
    """
    trials = TRIALS.frame(trials)
    complete = int((trials["state"].eq("COMPLETE") & ~is_lost(trials)).sum())
    if complete < FEWEST or not hyperparameters(trials):
        raise FrameError(
            f"{complete} trials ended with a loss and {len(hyperparameters(trials))} hyperparameters took more than one value, "
            f"which is too few to compare (at least {FEWEST} and 1): run `mutransfer tune EXPERIMENT.yaml` to continue the "
            "search."
        )
    return trials


def fence_of(losses: pd.Series) -> float:
    """Return the largest of the ``losses`` to show: Tukey's fence, or the maximum if no loss is above the fence.

    The fence is the upper quartile plus 1.5 times the interquartile range. Without it one bad trial would compress all others
    into a line.
    """
    low, quarter, upper, high = losses.quantile([0, 0.25, 0.75, 1])
    fence = float(upper + 1.5 * (upper - quarter))
    return fence if low < fence < high else float(high)


def search_space(trials: pd.DataFrame) -> dict[str, BaseDistribution]:
    """Return a distribution per hyperparameter that spans the values of its trials.

    The ranges of the experiment are not in the frame: positive values that span a factor of 3 are taken as logarithmic, and
    values that are not numbers as categorical.
    """
    space: dict[str, BaseDistribution] = {}
    for name in hyperparameters(trials):
        values = _numbers(trials[name])
        if values is None:
            space[name] = CategoricalDistribution(sorted({str(value) for value in trials[name].dropna()}))
        else:
            low, high = float(values.min()), float(values.max())
            space[name] = FloatDistribution(low, high, log=low > 0 and high / low >= LOG_FROM)
    return space


def as_losses(trials: pd.DataFrame, maximize: bool) -> pd.DataFrame:
    """Return a copy of the trials with values to minimize: a metric to maximize is negated."""
    return trials.assign(value=-trials["value"]) if maximize else trials.copy()


def study_of(trials: pd.DataFrame, values: pd.Series) -> optuna.Study:
    """Return an in-memory study with the trials in the order of their numbers; those without a value in ``values`` are FAIL."""
    space = search_space(trials)
    columns: dict[str, Any] = {}
    for name in space:
        numbers = _numbers(trials[name])
        columns[name] = trials[name].astype("string") if numbers is None else numbers
    made = []
    for index in trials.sort_values("number").index:
        params = {name: column[index] for name, column in columns.items() if not pd.isna(column[index])}
        ended = not pd.isna(values[index])
        trial = optuna.trial.create_trial(
            state=TrialState.COMPLETE if ended else TrialState.FAIL,
            value=float(values[index]) if ended else None,
            params={name: value if isinstance(value, str) else float(value) for name, value in params.items()},
            distributions={name: space[name] for name in params},
        )
        made.append(trial)
    with _silent():
        study = optuna.create_study(direction="minimize")
        study.add_trials(made)
    return study


def _numbers(column: pd.Series) -> pd.Series | None:
    """Return the column as floats, or None if a value is not a number.

    The result is the same for a new frame and for one read from CSV.
    """
    numbers = pd.to_numeric(column.astype("string"), errors="coerce")
    return None if (numbers.isna() & column.notna()).any() else numbers.astype("float64")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep Optuna from logging the creation of the study, and restore the caller's verbosity afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
