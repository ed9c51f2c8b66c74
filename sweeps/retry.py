"""Storage that retries while its server is unavailable, and the classification of driver errors as transient."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, Generic, TypeVar

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mutransfer.errors import StorageError, describe
from mutransfer.io import masked

from ._optuna_internals import FrozenStudy

__all__ = ["RetryingStorage", "made_by_others", "outage"]

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=BaseStorage)

# PostgreSQL: classes 08 (connection) and 57P (shutting down, starting up), too many connections; conflicting transactions, one of
# which has to be retried.
SQL_STATES = ("08", "57P", "53300", "40001", "40P01")
# MySQL: cannot connect, gone away, lost during a query, shutting down, too many connections; deadlock, lock timeout.
MYSQL_CODES = {2002, 2003, 2006, 2013, 2055, 1053, 1040, 1213, 1205}
# A row, a table or a type already exists (PostgreSQL and MySQL).
THERE = {"23505", "42P07", "42710", 1050, 1062}


def outage(error: BaseException) -> str | None:
    """Return a description of ``error`` if it means that the server is currently unavailable; None for any other error."""
    seen: BaseException | None = error
    while seen is not None:
        if _is_outage(seen):
            return describe(getattr(seen, "orig", None) or seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def made_by_others(error: BaseException) -> bool:
    """Return whether ``error``, raised on opening a database, means that another worker has just created the same tables."""
    driver = getattr(error, "orig", None)
    return _state(driver) in THERE or next(iter(getattr(driver, "args", ())), None) in THERE


def _is_outage(error: BaseException) -> bool:
    # Compare by name, since a driver that is not in use need not be installed.
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if "sqlalchemy.DBAPIError" in kinds:
        return _database_is_away(error)
    if "grpc.RpcError" in kinds:
        # Optuna's proxy returns UNKNOWN if its own database is unavailable.
        code = getattr(error, "code", lambda: None)()
        return getattr(code, "name", "") in {"UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED"}
    return bool(
        kinds & {"redis.ConnectionError", "redis.TimeoutError", "builtins.ConnectionError", "builtins.TimeoutError"}
    )


def _database_is_away(error: BaseException) -> bool:
    if getattr(error, "connection_invalidated", False):
        return True
    driver = getattr(error, "orig", None)
    module = type(driver).__module__.partition(".")[0]
    if module == "sqlite3" or "OperationalError" not in {kind.__name__ for kind in type(driver).__mro__}:
        return False
    state = _state(driver)
    if module in {"psycopg", "psycopg2"}:
        return state is None or str(state).startswith(SQL_STATES)  # without a state, it never reached a server
    code, *_ = getattr(driver, "args", ()) or (None,)
    return code in MYSQL_CODES


def _state(driver: BaseException | None) -> str | None:
    return getattr(driver, "sqlstate", None) or getattr(driver, "pgcode", None)


LONGEST = 600.0  # seconds for which a server may be unavailable
SLEEPS = (0.1, 0.3, 1.0, 2.0)  # seconds between attempts; the last value repeats
SAY_EVERY = 15.0  # seconds between log lines
HURRY = 2.0  # seconds for which to wait after `hurry`


class RetryingStorage(BaseStorage, Generic[S]):
    """Optuna storage that waits while its server is down, restarting or out of connections.

    An answer may be lost after the server has executed a request, so repeating a request must be safe. Attributes, parameters
    and reports are set to the values they already have. A result recorded twice counts once. If a trial is created twice, no
    worker knows one of the two, and `workers.TrialQueue` requeues it.

    Args:
        open_: opens the storage.
        where: its address, for messages.
        reopen: whether to open the storage again during an outage. A gRPC channel would wait up to two minutes before it tries
            again; a database reconnects on its own and should keep its cache.
        longest: seconds after which waiting ends with a `StorageError`.
    """

    def __init__(self, open_: Callable[[], S], where: str, *, reopen: bool = False, longest: float = LONGEST) -> None:
        self._open, self._where, self._reopens, self._longest = open_, where, reopen, longest
        self._storage = open_()
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._last_logged = 0.0
        self._studies: set[int] = set()

    def _ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        begun = time.monotonic()
        attempt = 0
        while True:
            storage = self._storage
            try:
                answer = getattr(storage, name)(*arguments, **named)
            except UpdateFinishedTrialError:
                if name == "set_trial_state_values" and attempt and self._already_recorded(*arguments, **named):
                    return True
                raise
            except Exception as error:
                reason = outage(error)
                if reason is None:
                    raise
                if time.monotonic() - begun > self._longest:
                    raise StorageError(
                        f"the storage {masked(self._where)} has not answered for {self._longest:.0f} s ({masked(reason)}): "
                        "start it and run the same command again; finished trials are kept."
                    ) from error
                self._log_outage(reason)
                time.sleep(SLEEPS[min(attempt, len(SLEEPS) - 1)])
                attempt += 1
                self._reopen(storage)
            else:
                self._log_recovery()
                return answer

    @property
    def storage(self) -> S:
        """The underlying storage."""
        return self._storage

    def hurry(self) -> None:
        """Limit all further waiting to `HURRY` seconds, because the process is about to end."""
        self._longest = min(self._longest, HURRY)

    def _already_recorded(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Return whether the trial already has the requested state and values, which this worker must then have set itself."""
        trial = self.get_trial(trial_id)
        return trial.state is state and (values is None or trial.values == list(values))

    def _reopen(self, failed: BaseStorage) -> None:
        with self._lock:
            if self._reopens and self._storage is failed:  # no other thread has reopened it
                with contextlib.suppress(Exception):
                    self._storage = self._open()

    def _log_outage(self, reason: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since, self._last_logged = now, now - SAY_EVERY
            if now - self._last_logged >= SAY_EVERY:
                self._last_logged = now
                waited = now - self._away_since
                logger.warning(
                    "waiting for the storage %s (%s), %.0f of at most %.0f s …",
                    masked(self._where), masked(reason), waited, self._longest,
                )  # fmt: skip

    def _log_recovery(self) -> None:
        if self._away_since is None:
            return
        with self._lock:
            if self._away_since is not None:
                waited = time.monotonic() - self._away_since
                self._away_since = None
                logger.warning("the storage answers again, after %.0f s", waited)

    # The methods of Optuna's BaseStorage.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """See BaseStorage."""
        return self._ask("create_new_study", directions, study_name)

    def delete_study(self, study_id: int) -> None:
        """See BaseStorage."""
        self._ask("delete_study", study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """See BaseStorage."""
        self._ask("set_study_user_attr", study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """See BaseStorage."""
        self._ask("set_study_system_attr", study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        """See BaseStorage."""
        return self._ask("get_study_id_from_name", study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """See BaseStorage."""
        return self._ask("get_study_name_from_id", study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See BaseStorage."""
        return self._ask("get_study_directions", study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See BaseStorage."""
        return self._ask("get_study_user_attrs", study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See BaseStorage."""
        return self._ask("get_study_system_attrs", study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """See BaseStorage."""
        return self._ask("get_all_studies")

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """See BaseStorage."""
        self._studies.add(study_id)
        return self._ask("create_new_trial", study_id, template_trial)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """See BaseStorage."""
        try:
            self._ask("set_trial_param", trial_id, param_name, param_value_internal, distribution)
        except KeyError:
            # After a restart, Optuna's proxy knows no trial of a study until the trials of that study have been read.
            for study_id in self._studies:
                self.get_all_trials(study_id, deepcopy=False)
            self._ask("set_trial_param", trial_id, param_name, param_value_internal, distribution)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """See BaseStorage."""
        return self._ask("get_trial_id_from_study_id_trial_number", study_id, trial_number)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """See BaseStorage."""
        return self._ask("set_trial_state_values", trial_id, state, values)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """See BaseStorage."""
        self._ask("set_trial_intermediate_value", trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See BaseStorage."""
        self._ask("set_trial_user_attr", trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See BaseStorage."""
        self._ask("set_trial_system_attr", trial_id, key, value)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See BaseStorage."""
        return self._ask("get_trial", trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See BaseStorage."""
        self._studies.add(study_id)
        return self._ask("get_all_trials", study_id, deepcopy, states)

    def remove_session(self) -> None:
        """See BaseStorage."""
        self._storage.remove_session()
