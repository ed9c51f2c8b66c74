"""Public wrappers around all private names of Optuna that this package uses.

Optuna may rename or remove them in any release: `tests/test_internals.py` shows which one broke, and pyproject.toml bounds the
Optuna version by the last one that these tests have passed with.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Container, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages import _CachedStorage as CachedStorage
from optuna.storages.journal._storage import JournalStorageReplayResult
from optuna.study import Study
from optuna.study._frozen import FrozenStudy as FrozenStudy
from optuna.trial import FrozenTrial, Trial, TrialState

__all__ = [
    "CachedStorage", "FrozenStudy", "InterruptibleJournalStorage", "StudyView", "close_database", "contains",
    "forget_cached_trials", "set_preliminary_samples", "storage_of", "study_id", "trial_id",
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


def set_preliminary_samples(sampler: GPSampler, count: int) -> None:
    """Set the number of points at which a GP sampler evaluates its acquisition function before the local search."""
    sampler._n_preliminary_samples = count


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
