"""The planner: one by one, side by side in processes, or fused, whichever a short measurement says is done first."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from .experiment import Experiment
from .fusing.refusing import refusal
from .timing import fused_step, single_step

__all__ = ["Choice", "chosen"]

How = Literal["one", "processes", "fused"]

# What is not measured, as it takes longer than it tells (docs/throughput.md has the measurements).
START = 4.0  # seconds until processes have imported torch
SPOILED = 1.1  # how much slower a process is beside others than alone
COMPILING = 30.0  # seconds to compile a fused step
COMPILED = 1.6  # how many times faster it then is, small models on a CPU
WORTH = 0.95  # twice as many at once must take less than this per trial
SHORT = 15.0  # seconds of work that need no plan
LEARNING = 3  # batches that a study has at least, so that its sampler learns from some
LARGEST = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class Choice:
    """How a sweep's trials are trained: ``seconds`` is the time expected for all of them, ``reason`` the numbers."""

    how: How
    at_once: int
    compile: bool
    seconds: float
    reason: str

    def __str__(self) -> str:
        """Return the choice and why, as one line."""
        many = {"one": "one by one", "processes": f"{self.at_once} processes", "fused": f"{self.at_once} fused"}[
            self.how
        ]
        return f"trials are trained {many}{', compiled' if self.compile else ''}: {self.reason}."


def chosen(
    experiment: Experiment, trials: int, device: str = "cpu", *, at_once: int | None = None,
    precision: torch.dtype | None = None, only: How | None = None,
) -> Choice:  # fmt: skip
    """Return what does ``trials`` trials of the experiment soonest.

    Steps are measured one by one and fused, by more and more at once as long as that pays and memory suffices. For
    processes the time of a step on one thread is shared out over the cores, and for a compiled step the usual gain counted.

    Args:
        experiment: whose proxy is trained.
        trials: how many there are to do.
        device: where.
        at_once: how many at a time, instead of what is best.
        precision: of fused trials; another than None leaves no other manner.
        only: choose the number and whether to compile for this manner.

    Raises:
        RequestError: the model cannot be trained.
    """
    found = list(_choices(experiment, trials, device, at_once, precision, only))
    best = min(found, key=lambda choice: choice.seconds)
    notes = [choice.reason for choice in found]
    reason = f"{', '.join(dict.fromkeys(notes))} for a step of one trial"
    why = refusal(experiment, device=device) if only in (None, "fused") else None
    return Choice(
        best.how, best.at_once, best.compile, best.seconds, reason + (f"; not fused, as {why}" if why else "")
    )


def _choices(
    experiment: Experiment,
    trials: int,
    device: str,
    at_once: int | None,
    precision: torch.dtype | None,
    only: How | None,
) -> Iterator[Choice]:
    steps = trials * experiment.steps
    fusable = refusal(experiment, device=device) is None
    unfused = (only is None and precision is None) or not fusable
    if unfused or only == "one":
        step = single_step(experiment, device)
        yield Choice("one", 1, False, steps * step, f"one by one {1e3 * step:.2f} ms")
        if steps * step < SHORT and only is None and at_once is None:
            return
    if device == "cpu" and (unfused or only == "processes"):
        cores = min(at_once or len(os.sched_getaffinity(0)), trials)
        if cores > 1:
            step = single_step(experiment, device, threads=1) * SPOILED / cores
            rounds = math.ceil(trials / cores) * cores / trials  # the last round may leave some idle
            yield Choice(
                "processes", cores, False, START + steps * step * rounds, f"{cores} processes about {1e3 * step:.2f} ms"
            )
    if fusable and only in (None, "fused"):
        yield from _fused(experiment, trials, device, at_once, precision)


def _fused(
    experiment: Experiment, trials: int, device: str, at_once: int | None, precision: torch.dtype | None
) -> Iterator[Choice]:
    most = min(LARGEST["cuda" if device.startswith("cuda") else "cpu"], max(2, trials // LEARNING))
    before = math.inf
    count = max(1, min(at_once, trials)) if at_once else min(4, most)
    while True:
        step = fused_step(experiment, count, device, precision)
        if step is None:
            return
        rounds = math.ceil(trials / count) * count / trials
        seconds = trials * experiment.steps * step
        yield Choice("fused", count, False, seconds, f"{count} fused {1e3 * step:.2f} ms")
        yield Choice(
            "fused", count, True, COMPILING + seconds * rounds / COMPILED, f"{count} fused {1e3 * step:.2f} ms"
        )
        if at_once or count >= most or step > WORTH * before:
            return
        before, count = step, min(2 * count, most)
