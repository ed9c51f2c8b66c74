"""Optuna's Gaussian process, told of pruned trials as well, by the loss that they would have come to."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from .claims import FIXED

__all__ = ["GaussianProcess", "foreseen"]

# Of 2048 points at which Optuna looks before it climbs, which are two thirds of the time to ask beside trials that run.
LOOKED_AT = 512
ROUNDING = (
    1e-9  # of a value or its range: what two processors differ by is far below it, what a sweep tells apart far above
)


class GaussianProcess(optuna.samplers.GPSampler):
    """Expected improvement over a Gaussian process (Optuna's), beyond what is expected of trials that still run.

    Optuna's own passes over pruned trials and those that wait, and proposes them again and again.

    Args:
        start: trials drawn at random before a model is made of them.
        seed: of all that is drawn.
    """

    def __init__(self, start: int, seed: int) -> None:
        super().__init__(n_startup_trials=start, seed=seed)
        self._n_preliminary_samples = LOOKED_AT

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See optuna's BaseSampler; nothing, which is then drawn at random, where a trial is the very same."""
        values = super().sample_relative(_Foreseen(study), trial, search_space)  # type: ignore[arg-type]
        return {} if any(_same(values, taken, search_space) for taken in _taken(study, trial)) else values


def _taken(study: Study, asking: FrozenTrial) -> list[dict[str, Any]]:
    """Parameters of all others that have not failed: at an edge of the ranges the process may come to the same ones again."""
    others = (trial for trial in study.get_trials(deepcopy=False) if trial.state is not TrialState.FAIL)
    return [{**other.system_attrs.get(FIXED, {}), **other.params} for other in others if other.number != asking.number]


def _same(one: dict[str, Any], other: dict[str, Any], search_space: dict[str, BaseDistribution]) -> bool:
    """Whether the parameters are equal but for rounding: the end of a range is 1 on one machine and 1 - 2^-53 on another."""
    return one.keys() == other.keys() and all(
        math.isclose(
            value, other[name], rel_tol=ROUNDING, abs_tol=0 if ranged.log else ROUNDING * (ranged.high - ranged.low)
        )
        if isinstance(ranged := search_space[name], FloatDistribution)
        else value == other[name]
        for name, value in one.items()
    )


class _Foreseen:
    """A study in which pruned trials are complete."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = self._study._get_trials(deepcopy=False, use_cache=use_cache)
        trials = foreseen(trials, maximize=self._study.direction is StudyDirection.MAXIMIZE)
        return [trial for trial in trials if states is None or trial.state in states]


def foreseen(trials: Sequence[FrozenTrial], *, maximize: bool = False) -> list[FrozenTrial]:
    """Return the trials, the pruned ones as complete with the value that their last report lets expect.

    It is on the Theil-Sen line through what complete trials reported at that step and came to, which is all that is known of
    how losses go on, and at most the worst of these: how bad it would have been is of no use, and a wide range of values costs
    the process its resolution. A trial that was pruned and reported nothing is left as it is.
    """
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    values = [trial.value for trial in complete if trial.value is not None]
    worst = min(values, default=-np.inf) if maximize else max(values, default=np.inf)
    lines: dict[int, tuple[float, float]] = {}
    seen = []
    for trial in trials:
        step = trial.last_step
        if trial.state is TrialState.PRUNED and step is not None and np.isfinite(trial.intermediate_values[step]):
            if step not in lines:
                lines[step] = _line(step, complete)
            slope, rest = lines[step]
            trial = copy.copy(trial)
            ending = slope * trial.intermediate_values[step] + rest
            trial.state, trial.value = TrialState.COMPLETE, max(worst, ending) if maximize else min(worst, ending)
        seen.append(trial)
    return seen


def _line(step: int, complete: Sequence[FrozenTrial]) -> tuple[float, float]:
    """Return slope and intercept of final losses over those at ``step``."""
    known = [(each.intermediate_values[step], each.value) for each in complete if step in each.intermediate_values]
    there, final = np.array(known, dtype=float).reshape(-1, 2).T
    if len(np.unique(there)) < 3:
        return 1.0, float(np.median(final - there)) if len(there) else 0.0
    slope, rest, *_ = stats.theilslopes(final, there)
    return (float(slope), float(rest)) if slope > 0 else (1.0, float(np.median(final - there)))
