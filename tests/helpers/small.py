"""Experiments that take a blink, and executors that count, plant losses or fail."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Done, Events, Executor, Job, Report, Reports, SequentialExecutor, Session

SMALL: dict[str, Any] = {
    "model": "mlp",
    "data": "digits",
    "proxy": {"width": 8, "depth": 2},
    "steps": 8,
    "batch_size": 16,
    "recipe": {"lr": 2**-6, "warmup": 0.0},
    "search": {"lr": {"low": 2**-9, "high": 2**-3, "log": True}},
    "rungs": 2,
    "pruner": "none",
    "trials": 4,
}


def experiment(**changes: Any) -> Experiment:
    return Experiment.read({**SMALL, **changes}, "test")


class Counting(Executor):
    """Another executor, with the jobs it was given."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner or SequentialExecutor()
        self.jobs: list[Job] = []

    @property
    def capacity(self) -> int:
        return self.inner.capacity

    def events(self, session: Session) -> Events:
        for event in self.inner.events(session):
            if isinstance(event, Done):
                self.jobs.append(event.job)
            yield event


class Planted(Executor):
    """No training: the loss is a function of the job, reported at its rungs and at the end; the start is 10."""

    capacity = 1

    def __init__(self, loss: Callable[[Job], float]) -> None:
        self.loss = loss

    def events(self, session: Session) -> Events:
        while jobs := (yield from session.take(1)):
            job, loss, stopped_at = jobs[0], self.loss(jobs[0]), None
            for rung in job.rungs:
                yield Reports((Report(job, rung, loss),))
                if session.is_stopped(job.key):
                    stopped_at = rung
                    break
            steps = stopped_at or session.experiment.steps
            yield Done(job, Outcome(loss, 10.0, steps, stopped_at is not None, 0.01))


class Failing(Executor):
    """Raises ``error`` in place of the outcome number ``at`` (from 0), once."""

    capacity = 1

    def __init__(self, at: int, error: BaseException, inner: Any = None) -> None:
        self.at, self.error, self.inner, self.done = at, error, inner or SequentialExecutor(), 0

    def events(self, session: Session) -> Events:
        for event in self.inner.events(session):
            if isinstance(event, Done):
                self.done += 1
                if self.done == self.at + 1:
                    raise self.error
            yield event


def each(judge: Callable[[Job, int, float], bool]) -> Callable[[Sequence[Report]], list[Any]]:
    """For `run_jobs`: stops the jobs of which ``judge`` says so, each by itself."""
    return lambda reports: [one.job.key for one in reports if judge(one.job, one.step, one.loss)]


def octaves(recipe: Recipe) -> float:
    return math.log2(recipe.lr)


def journal(folder: RunFolder) -> optuna.Study:
    """The folder's study, as anyone else opens it."""
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    return optuna.load_study(study_name=None, storage=storage)


def contents(path: Path) -> dict[str, bytes]:
    """All files below ``path`` by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def children() -> list[int]:
    """Processes that do jobs (not multiprocessing's own tracker)."""
    living = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)
    return [child.pid for child in living if any("spawn_main" in word for word in child.cmdline())]


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail rather than wait for ever."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
