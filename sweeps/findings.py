"""What a study has found: its trials, the best recipe, and what to be told about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from mutransfer.errors import RequestError
from mutransfer.recipe import Recipe

from .claims import FINISHED
from .experiment import Experiment, with_values
from .repeating import means
from .study import baseline

__all__ = ["Tuned", "at_edges", "best_so_far", "summary", "usable"]

EDGE = 0.03  # of a range, in its own scale: closer to an end than this is "at the edge"


@dataclass(frozen=True)
class Tuned:
    """What a study has found so far; ``value`` is the best's loss, a mean over seeds where it was repeated."""

    trials: pd.DataFrame
    best: Recipe
    value: float
    params: dict[str, Any]
    default: float | None
    seconds: float
    warnings: list[str] = field(default_factory=list)


def best_so_far(study: optuna.Study) -> str:
    """Return the best loss in words, or nothing before there is one."""
    values = [
        trial.value
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.value is not None
    ]
    if study.direction is optuna.study.StudyDirection.MAXIMIZE:
        return f"best metric {max(values):.4f}" if values else ""
    return f"best loss {min(values):.4f}" if values else ""


def usable(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials that did not diverge."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in complete if not trial.user_attrs.get("outcome", {}).get("diverged", False)]


def summary(
    experiment: Experiment, study: optuna.Study, frame: pd.DataFrame, again: pd.DataFrame | None, seconds: float
) -> Tuned:
    """Return what was found.

    Args:
        experiment: what was tuned.
        study: its study.
        frame: the study's trials (`trials_frame`).
        again: `schemas.REPEATS` of the best few; the best is then the one with the best mean over seeds.
        seconds: that it took.

    Raises:
        RequestError: no trial has a loss to choose by.
    """
    trials = usable(study)
    if not trials:
        finished = int(frame["state"].isin([state.name for state in FINISHED]).sum())
        if not finished:
            raise RequestError("the budget does not reach for one trial: raise it, or lower steps.")
        raise RequestError(
            f"all {finished} trials diverged or were pruned: lower search.lr in the experiment and use another --out."
        )
    losses = (
        {trial.number: float(trial.value or 0.0) for trial in trials}
        if again is None
        else means(trials, again, maximize=experiment.maximize)
    )
    best = study.get_trials(deepcopy=False)[
        max(losses, key=losses.__getitem__) if experiment.maximize else min(losses, key=losses.__getitem__)
    ]
    if math.isinf(losses[best.number]):
        raise RequestError(
            f"the best {len(losses)} trials all diverged with another seed: lower search.lr in the experiment and use "
            "another --out."
        )
    # Not simply the first: an interrupted trial is done again under another number.
    own = baseline(experiment)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = next((trial.number for trial in complete if trial.params == own), None)
    default = None if first is None else float(frame.loc[frame["number"] == first, "value"].iloc[0])
    return Tuned(
        frame, with_values(experiment.recipe, best.params), losses[best.number], best.params, default, seconds,
        [*_failed(study), *_unheard(experiment, study), *_at_edges(experiment, best.params)],
    )  # fmt: skip


def _failed(study: optuna.Study) -> list[str]:
    """Say how many trials gave no loss, and why the last did not."""
    outcomes = {trial.number: trial.user_attrs.get("outcome", {}) for trial in study.get_trials(deepcopy=False)}
    failed = [number for number, outcome in outcomes.items() if outcome.get("failed")]
    many = f"{len(failed)} trials" if len(failed) > 1 else "one trial"
    return [f"{many} failed, and others were done instead; trial {n}: {outcomes[n]['failed']}." for n in failed[-1:]]


def _unheard(experiment: Experiment, study: optuna.Study) -> list[str]:
    """An own trainer that counts in other units, or tells nothing, is never pruned: say so."""
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    if experiment.trainer is None or experiment.pruner == "none" or any(t.intermediate_values for t in finished):
        return []
    return [
        f"no trial reported a loss at or after step {experiment.rung_steps[0]}, the first rung of a run of steps: "
        f"{experiment.steps}, so none could be pruned: report while training, count as steps does, or set pruner: none."
    ]


def at_edges(experiment: Experiment, params: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """Return (name, value, "low" or "high") of every searched value that lies at an end of its range."""
    found = []
    for name, range_ in experiment.search.items():
        if range_.low is None or range_.high is None:
            continue
        value, low, high = (math.log(x) if range_.log else x for x in (params[name], range_.low, range_.high))
        place = (value - low) / (high - low)
        if place < EDGE or place > 1 - EDGE:
            found.append((name, params[name], "low" if place < EDGE else "high"))
    return found


def _at_edges(experiment: Experiment, params: dict[str, Any]) -> list[str]:
    return [
        f"the best {name} {value:.4g} is at the {end} end of its range: widen search.{name}.{end}."
        for name, value, end in at_edges(experiment, params)
    ]
