"""The Optuna study behind a trials frame, rebuilt from the frame alone, and Optuna's own plots drawn on a given figure."""

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

from mutransfer.errors import RequestError
from mutransfer.schemas import TRIALS

__all__ = ["drawable", "fence_of", "hyperparameters", "is_lost", "plotted", "search_space", "study_of"]

# Where each plot finds its `plt`.
HOMES = {
    "plot_slice": "optuna.visualization.matplotlib._slice",
    "plot_param_importances": "optuna.visualization.matplotlib._param_importances",
    "plot_parallel_coordinate": "optuna.visualization.matplotlib._parallel_coordinate",
}
_LOCK = threading.Lock()


class _Pyplot:
    """The little of pyplot that Optuna's plots use.

    pyplot itself would choose a backend for the whole process (a window system's, where there is one) and keep every
    figure; and the plots would set the style "ggplot" for everything drawn afterwards.
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
    """Return what ``optuna.visualization.matplotlib``'s function ``name`` draws of ``study``, on a figure of its own."""
    with _on(_Pyplot(), HOMES[name]) as pyplot, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        getattr(optuna.visualization.matplotlib, name)(study, **options)
    return pyplot.figure


@contextlib.contextmanager
def _on(pyplot: _Pyplot, home: str) -> Iterator[_Pyplot]:
    """Let one of Optuna's modules draw on ``pyplot``, one thread at a time."""
    module: Any = importlib.import_module(home)
    with _LOCK:
        theirs, module.plt = module.plt, pyplot
        try:
            yield pyplot
        finally:
            module.plt = theirs


LOG_FROM = 3.0  # a positive hyperparameter that spans this factor is one of which the logarithm matters
FEWEST = 2


def hyperparameters(trials: pd.DataFrame) -> list[str]:
    """Return the hyperparameters' columns, those behind the named ones, that took more than one value."""
    return [str(name) for name in trials.columns if name not in TRIALS.columns and trials[name].nunique() > 1]


def is_lost(trials: pd.DataFrame) -> pd.Series:
    """Return which trials diverged or failed: they have no loss to compare, and are drawn as crosses.

    An interrupted trial, which is done again under another number, has neither: it did no step.
    """
    ended = trials["state"].isin(["COMPLETE", "PRUNED"])
    return (trials["state"].eq("FAIL") & trials["steps"].notna()) | (
        ended & (trials["diverged"].fillna(False) | trials["value"].isna())
    )


def drawable(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials (schema TRIALS) if they are enough for a picture of the search.

    Raises:
        RequestError: a column is missing, no hyperparameter varies, or fewer than two trials ended with a loss.
    """
    trials = TRIALS.frame(trials)
    complete = int((trials["state"].eq("COMPLETE") & ~is_lost(trials)).sum())
    if complete < FEWEST or not hyperparameters(trials):
        raise RequestError(
            f"{complete} trials ended with a loss and {len(hyperparameters(trials))} hyperparameters took more than one value, "
            f"which is too few to compare (at least {FEWEST} and 1): run `mutransfer tune EXPERIMENT.yaml` on."
        )
    return trials


def fence_of(losses: pd.Series) -> float:
    """Return the loss up to which a picture shows ``losses``: Tukey's fence, or the largest where all lie within it.

    The fence is the upper quartile and 1.5 times the quartiles' distance; without it one bad trial presses all others into
    a line.
    """
    low, quarter, upper, high = losses.quantile([0, 0.25, 0.75, 1])
    fence = float(upper + 1.5 * (upper - quarter))
    return fence if low < fence < high else float(high)


def search_space(trials: pd.DataFrame) -> dict[str, BaseDistribution]:
    """Return a distribution per hyperparameter, as wide as its trials.

    The experiment's own ranges are not in the frame: what is positive and spans a factor of 3 is taken as logarithmic, and
    what is no number as categorical.
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
    """Return a copy of the trials with values of which less is better: a metric to be maximized is negated."""
    return trials.assign(value=-trials["value"]) if maximize else trials.copy()


def study_of(trials: pd.DataFrame, values: pd.Series) -> optuna.Study:
    """Return a study in memory with every trial under its own number; those without a value in ``values`` have failed."""
    space = search_space(trials)
    columns: dict[str, Any] = {}
    for name in space:
        numbers = _numbers(trials[name])
        columns[name] = trials[name].astype("string") if numbers is None else numbers
    made = []
    for index in trials.sort_values("number").index:
        there = {name: column[index] for name, column in columns.items() if not pd.isna(column[index])}
        ended = not pd.isna(values[index])
        trial = optuna.trial.create_trial(
            state=TrialState.COMPLETE if ended else TrialState.FAIL,
            value=float(values[index]) if ended else None,
            params={name: value if isinstance(value, str) else float(value) for name, value in there.items()},
            distributions={name: space[name] for name in there},
        )
        made.append(trial)
    with _silent():
        study = optuna.create_study(direction="minimize")
        study.add_trials(made)
    return study


def _numbers(column: pd.Series) -> pd.Series | None:
    """The column as floats, if that is what it holds; read back from CSV or fresh, the answer is the same."""
    numbers = pd.to_numeric(column.astype("string"), errors="coerce")
    return None if (numbers.isna() & column.notna()).any() else numbers.astype("float64")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep Optuna from announcing the study; the caller's verbosity comes back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
