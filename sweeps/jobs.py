"""One training run of a sweep, described by plain data so that any process can do it, and how many are done at once.

An `Executor` is the seam between deciding which runs to do and doing them: the study and the basins know nothing of
processes, devices or fusing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Protocol

import torch

from mutransfer.errors import RequestError, describe
from mutransfer.family import Family
from mutransfer.observing.observe import observe
from mutransfer.planning import plan
from mutransfer.plans import Plan
from mutransfer.price import step_flops
from mutransfer.proxies.data import Data, load_data
from mutransfer.proxies.reference import load_family
from mutransfer.proxies.training import Outcome, Training, train
from mutransfer.recipe import Recipe
from mutransfer.scale import Scale

from .experiment import Experiment

__all__ = ["Executor", "Job", "OneByOne", "Processes", "family_of", "flops_of", "plan_of"]

Report = Callable[["Job", int, float], bool]


@dataclass(frozen=True)
class Job:
    """One run: ``recipe`` at ``scale``; ``key`` is the asker's own name for it."""

    key: Any
    scale: Scale
    parametrization: str
    recipe: Recipe
    seed: int
    rungs: tuple[int, ...] = ()


class Executor(Protocol):
    """Does jobs. ``capacity`` is how many it may have begun at a time."""

    capacity: int

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """Draw a job whenever there is room for one, and yield it with its outcome when it ends.

        ``jobs`` may decide what comes next by what has been yielded; it is not asked again once it has ended.
        ``report(job, step, loss)`` at a job's rungs may stop it with True.
        """
        ...


class OneByOne:
    """Every job in this process, one after the other."""

    capacity = 1

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`."""
        for job in jobs:
            yield job, _do(experiment, job, self.device, report)


class Processes:
    """Jobs side by side in ``count`` single-threaded processes on the CPU: small models do not use two cores well."""

    def __init__(self, count: int) -> None:
        self.capacity = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        # A forked torch may deadlock in its thread pool, so the processes start afresh.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.capacity, mp_context=context, initializer=_quiet)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool is not None
        for process in list((self._pool._processes or {}).values()):
            process.terminate()  # nothing that is still running is wanted any more
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`; reports do not cross processes, so jobs run to their end."""
        assert self._pool is not None, "use as a context manager"
        source = iter(jobs)
        running: dict[Future[Outcome], Job] = {}
        while True:
            with _interrupts_held():
                for job in itertools.islice(source, self.capacity - len(running)):
                    running[self._pool.submit(_do, experiment, job, "cpu", None)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait while processes start: they inherit the mask, so it does not reach them before `_quiet` does."""
    resource_tracker.ensure_running()  # starting it inside would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet() -> None:
    """Leave Ctrl-C to the parent, end with it, and leave the other cores to the other processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue: its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def family_of(experiment: Experiment) -> tuple[Family, Data]:
    """Return the experiment's family and data, loaded once per process."""
    return _loaded(_key(experiment))


def _key(experiment: Experiment) -> str:
    """All that the family and the data depend on."""
    keys = {"model", "options", "roles", "data", "sequence_length", "proxy", "base"}
    return experiment.model_dump_json(include=keys)


@functools.lru_cache(maxsize=4)
def _loaded(key: str) -> tuple[Family, Data]:
    experiment = Experiment.model_validate_json(key)
    data = load_data(experiment.data, experiment.sequence_length)
    options, roles = experiment.options, experiment.roles
    return load_family(experiment.model, data, experiment.base_scale, options=options, roles=roles), data


@functools.lru_cache(maxsize=32)
def _observed(key: str) -> Any:
    return observe(_loaded(key)[0])


def flops_of(experiment: Experiment, scale: Scale) -> float:
    """Return the floating point operations of one training step at ``scale``.

    Raises:
        RequestError: the model does not take the experiment's data.
    """
    family, data = family_of(experiment)
    try:
        return step_flops(family, scale, data.batch(0, experiment.batch_size, 0))
    except RequestError:
        raise
    except Exception as error:  # of the person's own model, which has only seen its own example batch until now
        raise RequestError(
            f"{experiment.model} cannot be trained on {experiment.data} ({describe(error)}): its loss is given batches "
            "(inputs, targets) of the experiment's data."
        ) from error


def plan_of(experiment: Experiment, scale: Scale, parametrization: str, recipe: Recipe) -> Plan:
    """Return the plan of a run at ``scale``; the model is observed once per process."""
    family, _ = family_of(experiment)
    seen = _observed(_key(experiment))
    return plan(family, scale, parametrization, experiment.optimizer, recipe, observation=seen)


def _do(experiment: Experiment, job: Job, device: str, report: Report | None) -> Outcome:
    family, data = family_of(experiment)
    planned = plan_of(experiment, job.scale, job.parametrization, job.recipe)
    training = Training(
        family, planned, data, steps=experiment.steps, batch_size=experiment.batch_size, seed=job.seed, device=device
    )
    return train(training, job.rungs, None if report is None else functools.partial(report, job))
