"""Rebuild an Optuna study from a trials frame: its search space, its trials, and the importances of its hyperparameters."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

from mutransfer.errors import FrameError
from mutransfer.schemas import TRIALS

__all__ = [
    "as_losses", "drawable", "fence_of", "hyperparameters", "importances", "is_lost", "positions", "search_space", "study_of",
]  # fmt: skip

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


def positions(trials: pd.DataFrame, name: str) -> pd.Series:
    """Return where the values of one hyperparameter lie on an axis: numbers as they are, categories by their index.

    Categories are in the order of their distribution's choices (`search_space`); a missing value is NaN.
    """
    values, space = _numbers(trials[name]), search_space(trials)[name]
    if not isinstance(space, CategoricalDistribution):
        assert values is not None
        return values
    index = {str(choice): float(i) for i, choice in enumerate(space.choices)}
    return trials[name].map(lambda value: math.nan if pd.isna(value) else index[str(value)]).astype("float64")


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


def importances(study: optuna.Study) -> dict[str, float]:
    """Return the share of each hyperparameter in the sum of all importances, in descending order (PED-ANOVA, 2304.10255)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


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
