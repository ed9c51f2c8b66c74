"""Samplers: the automatic choice, Optuna's Gaussian process with the results of pruned trials, and independent search.

Independent search tunes the learning rate first, then each other hyperparameter separately, then combines the best values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from mutransfer.devices import limited_threads

from ._optuna_internals import BatchGPSampler, StudyView, contains
from .workers import FIXED, REPEATS, origin, valid_trials

__all__ = [
    "Auto", "FEW", "GaussianProcess", "Independent", "Quasirandom", "Random", "START", "Sampler", "foreseen", "inside", "tpe",
]  # fmt: skip

# How the acquisition function is maximized (see BatchGPSampler). Optuna's own way, 2048 points, 128 fantasies and L-BFGS from
# ten points, takes 0.1 s a trial in a batch of 16: several times what training a short trial takes there.
SEARCH: Any = {"points": 256, "radii": (0.1, 0.03, 0.01), "near": 64, "kept": 8, "fantasies": 32}
ROUNDING = (
    1e-9  # relative to a value or its range: far above differences between processors, far below any that matter here
)


class Sampler(BaseSampler):
    """Optuna sampler of a sweep, which may have to wait for results before the next trial."""

    def waits(self, study: Study) -> bool:
        """Return whether the next new trial depends on trials that are not finished yet."""
        return False


class GaussianProcess(BatchGPSampler, Sampler):
    """Optuna's Gaussian process sampler (expected improvement) that also uses pruned trials and avoids running ones.

    Optuna's own sampler ignores pruned and waiting trials, and proposes their points again and again.

    Args:
        start: number of trials drawn at random before the model is fitted.
        seed: seed of all random draws.
    """

    def __init__(self, start: int, seed: int) -> None:
        super().__init__(start, seed, **SEARCH)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See optuna's BaseSampler; return nothing if another trial has the same values, which are then drawn at random."""
        maximize = study.direction is StudyDirection.MAXIMIZE
        view: Any = StudyView(study, lambda trials: foreseen(trials, maximize=maximize))
        with limited_threads(1):  # the tensors are small, and the other threads belong to training
            values = super().sample_relative(view, trial, search_space)
        return {} if any(_same(values, taken, search_space) for taken in _taken(study, trial)) else values


def _taken(study: Study, asking: FrozenTrial) -> list[dict[str, Any]]:
    """Return the parameters of all other trials that have not failed: the process may repeat a point at an edge of the ranges."""
    others = (trial for trial in study.get_trials(deepcopy=False) if trial.state is not TrialState.FAIL)
    return [{**other.system_attrs.get(FIXED, {}), **other.params} for other in others if other.number != asking.number]


def _same(one: dict[str, Any], other: dict[str, Any], search_space: dict[str, BaseDistribution]) -> bool:
    """Return whether the parameters are equal up to rounding: a range's end is 1 on one machine and 1 - 2^-53 on another."""
    return one.keys() == other.keys() and all(
        math.isclose(
            value, other[name], rel_tol=ROUNDING, abs_tol=0 if ranged.log else ROUNDING * (ranged.high - ranged.low)
        )
        if isinstance(ranged := search_space[name], FloatDistribution)
        else value == other[name]
        for name, value in one.items()
    )


def foreseen(trials: Sequence[FrozenTrial], *, maximize: bool = False) -> list[FrozenTrial]:
    """Return the trials with pruned ones marked as complete, with the final value predicted from their last report.

    The prediction is a Theil-Sen line fitted to the complete trials, from their report at that step to their final value. It is
    capped at the worst final value: exactly how bad a pruned trial would have been does not matter, and a wide range of values
    reduces the resolution of the process. A pruned trial without a report is left unchanged.
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
    """Return slope and intercept of the line from the losses at ``step`` to the final losses."""
    known = [(each.intermediate_values[step], each.value) for each in complete if step in each.intermediate_values]
    at_step, final = np.array(known, dtype=float).reshape(-1, 2).T
    if len(np.unique(at_step)) < 3:
        return 1.0, float(np.median(final - at_step)) if len(at_step) else 0.0
    slope, rest, *_ = stats.theilslopes(final, at_step)
    return (float(slope), float(rest)) if slope > 0 else (1.0, float(np.median(final - at_step)))


# A fit of the Gaussian process takes 0.05 s with 200 trials, and eventually grows as the cube of their number.
FEW = 250
START = 8  # trials drawn at random before a model is fitted


class _Parzen(optuna.samplers.TPESampler, Sampler):
    pass


class Random(optuna.samplers.RandomSampler, Sampler):
    """Optuna's random sampler."""


class Quasirandom(optuna.samplers.QMCSampler, Sampler):
    """Optuna's quasi-Monte Carlo sampler."""


def tpe(seed: int) -> Sampler:
    """Return Optuna's tree-structured Parzen estimator, multivariate, with a constant liar that avoids running trials."""
    return _Parzen(n_startup_trials=START, multivariate=True, constant_liar=True, seed=seed)


class Auto(Sampler):
    """Sampler that uses a Gaussian process for a study's first `FEW` trials, and TPE from then on.

    The two differ most for a batch of trials that is suggested at once: see docs/explanation/throughput.md.
    """

    def __init__(self, seed: int) -> None:
        self._few, self._many = GaussianProcess(START, seed), tpe(seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        return self._few if trial.number < FEW else self._many

    def reseed_rng(self) -> None:
        """See BaseSampler."""
        self._few.reseed_rng()
        self._many.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See BaseSampler."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See BaseSampler."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)


LAST = 3  # the phase that combines the best values


class _Point(NamedTuple):
    """A position, 0 to 1, on the line over ``name``, or the best values so far if that is None; depends on earlier phases."""

    phase: int
    name: str | None = None
    place: float = 0.0


class Independent(Sampler):
    """Sampler of successive line searches (u-µP, 2407.17465, Figure 1a): as good as a joint search if couplings are weak.

    The first of ``trials`` points is the recipe itself. A line over the learning rate follows, then a line over each other
    hyperparameter at the best learning rate. The last point combines the best value of each. The points of a line are evenly
    spaced, on a log scale for a logarithmic range, and include both ends. Further trials fill in lines through the best trial.

    Args:
        space: the search space; the line over "lr" comes first if it is searched.
        defaults: initial value of each hyperparameter; the middle of its range is used if the value lies outside.
        trials: number of points to plan.
    """

    def __init__(self, space: dict[str, BaseDistribution], defaults: dict[str, Any], trials: int) -> None:
        self._space = space
        self._defaults = {
            name: defaults[name] if inside(each, defaults[name]) else _on_line(each, 0.5)
            for name, each in space.items()
        }
        names = sorted(space, key=lambda name: name != "lr")  # stable: the others keep their order
        counts = _counts(names, space, trials - 2)
        self._plan = [_Point(0)]
        for k, name in enumerate(names):
            last = max(1, counts[name] - 1)
            self._plan += [_Point(2 if k else 1, name, i / last) for i in range(counts[name])]
        self._plan.append(_Point(LAST))
        self._ranges = [name for name in names if isinstance(space[name], FloatDistribution)] or names

    def waits(self, study: optuna.Study) -> bool:
        """See Sampler."""
        trials = study.get_trials(deepcopy=False)
        phase = self._point(sum(_is_own(trial) for trial in trials)).phase
        return any(
            self._point(index).phase < min(phase, LAST)
            for index, trial in self._holders(trials).items()
            if not trial.state.is_finished()
        )

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole search space; see optuna's BaseSampler."""
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the point assigned to ``trial`` by its number; a retry already has its parameters."""
        trials = study.get_trials(deepcopy=False)
        point = self._point(_index(origin(trial, trials), trials))
        values = self._best(trials, point.phase, study.direction is optuna.study.StudyDirection.MAXIMIZE)
        return values if point.name is None else values | {point.name: _on_line(self._space[point.name], point.place)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the default of a hyperparameter that is not in the search space."""
        return self._defaults[param_name]

    def _point(self, index: int) -> _Point:
        if index < len(self._plan):
            return self._plan[index]
        more, name = divmod(index - len(self._plan), len(self._ranges))
        return _Point(LAST + 1, self._ranges[name], _between(more + 1))

    def _holders(self, trials: list[FrozenTrial]) -> dict[int, FrozenTrial]:
        """Return the trial of each point, by the point's index."""
        return {_index(origin(trial, trials), trials): trial for trial in valid_trials(trials)}

    def _best(self, trials: list[FrozenTrial], phase: int, maximize: bool) -> dict[str, Any]:
        """Return the best value of each hyperparameter on the lines of earlier phases; after the last phase, the best trial's."""
        values, point = dict[str, float](), dict(self._defaults)
        sign = -1 if maximize else 1
        for index, trial in sorted(self._holders(trials).items()):
            before = self._point(index)
            if trial.state is not TrialState.COMPLETE or before.phase >= phase or trial.value is None:
                continue
            # The recipe itself is a point on every line.
            names = list(self._space) if before.name is None or phase > LAST else [before.name]
            value = sign * trial.value
            if phase > LAST and value >= min(values.values(), default=math.inf):
                continue
            for each in names:
                if each in trial.params and value < values.get(each, math.inf):
                    values[each], point[each] = value, trial.params[each]
        return point


def _counts(names: list[str], space: dict[str, BaseDistribution], points: int) -> dict[str, int]:
    """Distribute ``points`` over the lines: one per choice, equally many per range, and the remainder to the first range."""
    even = max(2, points // len(names))
    choices = {name: each.choices for name, each in space.items() if isinstance(each, CategoricalDistribution)}
    counts = {name: min(even, len(each)) for name, each in choices.items()}
    ranges = [name for name in names if name not in choices]
    left = points - sum(counts.values())
    for name in ranges:
        counts[name] = max(2, left // len(ranges))
    if ranges:
        counts[ranges[0]] += max(0, points - sum(counts.values()))
    return counts


def _is_own(trial: FrozenTrial) -> bool:
    """Return whether a trial has a point of its own; retries and trials enqueued by a user have none."""
    enqueued = "fixed_params" in trial.system_attrs and trial.number > 0
    return REPEATS not in trial.system_attrs and not enqueued


def _index(trial: FrozenTrial, trials: list[FrozenTrial]) -> int:
    """Return the index of the trial's point: the number of earlier trials that have one, constant and equal for all workers."""
    return sum(_is_own(other) for other in trials[: trial.number])


def _between(number: int) -> float:
    """Return term ``number`` (from 1) of the van der Corput sequence 1/2, 1/4, 3/4, 1/8, …, which fills 0 to 1 evenly."""
    place, share = 0.0, 0.5
    while number:
        number, bit = divmod(number, 2)
        place, share = place + bit * share, share / 2
    return place


def inside(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution contains ``value``; no range contains None."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return value is not None and contains(distribution, value)


def _on_line(distribution: BaseDistribution, place: float) -> Any:
    """Return the value at ``place`` in a range, from 0 (low end) to 1 (high end), on a log scale if the range is logarithmic."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[round(place * (len(distribution.choices) - 1))]
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if place in (0.0, 1.0):
        return high if place else low
    return (
        float(np.exp((1 - place) * np.log(low) + place * np.log(high)))
        if distribution.log
        else low + place * (high - low)
    )
