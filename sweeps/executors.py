"""Choose the executor that trains an experiment's jobs."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from mutransfer import devices
from mutransfer.errors import RequestError, nearest
from mutransfer.proxies.importing import modules_in
from mutransfer.recipe import Scale

from .commands import Commands, check_command
from .experiment import Experiment, Size
from .jobs import Events, Executor, Job, Ready, RunContext, SequentialExecutor, Session
from .processes import ProcessExecutor
from .user_trainers import load_trainer

__all__ = ["MANNERS", "PRECISIONS", "LazyExecutor", "PerScaleExecutor", "check_trainer", "executor_for", "one_by_one"]

logger = logging.getLogger(__name__)

MANNERS = ("auto", "one", "processes", "fused")
PRECISIONS = ("float32", "tf32", "bfloat16")
MOST = 8  # processes by default: each loads its own copy of torch and of the data


@contextlib.contextmanager
def executor_for(
    experiment: Experiment, how: str = "one", at_once: int | None = None, device: str = "cpu", *,
    precision: str = "float32", checkpoints: Path | None = None, folder: Path | None = None,
    context: RunContext | None = None, per_scale: bool = False,
) -> Iterator[Executor]:  # fmt: skip
    """Yield an executor for the experiment's jobs; its processes end when the context exits.

    From then on, this process keeps freed memory (`devices.keep_freed_memory`).

    Args:
        experiment: the experiment whose jobs will run.
        how: "one" trains them one after the other, "processes" in parallel processes, "fused" as one vectorized program;
            "auto" picks the fastest of these by a short measurement and reports it on stderr (`autoselect.chosen`).
        at_once: number of processes (default: one per core, at most 8) or of fused trials (default: as many as pay off).
        device: where "one" and "fused" train; processes train on the CPU, and a user trainer chooses its own device.
        precision: of the matrix products of fused trials.
        checkpoints: folder used by this process only, where fused trials are saved at rungs; None disables checkpoints.
        folder: run folder for the files of a trainer's commands; the current folder if None.
        context: family and data that are already loaded, for the measurement that chooses an executor.
        per_scale: jobs have several scales: "auto" and "fused" measure and choose for each of them.

    Raises:
        RequestError: the executor or precision is unknown, or does not fit ``device`` or ``at_once``. Also raised
            on the executor's first use, if the model does not support the precision.
    """
    context = RunContext(experiment) if context is None else context.for_(experiment)
    has_trainer = experiment.trainer is not None
    _check(how, at_once, "cpu" if has_trainer else device, precision)
    devices.keep_freed_memory()
    with contextlib.ExitStack() as held:
        match how:
            case _ if has_trainer:
                yield _for_trainer(experiment, how, at_once, device, precision, folder, held)
            case "one":
                yield SequentialExecutor(device)
            case "processes":
                yield held.enter_context(ProcessExecutor(at_once or _cores()))
            case _:

                @functools.cache
                def pool(count: int, compile: bool) -> Executor:
                    return held.enter_context(ProcessExecutor(count, compile=compile))

                def choose(at: RunContext, jobs: int | None, independent: bool = False) -> Executor:
                    return _planned(
                        at, jobs, how, at_once, device, precision, checkpoints, pool, independent, per_scale
                    )

                yield PerScaleExecutor(choose) if per_scale else LazyExecutor(functools.partial(choose, context))


class LazyExecutor(Executor):
    """Executor that is chosen on first use: errors in a request are reported before anything is measured."""

    def __init__(self, choose: Callable[[int | None], Executor]) -> None:
        self._choose = choose
        self._missing: int | None = None

    def expect(self, jobs: int, *, independent: bool = False) -> None:
        """See `Executor`; the number of jobs decides what is worth measuring."""
        self._missing = jobs

    @functools.cached_property
    def chosen(self) -> Executor:
        """The executor that runs the jobs."""
        return self._choose(self._missing)

    @property
    def capacity(self) -> int:
        """The maximum number of jobs that run at the same time."""
        return self.chosen.capacity

    def events(self, session: Session) -> Events:
        """See `Executor`."""
        return self.chosen.events(session)


class PerScaleExecutor(Executor):
    """Executor that trains the jobs of each scale by an executor chosen for that scale, in the order of their submission.

    Args:
        choose: returns the executor for a context whose proxy has the scale, the expected number of jobs, and whether they are
            independent (`Executor.expect`); called once for each scale, experiment and answer to the latter.
    """

    def __init__(self, choose: Callable[[RunContext, int | None, bool], Executor]) -> None:
        self._choose = choose
        self._expected: tuple[int | None, bool] = (None, False)
        self._known: dict[Any, Executor] = {}
        self._capacity = 1

    def expect(self, jobs: int, *, independent: bool = False) -> None:
        """See `Executor`."""
        self._expected = jobs, independent

    @property
    def capacity(self) -> int:
        """The maximum number of jobs of the current scale that run at the same time."""
        return self._capacity

    def events(self, session: Session) -> Events:
        """See `Executor`."""
        while (job := (yield from session.peek())) is not None:
            executor = self._at(session.context, job.scale)
            self._capacity = executor.capacity
            yield from executor.events(_OneScale(session, job.scale))

    def _at(self, context: RunContext, scale: Scale) -> Executor:
        asked = context.experiment
        base = asked.base or asked.proxy
        at = asked.model_copy(update={"proxy": Size(width=scale.width, depth=scale.depth), "base": base})
        key = (at.model_dump_json(), self._expected[1])
        if key not in self._known:
            self._known[key] = self._choose(context.for_(at), *self._expected)
        return self._known[key]


class _OneScale(Session):
    """The jobs of a ``session`` up to the first of another scale."""

    def __init__(self, session: Session, scale: Scale) -> None:
        self.context, self.experiment = session.context, session.experiment
        self._session, self._scale = session, scale

    def take(self, count: int, alike: Callable[[Job], bool] = lambda job: True) -> Generator[Ready, None, list[Job]]:
        """See `Session`."""
        return self._session.take(count, lambda job: job.scale == self._scale and alike(job))

    def peek(self) -> Generator[Ready, None, Job | None]:
        """See `Session`."""
        job = yield from self._session.peek()
        return job if job is not None and job.scale == self._scale else None

    def is_stopped(self, key: Any) -> bool:
        """See `Session`."""
        return self._session.is_stopped(key)


def one_by_one(experiment: Experiment, folder: Path | None = None, device: str = "cpu") -> Executor:
    """Return an executor that runs the experiment's jobs one after the other; see `executor_for`."""
    trainer = experiment.trainer
    return SequentialExecutor(device) if trainer is None or trainer.command is None else Commands(folder or Path())


def check_trainer(experiment: Experiment) -> None:
    """Raise a RequestError if the experiment has a user trainer that cannot be run."""
    if (trainer := experiment.trainer) is None:
        return
    if trainer.call is not None:
        with modules_in(experiment.folder):
            load_trainer(experiment.here().references()["call"])
    else:
        check_command(trainer, experiment.folder)


def _for_trainer(
    experiment: Experiment, how: str, at_once: int | None, device: str, precision: str, folder: Path | None,
    held: contextlib.ExitStack,
) -> Executor:  # fmt: skip
    """Return an executor for a user trainer. Nothing is measured: only the user knows which resources the trainer needs."""
    assert experiment.trainer is not None
    if precision != "float32":
        raise RequestError(
            f"--precision {precision} is for fused trials, but {experiment.trainer} trains these: leave it out."
        )
    if how == "fused":
        logger.info("trials are not fused: %s trains them.", experiment.trainer)
        how, at_once = "one", None
    count = at_once or (_cores() if how == "processes" else 1)
    if experiment.trainer.command is not None:
        return Commands(folder or Path(), count)
    return held.enter_context(ProcessExecutor(count)) if how == "processes" or count > 1 else SequentialExecutor(device)


def _cores() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), MOST))


def _check(how: str, at_once: int | None, device: str, precision: str) -> None:
    if how not in MANNERS:
        raise RequestError(f"--executor {how!r} is not known: {nearest(how, MANNERS)}")
    if precision not in PRECISIONS:
        raise RequestError(f"--precision {precision!r} is not known: {nearest(precision, PRECISIONS)}")
    if precision == "tf32" and device == "cpu":
        raise RequestError("--precision tf32 is a format of GPUs, but the device is cpu: use float32 or bfloat16.")
    if at_once is not None and at_once < 1:
        raise RequestError(f"--at-once is {at_once}: give a number of at least 1.")
    if precision != "float32" and how in ("one", "processes"):
        raise RequestError(f"--precision {precision} needs --executor fused: {how} trains in float32.")
    if how == "one" and (at_once or 1) > 1:
        raise RequestError(f"--at-once {at_once} needs --executor processes or fused: one by one is one at a time.")
    if how == "processes" and device != "cpu":
        raise RequestError(f"--executor processes trains on the CPU, but the device is {device}: add --device cpu.")


def _planned(
    context: RunContext, missing: int | None, how: str, at_once: int | None, device: str, precision: str,
    checkpoints: Path | None, pool: Callable[[int, bool], Executor], independent: bool, per_scale: bool,
) -> Executor:  # fmt: skip

    from .autoselect import chosen
    from .vectorized.batch_training import refusal
    from .vectorized.executor import Checkpoints, VectorizedExecutor

    narrow: Any = precision
    why = refusal(context, device=device)
    if why is not None and precision != "float32":
        raise RequestError(f"--precision {precision} needs trials that can be fused, but {why}: leave it out.")
    if why is not None and how == "fused":
        logger.info("trials are trained one by one: %s.", why)
        return SequentialExecutor(device)
    if precision == "bfloat16" and devices.bfloat16_is_slow(device):
        logger.warning(
            "warning: this CPU multiplies bfloat16 %.0f times slower than float32: --precision float32 is faster here.",
            devices.bfloat16_slowdown(),
        )
    begun = checkpoints is not None and any(checkpoints.glob("*"))  # fused trials resume from their checkpoints
    choice = chosen(
        context, missing or context.experiment.trials, device, at_once=at_once,
        precision=narrow,
        only="fused" if how == "fused" or (begun and why is None) else None, independent=independent,
        started=per_scale,  # all scales share the processes, whose start none of them should have to outweigh alone
    )  # fmt: skip
    logger.info("%s%s", f"width {context.experiment.proxy.width}: " if per_scale else "", choice)
    match choice.how:
        case "one":
            return SequentialExecutor(device, compile=choice.compile)
        case "processes":
            return pool(choice.at_once, choice.compile)
        case _:
            kept = None if checkpoints is None else Checkpoints(checkpoints)
            return VectorizedExecutor(
                choice.at_once, device, precision=narrow, compile=choice.compile, checkpoints=kept
            )
