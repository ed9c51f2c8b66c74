"""The sampler of a sweep that names none: what learns most from few trials, and stays fast with many."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from .gaussian import GaussianProcess

__all__ = ["FEW", "START", "Auto", "tpe"]

# A Gaussian process takes 0.05 s to ask after 200 trials, 0.3 s after 800, and in the end the cube of their number.
FEW = 250
START = 8  # trials drawn at random before a model is made of them


def tpe(seed: int) -> BaseSampler:
    """Return Optuna's tree-structured Parzen estimator, joint over hyperparameters, which keeps away from what still runs."""
    return optuna.samplers.TPESampler(n_startup_trials=START, multivariate=True, constant_liar=True, seed=seed)


class Auto(BaseSampler):
    """A Gaussian process for a study's first `FEW` trials, TPE from then on.

    A batch that is asked for at once is where they differ most: see docs/throughput.md.
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
