"""Distribute trials over workers: any number of workers finish exactly the requested number of trials.

A study of N trials has N places. A running, waiting or finished trial holds a place, a failed one does not. The rank of a trial
is the number of holders before it. The storage numbers the trials and a failed trial stays failed, so a rank can only decrease:
a trial that starts with a rank below N remains among the first N, and workers need not know of each other.

A trial that ends without an outcome (its worker died or was interrupted) is marked as failed, and its parameters are re-enqueued
as a *retry trial*, a new trial that names the one it repeats. The retry trial is created first: if the worker dies in between, it
is not valid yet. If several workers retry the same trial, only the first retry trial is valid.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
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
FIXED = "fixed_params"  # Optuna's own key for parameters that are not sampled


def valid_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that hold a place, ordered by number; ``trials`` are all trials of a study."""
    valid = _valid(trials)
    return [trial for trial in trials if trial.state is not TrialState.FAIL and trial.number in valid]


def origin(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """Return the original trial that ``trial`` retries, possibly through several retries; itself if it is not a retry."""
    while (repeats := trial.system_attrs.get(REPEATS)) is not None:
        trial = trials[repeats]
    return trial


def _valid(trials: Sequence[FrozenTrial]) -> set[int]:
    """Return the numbers of all trials except retries of a trial that has not failed or that has an earlier retry."""
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
    """Queue from which one worker takes its trials.

    Args:
        study: the study; its storage may be shared.
        space: the search space.
        total: number of finished trials to reach, over all workers.
        first: parameters of the first trial of the study; None to sample these too.
        owner: unique name of this worker.
        waits: returns whether the sampler needs the results of running trials before the next new one.
        hurry: called before the last requests of a worker that ends, which should not wait long for the storage.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        total: int,
        first: dict[str, Any] | None,
        owner: str,
        *,
        waits: Callable[[optuna.Study], bool] = lambda study: False,
        hurry: Callable[[], None] = lambda: None,
    ) -> None:
        self._waits, self._hurry = waits, hurry
        self.study, self._space, self._total, self._first, self.owner = study, space, total, first, owner
        self._storage = storage_of(study)
        self.begun: dict[int, Trial] = {}

    def trials(self) -> list[FrozenTrial]:
        """Return all trials of the study in their current state."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> int:
        """Return the number of finished trials, over all workers."""
        return sum(trial.state in FINISHED for trial in self.trials())

    def next(self) -> Trial | None:
        """Start a waiting trial or a new one; return None if all places are held or the sampler waits for running trials."""
        self.requeue(self._unknown())
        while True:
            holders = valid_trials(self.trials())[: self._total]
            waiting = next((trial for trial in holders if trial.state is TrialState.WAITING), None)
            if waiting is None and (len(holders) == self._total or self._waits(self.study)):
                return None
            with contextlib.suppress(
                UpdateFinishedTrialError
            ):  # another worker retried it before it started here: take the next one
                if waiting is None and (made := self._made()) is not None:
                    return self._begin(made)
                if waiting is not None and self._take(waiting):
                    return self._begin(trial_id(waiting))

    def requeue(self, lost: Iterable[FrozenTrial]) -> None:
        """Mark trials without an outcome as failed and re-enqueue their parameters; only one retry counts, over all workers."""
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

    def requeue_own(self) -> None:
        """Requeue all trials that this worker, which is about to end, has started and not finished."""
        self._hurry()
        self.begun.clear()
        self.requeue(self._unknown())

    def withdraw(self) -> None:
        """Mark the retry trials that are not valid as failed."""
        trials = self.trials()
        valid = _valid(trials)
        for trial in trials:
            if trial.state is not TrialState.WAITING or trial.number in valid:
                continue
            if trials[trial.system_attrs[REPEATS]].state.is_finished():  # before that, it may still become valid
                self._fail(trial_id(trial))

    def _made(self) -> int | None:
        """Create a new trial and return its ID; None if other workers have taken the last places in the meantime."""
        template = create_trial(state=TrialState.RUNNING, system_attrs={OWNER: self.owner})
        made = self._storage.create_new_trial(study_id(self.study), template)
        if any(trial_id(trial) == made for trial in valid_trials(self.trials())[: self._total]):
            return made
        self._fail(made)
        return None

    def _take(self, waiting: FrozenTrial) -> bool:
        taken = self._storage.set_trial_state_values(trial_id(waiting), TrialState.RUNNING)
        if taken:
            self._storage.set_trial_system_attr(trial_id(waiting), OWNER, self.owner)
        return taken

    def _begin(self, number: int) -> Trial:
        taken = self._storage.get_trial(number)
        if taken.number == 0 and self._first is not None and FIXED not in taken.system_attrs:
            self._storage.set_trial_system_attr(number, FIXED, self._first)
        forget_cached_trials(self.study)  # as `Study.ask` does: the sampler must see the current trials
        trial = Trial(self.study, number)
        for name, distribution in self._space.items():
            _suggest(trial, name, distribution)
        self.begun[taken.number] = trial
        return trial

    def _unknown(self) -> list[FrozenTrial]:
        """Return running trials owned by this worker but unknown to it: created twice after a lost answer, or half started."""
        running = [trial for trial in self.trials() if trial.state is TrialState.RUNNING]
        return [t for t in running if t.system_attrs.get(OWNER) == self.owner and t.number not in self.begun]

    def _fail(self, number: int) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):  # another worker already has
            self._storage.set_trial_state_values(number, TrialState.FAIL)


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution)
        trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


LEASE = 60.0  # seconds without a heartbeat
SIGN = "mutransfer:sign:"  # prefix of the study attribute that holds a worker's heartbeat [count, lease]
SIGNS = 6  # heartbeats per lease


def worker_name() -> str:
    """Return a name for this process that is unique over all workers and machines."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


class Heartbeats:
    """Context manager that sends the heartbeats of ``owner`` and watches those of the other workers, in a thread.

    Args:
        study: the shared study.
        owner: this worker's name.
        seconds: its lease, after which other workers retry its trials if it has missed its heartbeat.
    """

    def __init__(self, study: optuna.Study, owner: str, seconds: float = LEASE) -> None:
        self._storage, self._study_number = storage_of(study), study_id(study)
        self.owner, self.seconds = owner, seconds
        self._count = 0
        self._watched = -float("inf")
        self._lapsed: list[FrozenTrial] = []
        self._seen: dict[
            int, tuple[Any, float]
        ] = {}  # trial number → its owner's heartbeat, and when that last changed
        self._owners: dict[str, tuple[Any, float]] = {}  # owner → the same, for calls of `silent`
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mutransfer-lease", daemon=True)

    def __enter__(self) -> Heartbeats:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # it may be waiting for a server; it ends with the process

    def lapsed(self) -> list[FrozenTrial]:
        """Return the running trials whose workers had missed their heartbeat at the last check."""
        return self._lapsed

    def silent(self, owner: str) -> bool:
        """Return whether ``owner`` sent no heartbeat for longer than its lease, judged by the calls of this method so far."""
        sign = self._storage.get_study_system_attrs(self._study_number).get(f"{SIGN}{owner}")
        now = time.monotonic()
        before, since = self._owners.get(owner, (None, now))
        self._owners[owner] = sign, (since if before == sign else now)
        return now - self._owners[owner][1] > (sign[1] if sign else self.seconds)

    def _live(self) -> None:
        while not self._ended.wait(self.seconds / SIGNS):
            try:
                self.beat()
                self.watch()
            except Exception:
                # The sweep itself meets and reports errors of the storage. This worker cannot judge the others meanwhile.
                self._lapsed = []

    def beat(self) -> None:
        """Send a heartbeat."""
        self._count += 1
        self._storage.set_study_system_attr(self._study_number, f"{SIGN}{self.owner}", [self._count, self.seconds])

    def watch(self) -> None:
        """Check the heartbeats of the owners of all running trials."""
        attributes = self._storage.get_study_system_attrs(self._study_number)
        running = self._storage.get_all_trials(self._study_number, deepcopy=False, states=(TrialState.RUNNING,))
        now = time.monotonic()
        if now - self._watched > self.seconds / 2:  # the last check is too old to judge by
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
            lease = sign[1][1] if sign[1] else self.seconds  # no heartbeat yet: the trial was just taken from the queue
            if now - seen[trial.number][1] > lease:
                lapsed.append(trial)
        self._seen, self._lapsed = seen, lapsed
