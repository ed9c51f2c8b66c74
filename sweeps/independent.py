"""Independent search: the learning rate first, then every other hyperparameter by itself, then the best of each together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

__all__ = ["Independent", "inside"]

POINT = "mutransfer:point"


class Independent(optuna.samplers.BaseSampler):
    """Line searches in turn (u-µP, 2407.17465, Figure 1a): as good as a joint search where couplings are weak.

    Of ``trials`` points the first is the recipe itself, the next a line over the learning rate, then a line over each other
    hyperparameter at the best learning rate, and the last the best value of each. A line is evenly spaced in its range's own
    scale, ends included. Further trials are lines through the best of all.

    Args:
        space: what is searched; the line over "lr", if it is there, comes first.
        defaults: value of each before it is known better; the middle of its range if it lies outside.
        trials: how many points to lay out.
    """

    def __init__(self, space: dict[str, BaseDistribution], defaults: dict[str, Any], trials: int) -> None:
        self._space = space
        self._defaults = {
            name: defaults[name] if inside(each, defaults[name]) else _on_line(each, 0.5)
            for name, each in space.items()
        }
        names = sorted(space, key=lambda name: name != "lr")  # stable: the others keep their order
        each = max(2, (trials - 2) // len(names))
        first = max(each, trials - 2 - each * (len(names) - 1))
        self._plan: list[tuple[int, str | None, float]] = [(0, None, 0.0)]
        for k, name in enumerate(names):
            count = each if k else first
            self._plan += [(1 if k == 0 else 2, name, i / (count - 1)) for i in range(count)]
        self._plan.append((3, None, 0.0))

    def waits(self, study: optuna.Study) -> bool:
        """Return whether the next point depends on trials that are still running."""
        taken = self._taken(study)
        phase = self._plan[self._next(taken)][0]
        return any(self._plan[i][0] < phase for i, trial in taken.items() if trial.state is TrialState.RUNNING)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space: see optuna's BaseSampler."""
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next point that no trial has taken; a failed trial's point is free again."""
        index = self._next(self._taken(study))
        study._storage.set_trial_system_attr(trial._trial_id, POINT, index)
        phase, name, place = self._plan[index]
        point = self._best(study, phase)
        return point if name is None else point | {name: _on_line(self._space[name], place)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the default of what is not in the space."""
        return self._defaults[param_name]

    def _taken(self, study: optuna.Study) -> dict[int, FrozenTrial]:
        taken = {}
        for trial in study.get_trials(deepcopy=False):
            # The recipe is not sampled but given.
            given = 0 if trial.system_attrs.get("fixed_params") == self._defaults else None
            point = trial.system_attrs.get(POINT, given)
            if point is not None and trial.state is not TrialState.FAIL:
                taken[point] = trial
        return taken

    def _next(self, taken: dict[int, FrozenTrial]) -> int:
        return next((i for i in range(len(self._plan)) if i not in taken), len(self._plan) - 1)

    def _best(self, study: optuna.Study, phase: int) -> dict[str, Any]:
        """Return the best value of each hyperparameter, of the lines of the phases before."""
        point = dict(self._defaults)
        values: dict[str, float] = {}
        for index, trial in sorted(self._taken(study).items()):
            before, name, _ = self._plan[index]
            if trial.state is not TrialState.COMPLETE or before >= phase or trial.value is None:
                continue
            # The recipe itself is a point on every line.
            for each in self._space if name is None else (name,):
                if each in trial.params and trial.value < values.get(each, math.inf):
                    values[each], point[each] = trial.value, trial.params[each]
        return point


def inside(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution holds ``value``; None is in no range."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return value is not None and distribution._contains(value)


def _on_line(distribution: BaseDistribution, place: float) -> Any:
    """Return the value at ``place`` of a range, 0 its low end and 1 its high end, in its own scale."""
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
