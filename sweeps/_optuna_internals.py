"""Every private name of Optuna that this package uses, under a public one, in one place.

Optuna may rename or remove them in any release: `tests/test_internals.py` says which one broke, and pyproject.toml bounds Optuna
by the last version that these tests have seen.
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
    """Return the storage that a study is kept in."""
    return study._storage


def study_id(study: Study) -> int:
    """Return a study's number in its storage."""
    return study._study_id


def trial_id(trial: FrozenTrial | Trial) -> int:
    """Return a trial's number in its storage; ``trial.number`` is its number in the study."""
    return trial._trial_id


def forget_cached_trials(study: Study) -> None:
    """Let the sampler see the trials as they are now, as `Study.ask` does."""
    study._thread_local.cached_all_trials = None


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a distribution can give ``value``, in its internal representation."""
    return distribution._contains(value)


def set_preliminary_samples(sampler: GPSampler, count: int) -> None:
    """Set at how many points a Gaussian process looks before it climbs."""
    sampler._n_preliminary_samples = count


def close_database(storage: CachedStorage) -> None:
    """End a database's sessions and connections."""
    backend: RDBStorage = storage._backend
    backend.remove_session()
    backend.engine.dispose()


class StudyView:
    """A study whose trials a sampler sees changed.

    Args:
        study: whose everything else it is.
        change: all trials → what the sampler sees.
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
    """Optuna's storage on a journal, whatever its backend, in which a Ctrl-C may arrive at any moment.

    Optuna counts a line as read before it applies it. After an interruption in between this process would go on without what
    the line says, such as a trial's parameters; so it reads the journal anew.
    """

    def _sync_with_backend(self) -> None:
        try:
            super()._sync_with_backend()
        except Exception:  # what was asked for is refused; all lines up to there are applied
            raise
        except BaseException:
            # Under another name, or what was refused would be refused again as it is read.
            self._worker_id_prefix = f"{uuid.uuid4()}-"
            self._replay_result = JournalStorageReplayResult(self._worker_id_prefix)
            raise
