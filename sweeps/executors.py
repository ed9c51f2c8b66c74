"""Which executor does the jobs: the one place where that is chosen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from mutransfer.errors import RequestError, nearest

from .experiment import Experiment
from .jobs import Executor, OneByOne
from .processes import Processes

__all__ = ["MANNERS", "executor_for"]

MANNERS = ("one", "processes")
MOST = 8  # processes by default: each holds a torch and the data of its own


@contextlib.contextmanager
def executor_for(
    experiment: Experiment, how: str = "one", at_once: int | None = None, device: str = "cpu"
) -> Iterator[Executor]:
    """Yield what does the experiment's jobs; its processes end with the block.

    Args:
        experiment: whose jobs.
        how: "one" after the other, or side by side in "processes".
        at_once: how many processes; by default one per core, at most 8.
        device: where "one" trains; processes train on the CPU.

    Raises:
        RequestError: an unknown manner, or one that does not fit the device or the number.
    """
    if how not in MANNERS:
        raise RequestError(f"--executor {how!r} is not known: {nearest(how, MANNERS)}")
    if at_once is not None and at_once < 1:
        raise RequestError(f"--at-once is {at_once}: give a number of at least 1.")
    if how == "one":
        if (at_once or 1) > 1:
            raise RequestError(f"--at-once {at_once} needs --executor processes: one by one is one at a time.")
        yield OneByOne(device)
        return
    if device != "cpu":
        raise RequestError(f"--executor processes trains on the CPU, and the device is {device}: add --device cpu.")
    with Processes(at_once or max(1, min(len(os.sched_getaffinity(0)), MOST))) as executor:
        yield executor
