"""Who does which trial, so that any number of workers finish exactly as many as were asked for.

A study of N trials has N places. A trial holds one from the moment it is begun or waits to be, and a failed one none; its rank
is the number of holders before it. Trials are numbered by the storage and failing is for ever, so a rank only falls: a
trial that is begun when its rank is below N is among the first N for good, and no worker needs to know of any other.

A trial that ends without an outcome (its worker died, or was interrupted) is failed, and its parameters wait as a *ticket*, a
new trial that names the one it repeats. The ticket is made first: whoever dies in between leaves one that is not valid yet.
Several may be made by workers who bury the same trial; the first is valid, the others are void.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from ._optuna_internals import forget_cached_trials, storage_of, study_id, trial_id

__all__ = ["TrialQueue", "FINISHED", "FIXED", "LEASE", "Heartbeats", "OWNER", "origin", "valid_trials", "worker_name"]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
OURS = "mutransfer:"
OWNER = "mutransfer:owner"
REPEATS = "mutransfer:repeats"
FIXED = "fixed_params"  # Optuna's own key of parameters that are not to be sampled


def valid_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that hold a place, by number; ``trials`` are all of a study."""
    valid = _valid(trials)
    return [trial for trial in trials if trial.state is not TrialState.FAIL and trial.number in valid]


def origin(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """Return the trial that ``trial`` is done again for, however often that was; itself if it is no ticket."""
    while (repeats := trial.system_attrs.get(REPEATS)) is not None:
        trial = trials[repeats]
    return trial


def _valid(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of all trials but tickets that repeat what has not failed, or what an earlier ticket repeats."""
    failed = {trial.number for trial in trials if trial.state is TrialState.FAIL}
    repeated: set[int | None] = set()
    valid = set()
    for trial in trials:
        repeats = trial.system_attrs.get(REPEATS)
        if repeats is None or (repeats in failed and repeats not in repeated):
            valid.add(trial.number)
        repeated.add(repeats)
    return valid


class TrialQueue:
    """The trials of one worker.

    Args:
        study: the study; its storage may be shared.
        space: what is searched.
        total: finished trials in all.
        first: parameters of the very first trial, or None to sample them as well.
        owner: name of this worker, unlike any other's.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        total: int,
        first: dict[str, Any] | None,
        owner: str,
    ) -> None:
        self.study, self._space, self._total, self._first, self.owner = study, space, total, first, owner
        self._storage = storage_of(study)
        self.begun: dict[int, Trial] = {}

    def trials(self) -> list[FrozenTrial]:
        """Return all trials of the study as they are now."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> int:
        """Return how many trials are finished, by any worker."""
        return sum(trial.state in FINISHED for trial in self.trials())

    def waiting(self) -> bool:
        """Return whether a trial waits to be begun, by any worker."""
        return any(trial.state is TrialState.WAITING for trial in valid_trials(self.trials())[: self._total])

    def next(self) -> Trial | None:
        """Begin a trial: one that waits, or a new one; None when all places are held, maybe by other workers' trials."""
        self.give_back(self._unknown())
        while True:
            holders = valid_trials(self.trials())[: self._total]
            waiting = next((trial for trial in holders if trial.state is TrialState.WAITING), None)
            if waiting is None and len(holders) == self._total:
                return None
            with contextlib.suppress(
                UpdateFinishedTrialError
            ):  # retried by another worker before it had begun: so the next one
                if waiting is None and (made := self._made()) is not None:
                    return self._begin(made)
                if waiting is not None and self._took(waiting):
                    return self._begin(trial_id(waiting))

    def give_back(self, lost: Iterable[FrozenTrial]) -> None:
        """Fail trials that will have no outcome; their parameters wait to be tried again, once, whoever else does this."""
        for number in [trial.number for trial in lost]:
            trial = self.trials()[number]
            if trial.state is not TrialState.RUNNING:
                continue
            first = self._first if number == 0 and self._first is not None else {}
            parameters = {**first, **trial.system_attrs.get(FIXED, {}), **trial.params}
            if parameters:
                kept = {key: value for key, value in trial.system_attrs.items() if key.startswith(OURS)}
                kept |= {FIXED: parameters, REPEATS: number}
                kept.pop(OWNER, None)
                self.study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=kept))
            self._fail(trial_id(trial))

    def give_back_own(self) -> None:
        """Give back all that this worker has begun and not finished."""
        self.begun.clear()
        self.give_back(self._unknown())

    def withdraw(self) -> None:
        """Fail the tickets that are void."""
        trials = self.trials()
        valid = _valid(trials)
        for trial in trials:
            if trial.state is not TrialState.WAITING or trial.number in valid:
                continue
            if trials[trial.system_attrs[REPEATS]].state.is_finished():  # until then it may become valid
                self._fail(trial_id(trial))

    def _made(self) -> int | None:
        """Make a new trial; None if other workers were faster and have taken the last places."""
        template = create_trial(state=TrialState.RUNNING, system_attrs={OWNER: self.owner})
        made = self._storage.create_new_trial(study_id(self.study), template)
        if any(trial_id(trial) == made for trial in valid_trials(self.trials())[: self._total]):
            return made
        self._fail(made)
        return None

    def _took(self, waiting: FrozenTrial) -> bool:
        taken = self._storage.set_trial_state_values(trial_id(waiting), TrialState.RUNNING)
        if taken:
            self._storage.set_trial_system_attr(trial_id(waiting), OWNER, self.owner)
        return taken

    def _begin(self, number: int) -> Trial:
        taken = self._storage.get_trial(number)
        if taken.number == 0 and self._first is not None and FIXED not in taken.system_attrs:
            self._storage.set_trial_system_attr(number, FIXED, self._first)
        forget_cached_trials(self.study)  # as ask does: the sampler is to see what is there now
        trial = Trial(self.study, number)
        for name, distribution in self._space.items():
            _suggest(trial, name, distribution)
        self.begun[taken.number] = trial
        return trial

    def _unknown(self) -> list[FrozenTrial]:
        """Trials of this worker that it does not know of: made twice, as the first answer was lost, or begun by halves."""
        running = [trial for trial in self.trials() if trial.state is TrialState.RUNNING]
        return [t for t in running if t.system_attrs.get(OWNER) == self.owner and t.number not in self.begun]

    def _fail(self, number: int) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):  # somebody else has
            self._storage.set_trial_state_values(number, TrialState.FAIL)


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution)
        trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


LEASE = 60.0  # seconds without a heartbeat
SIGN = "mutransfer:sign:"  # of a study's attribute: a worker's [count, lease]
SIGNS = 6  # per lease


def worker_name() -> str:
    """Return a name for this process that no other worker has, on any machine."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


class Heartbeats:
    """Shows that ``owner`` lives, and watches the others, for as long as it is entered.

    Args:
        study: the shared study.
        owner: this worker's name.
        seconds: its lease.
    """

    def __init__(self, study: optuna.Study, owner: str, seconds: float = LEASE) -> None:
        self._storage, self._study_number = storage_of(study), study_id(study)
        self.owner, self.seconds = owner, seconds
        self._count = 0
        self._watched = -float("inf")
        self._lapsed: list[FrozenTrial] = []
        self._seen: dict[int, tuple[Any, float]] = {}  # trial number → its owner's sign, and since when it is that
        self._owners: dict[str, tuple[Any, float]] = {}  # the same of owners that are asked for
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mutransfer-lease", daemon=True)

    def __enter__(self) -> Heartbeats:
        self._show()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # it may be waiting for a server, and ends with the process

    def lapsed(self) -> list[FrozenTrial]:
        """Return the running trials whose workers were last seen to be dead."""
        return self._lapsed

    def silent(self, owner: str) -> bool:
        """Return whether a worker has missed its heartbeat for its lease, as far as these questions have been asked."""
        sign = self._storage.get_study_system_attrs(self._study_number).get(f"{SIGN}{owner}")
        now = time.monotonic()
        before, since = self._owners.get(owner, (None, now))
        self._owners[owner] = sign, (since if before == sign else now)
        return now - self._owners[owner][1] > (sign[1] if sign else self.seconds)

    def _live(self) -> None:
        while not self._ended.wait(self.seconds / SIGNS):
            try:
                self._show()
                self.watch()
            except Exception:
                # What is wrong with the storage is met, and told, by the sweep itself; a sign that is late is not.
                self._lapsed = []

    def _show(self) -> None:
        self._count += 1
        self._storage.set_study_system_attr(self._study_number, f"{SIGN}{self.owner}", [self._count, self.seconds])

    def watch(self) -> None:
        """Look at all running trials' owners."""
        attributes = self._storage.get_study_system_attrs(self._study_number)
        running = self._storage.get_all_trials(self._study_number, deepcopy=False, states=(TrialState.RUNNING,))
        now = time.monotonic()
        if now - self._watched > self.seconds / 2:  # nothing was seen for a while
            self._seen = {}
        self._watched = now
        seen, lapsed = {}, []
        for trial in running:
            owner = trial.system_attrs.get(OWNER)
            if owner == self.owner:
                continue
            sign = (owner, attributes.get(f"{SIGN}{owner}"))
            before, since = self._seen.get(trial.number, (None, now))
            seen[trial.number] = sign, (since if before == sign else now)
            lease = sign[1][1] if sign[1] else self.seconds  # taken from the queue, and not yet signed
            if now - seen[trial.number][1] > lease:
                lapsed.append(trial)
        self._seen, self._lapsed = seen, lapsed
