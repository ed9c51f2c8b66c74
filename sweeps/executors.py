"""Which executor does the jobs: the one place where that is chosen."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mutransfer.errors import RequestError, nearest
from mutransfer.proxies.importing import modules_in
from mutransfer.proxies.training import Outcome

from .commands import Commands, check_command
from .experiment import Experiment
from .jobs import Executor, Job, OneByOne, Report
from .processes import Processes
from .user_trainers import load_trainer

__all__ = ["MANNERS", "PRECISIONS", "LazyExecutor", "check_trainer", "executor_for", "one_by_one"]

logger = logging.getLogger(__name__)

MANNERS = ("auto", "one", "processes", "fused")
PRECISIONS = ("float32", "bfloat16")
MOST = 8  # processes by default: each holds a torch and the data of its own


@contextlib.contextmanager
def executor_for(
    experiment: Experiment, how: str = "one", at_once: int | None = None, device: str = "cpu", *,
    precision: str = "float32", checkpoints: Path | None = None, folder: Path | None = None,
) -> Iterator[Executor]:  # fmt: skip
    """Yield what does the experiment's jobs; its processes end with the block.

    Args:
        experiment: whose jobs.
        how: "one" after the other, side by side in "processes", "fused" to one program, or "auto": whichever a short
            measurement says is done first, with a line on stderr (`choosing.chosen`).
        at_once: how many processes (by default one per core, at most 8) or fused trials (by default as many as pay).
        device: where "one" and "fused" train; processes train on the CPU, and an own trainer wherever it wants.
        precision: of fused trials' matrix products.
        checkpoints: a folder of this process's alone, where fused trials are saved at rungs; nowhere if None.
        folder: run folder, below which the commands of a trainer have their files; the current one if None.

    Raises:
        RequestError: an unknown manner or precision, or one that does not fit the device or the number; when it is first
            used, a precision that the model cannot have.
    """
    own = experiment.trainer is not None
    _check(how, at_once, "cpu" if own else device, precision)
    with contextlib.ExitStack() as held:
        match how:
            case _ if own:
                yield _own(experiment, how, at_once, device, precision, folder, held)
            case "one":
                yield OneByOne(device)
            case "processes":
                yield held.enter_context(Processes(at_once or _cores()))
            case _:
                yield LazyExecutor(
                    lambda missing: _planned(experiment, missing, how, at_once, device, precision, checkpoints, held)
                )


class LazyExecutor:
    """An executor that is chosen when it is first needed: what is wrong with a request is said before anything is measured."""

    def __init__(self, choose: Callable[[int | None], Executor]) -> None:
        self._choose = choose
        self._missing: int | None = None

    def expect(self, missing: int) -> None:
        """Say how many jobs there are to do, of an experiment that may be half done."""
        self._missing = missing

    @functools.cached_property
    def chosen(self) -> Executor:
        """The executor that does the jobs."""
        return self._choose(self._missing)

    @property
    def capacity(self) -> int:
        """How many jobs it may have begun at a time."""
        return self.chosen.capacity

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`."""
        return self.chosen.run(experiment, jobs, report)


def one_by_one(experiment: Experiment, folder: Path | None = None, device: str = "cpu") -> Executor:
    """Return what does the experiment's jobs one after the other; see `executor_for`."""
    trainer = experiment.trainer
    return OneByOne(device) if trainer is None or trainer.command is None else Commands(folder or Path())


def check_trainer(experiment: Experiment) -> None:
    """Raise a RequestError if the experiment's own trainer, if it has one, cannot be run."""
    if (trainer := experiment.trainer) is None:
        return
    if trainer.call is not None:
        with modules_in(experiment.folder):
            load_trainer(experiment.here().references()["call"])
    else:
        check_command(trainer, experiment.folder)


def _own(
    experiment: Experiment, how: str, at_once: int | None, device: str, precision: str, folder: Path | None,
    held: contextlib.ExitStack,
) -> Executor:  # fmt: skip
    """Nothing is measured: what an own trainer uses, and how much of it there is, its person knows."""
    assert experiment.trainer is not None
    if precision != "float32":
        raise RequestError(
            f"--precision {precision} is for fused trials, and {experiment.trainer} trains: leave it out."
        )
    if how == "fused":
        logger.info("trials are not fused: %s trains them.", experiment.trainer)
        how, at_once = "one", None
    count = at_once or (_cores() if how == "processes" else 1)
    if experiment.trainer.command is not None:
        return Commands(folder or Path(), count)
    return held.enter_context(Processes(count)) if how == "processes" or count > 1 else OneByOne(device)


def _cores() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), MOST))


def _check(how: str, at_once: int | None, device: str, precision: str) -> None:
    if how not in MANNERS:
        raise RequestError(f"--executor {how!r} is not known: {nearest(how, MANNERS)}")
    if precision not in PRECISIONS:
        raise RequestError(f"--precision {precision!r} is not known: {nearest(precision, PRECISIONS)}")
    if at_once is not None and at_once < 1:
        raise RequestError(f"--at-once is {at_once}: give a number of at least 1.")
    if precision != "float32" and how in ("one", "processes"):
        raise RequestError(f"--precision {precision} needs --executor fused: {how} trains in float32.")
    if how == "one" and (at_once or 1) > 1:
        raise RequestError(f"--at-once {at_once} needs --executor processes or fused: one by one is one at a time.")
    if how == "processes" and device != "cpu":
        raise RequestError(f"--executor processes trains on the CPU, and the device is {device}: add --device cpu.")


def _planned(
    experiment: Experiment, missing: int | None, how: str, at_once: int | None, device: str, precision: str,
    checkpoints: Path | None,
    held: contextlib.ExitStack,
) -> Executor:  # fmt: skip
    import torch

    from mutransfer.precision import bfloat16_is_slow, bfloat16_slowdown

    from .autoselect import chosen
    from .vectorized.executor import Checkpoints, Fused
    from .vectorized.support import refusal

    why = refusal(experiment, device=device)
    if why is not None and precision != "float32":
        raise RequestError(f"--precision {precision} needs trials that can be fused, and {why}: leave it out.")
    if why is not None and how == "fused":
        logger.info("trials are trained one by one: %s.", why)
        return OneByOne(device)
    if precision == "bfloat16" and bfloat16_is_slow(device):
        logger.warning(
            "warning: this CPU multiplies bfloat16 %.0f times slower than float32: --precision float32 is the faster one here.",
            bfloat16_slowdown(),
        )
    begun = checkpoints is not None and any(checkpoints.glob("*"))  # what was fused goes on inside of its trials
    choice = chosen(
        experiment, missing or experiment.trials, device, at_once=at_once,
        precision=None if precision == "float32" else torch.bfloat16,
        only="fused" if how == "fused" or (begun and why is None) else None,
    )  # fmt: skip
    logger.info("%s", choice)
    match choice.how:
        case "one":
            return OneByOne(device, compile=choice.compile)
        case "processes":
            return held.enter_context(Processes(choice.at_once, compile=choice.compile))
        case _:
            narrow: Any = precision
            kept = None if checkpoints is None else Checkpoints(checkpoints)
            return Fused(choice.at_once, device, precision=narrow, compile=choice.compile, checkpoints=kept)
