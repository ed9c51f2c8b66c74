"""How long a training step of one trial takes, one by one and fused: short measurements on the machine at hand."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from mutransfer.proxies.training import Training
from mutransfer.scale import Scale

from .experiment import Experiment
from .fusing.memory import is_out_of_memory
from .fusing.training import FusedTraining, Place
from .jobs import family_of, plan_of

__all__ = ["Timed", "fused_step", "limited", "single_step"]

ENOUGH = 0.4  # seconds of measuring; at least three steps
LEAST, MOST = 3, 50


class Timed(NamedTuple):
    """Seconds of one step of one trial, and seconds until the first was done: to compile, above all."""

    step: float
    first: float


def single_step(
    experiment: Experiment, device: str, threads: int | None = None, compile: bool = False, scale: Scale | None = None
) -> Timed | None:
    """Time one trial by itself, with ``threads`` on the CPU (those set if None); None if it cannot be compiled.

    ``scale`` is the proxy's by default.
    """
    family, data = family_of(experiment)
    plan = plan_of(experiment, scale or experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    with limited(threads):
        training = Training(
            family, plan, data, steps=10**6, batch_size=experiment.batch_size, seed=experiment.seed, device=device,
            compile=compile,
        )  # fmt: skip
        try:
            return _timed(lambda: training.advance(training.step + 1), device)
        except Exception:
            if not compile:
                raise
            return None  # whatever a compiler raises, or the want of one


def fused_step(
    experiment: Experiment, count: int, device: str, precision: torch.dtype | None = None, compile: bool = False
) -> Timed | None:
    """Time ``count`` fused trials, over ``count``; None if memory does not suffice, or if they cannot be compiled."""
    family, data = family_of(experiment)
    plan = plan_of(experiment, experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    places = [Place(plan, experiment.seed) for _ in range(count)]
    try:
        training = FusedTraining(
            family, places, data, steps=10**6, batch_size=experiment.batch_size, device=device, precision=precision,
            clips=experiment.recipe.clip is not None or "clip" in experiment.search, compile=compile,
        )  # fmt: skip
        found = _timed(lambda: training.advance(1), device)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise
    return Timed(found.step / count, found.first) if training.compiles == compile else None


def _timed(step: Callable[[], None], device: str) -> Timed:
    """The first steps allocate, choose kernels and compile; they are not counted with the others."""
    begun = time.perf_counter()
    for _ in range(2):
        step()
    _wait(device)
    first = time.perf_counter() - begun
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < ENOUGH and len(times) < MOST):
        _wait(device)
        begun = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return Timed(statistics.median(times), first)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextlib.contextmanager
def limited(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads on the CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
