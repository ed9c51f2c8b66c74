"""Public wrappers around all private names of Optuna that this package uses.

Optuna may rename or remove them in any release: `tests/test_internals.py` shows which one broke, and pyproject.toml bounds the
Optuna version by the last one that these tests have passed with.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
from optuna._gp.acqf import BaseAcquisitionFunc, LogEI, qLogEI
from optuna._gp.gp import GPRegressor, fit_kernel_params
from optuna._gp.search_space import SearchSpace
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler
from optuna.samplers._gp.sampler import _get_params, _standardize_values
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages import _CachedStorage as CachedStorage
from optuna.storages.journal._storage import JournalStorageReplayResult
from optuna.study import Study, StudyDirection
from optuna.study._frozen import FrozenStudy as FrozenStudy
from optuna.trial import FrozenTrial, Trial, TrialState

from mutransfer._torch_internals import without_function_modes

__all__ = [
    "BatchGPSampler", "CachedStorage", "FrozenStudy", "InterruptibleJournalStorage", "StudyView", "close_database", "contains",
    "forget_cached_trials", "storage_of", "study_id", "trial_id",
]  # fmt: skip


def storage_of(study: Study) -> BaseStorage:
    """Return the storage of a study."""
    return study._storage


def study_id(study: Study) -> int:
    """Return the ID of a study in its storage."""
    return study._study_id


def trial_id(trial: FrozenTrial | Trial) -> int:
    """Return the ID of a trial in its storage; ``trial.number`` is its number in the study."""
    return trial._trial_id


def forget_cached_trials(study: Study) -> None:
    """Clear the cached trials, as `Study.ask` does: the sampler then sees their current state."""
    study._thread_local.cached_all_trials = None


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution contains ``value``, given in its internal representation."""
    return distribution._contains(value)


class BatchGPSampler(GPSampler):
    """Optuna's Gaussian process sampler for batches of trials: one fit for each batch, and a faster search.

    The fit is used again until another trial is complete. Where Optuna maximizes the acquisition function by L-BFGS from a few
    points, which takes dozens of evaluations with gradients, this evaluates it at quasirandom points, and then near the best of
    them, at distances that shrink from round to round.

    Args:
        start: number of trials drawn at random before the model is fitted.
        seed: seed of all random draws.
        points: number of quasirandom points.
        radii: standard deviation of the distance in each round, in units of each hyperparameter's range.
        near: number of points in each round.
        kept: number of best points around which a round draws.
        fantasies: number of joint samples of the running trials' losses.
    """

    def __init__(
        self, start: int, seed: int, *, points: int, radii: Sequence[float], near: int, kept: int, fantasies: int
    ) -> None:
        super().__init__(n_startup_trials=start, seed=seed)
        self._points, self._radii, self._near, self._kept, self._fantasies = points, radii, near, kept, fantasies
        self._fit: tuple[np.ndarray, np.ndarray, GPRegressor] | None = None

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        # Optuna sets a default device around this, whose mode costs a fifth of the time.
        with without_function_modes():
            space = SearchSpace(search_space)
            known = space.get_normalized_params(completed_trials)
            sign = 1.0 if study.direction is StudyDirection.MAXIMIZE else -1.0
            heights = _standardize_values(sign * np.array([trial.values for trial in completed_trials]))[0][:, 0]
            model = self._fitted(known, heights, space.is_categorical)
            acquisition: BaseAcquisitionFunc
            if running_trials:
                running = space.get_normalized_params(running_trials, [_get_params(trial) for trial in running_trials])
                seed = self._rng.rng.randint(2**31)
                acquisition = qLogEI(model, space, heights.max(), self._fantasies, seed, running)
            else:
                acquisition = LogEI(model, space, heights.max())
            return space.get_unnormalized_param(self._maximized(acquisition, known[[np.argmax(heights)]]))

    def _fitted(self, known: np.ndarray, heights: np.ndarray, is_categorical: np.ndarray) -> GPRegressor:
        before = self._fit
        if before and np.array_equal(before[0], known) and np.array_equal(before[1], heights):
            return before[2]
        start = before[2] if before and before[0].shape[1] == known.shape[1] else None
        model = fit_kernel_params(
            known, heights, is_categorical, self._log_prior, self._minimum_noise, self._deterministic, start
        )
        self._fit = known, heights, model
        return model

    def _maximized(self, acquisition: BaseAcquisitionFunc, best: np.ndarray) -> np.ndarray:
        rng, ranges = self._rng.rng, acquisition.search_space.continuous_indices
        places = np.vstack([acquisition.search_space.sample_normalized_params(self._points, rng), best])
        values = acquisition.eval_acqf_no_grad(places)
        for radius in self._radii:
            near = places[np.argsort(values)[-self._kept :]][rng.randint(self._kept, size=self._near)]
            moved = near[:, ranges] + radius * rng.standard_normal((self._near, len(ranges)))
            near[:, ranges] = moved.clip(0, 1)
            places, values = np.vstack([places, near]), np.append(values, acquisition.eval_acqf_no_grad(near))
        chosen: np.ndarray = places[np.argmax(values)]
        return chosen


def close_database(storage: CachedStorage) -> None:
    """Close the sessions and connections of a database."""
    backend: RDBStorage = storage._backend
    backend.remove_session()
    backend.engine.dispose()


class StudyView:
    """View of a study that shows a sampler modified trials.

    Args:
        study: the study; everything but its trials is passed through.
        change: maps all trials to those that the sampler sees.
    """

    def __init__(self, study: Study, change: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]) -> None:
        self._study, self._change = study, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = self._change(self._study._get_trials(deepcopy=False, use_cache=use_cache))
        return [trial for trial in trials if states is None or trial.state in states]


class InterruptibleJournalStorage(JournalStorage):
    """Optuna's journal storage, with any backend, that tolerates a Ctrl-C at any moment.

    Optuna counts a line as read before it applies it. After an interruption in between, this process would continue without
    the content of that line, such as a trial's parameters. It therefore reads the whole journal again.
    """

    def _sync_with_backend(self) -> None:
        try:
            super()._sync_with_backend()
        except Exception:  # the requested operation was rejected; all lines before it have been applied
            raise
        except BaseException:
            # Use another worker ID: under the old one, operations that were rejected would raise again when they are read.
            self._worker_id_prefix = f"{uuid.uuid4()}-"
            self._replay_result = JournalStorageReplayResult(self._worker_id_prefix)
            raise
