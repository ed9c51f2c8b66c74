"""How long a training step of one trial takes, one by one and fused: short measurements on the machine at hand."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from mutransfer.proxies.training import Training

from .experiment import Experiment
from .fusing.memory import is_out_of_memory
from .fusing.training import FusedTraining, Place
from .jobs import family_of, plan_of

__all__ = ["fused_step", "single_step"]

ENOUGH = 0.4  # seconds of measuring; at least three steps
LEAST, MOST = 3, 50


def single_step(experiment: Experiment, device: str, threads: int | None = None) -> float:
    """Return the seconds of one step of one trial by itself, with ``threads`` on the CPU (those set if None)."""
    family, data = family_of(experiment)
    plan = plan_of(experiment, experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    with _threads(threads):
        training = Training(
            family, plan, data, steps=10**6, batch_size=experiment.batch_size, seed=experiment.seed, device=device
        )
        return _median(lambda: training.advance(training.step + 1), device)


def fused_step(experiment: Experiment, count: int, device: str, precision: torch.dtype | None = None) -> float | None:
    """Return the seconds of one step of ``count`` fused trials, over ``count``; None if memory does not suffice."""
    family, data = family_of(experiment)
    plan = plan_of(experiment, experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    places = [Place(plan, experiment.seed) for _ in range(count)]
    try:
        training = FusedTraining(
            family, places, data, steps=10**6, batch_size=experiment.batch_size, device=device, precision=precision,
            clips=experiment.recipe.clip is not None or "clip" in experiment.search,
        )  # fmt: skip
        return _median(lambda: training.advance(1), device) / count
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise


def _median(step: Callable[[], None], device: str) -> float:
    """The first steps allocate and choose kernels, and are not counted."""
    for _ in range(2):
        step()
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < ENOUGH and len(times) < MOST):
        _wait(device)
        begun = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
