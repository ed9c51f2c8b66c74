"""Choose an executor by short measurements (one by one, parallel processes, vectorized), and forecast the remaining time."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import torch

from mutransfer.devices import is_out_of_memory, limited_threads
from mutransfer.errors import RequestError
from mutransfer.proxies.training import Training
from mutransfer.recipe import Scale

from .jobs import Done, Events, Executor, RunContext, Session
from .vectorized.batch_training import NOT_FOR_ONE, Precision, Slot, VectorizedTraining, refusal

__all__ = [
    "Choice",
    "Forecast",
    "Timed",
    "TimedExecutor",
    "chosen",
    "fused_step",
    "run_seconds",
    "single_step",
]

ENOUGH = 0.4  # seconds of measurement
LEAST, MOST = 2, 50  # steps to measure


class Timed(NamedTuple):
    """Measured seconds of one step of one trial, and of the first steps, which include the time to compile."""

    step: float
    first: float


def single_step(
    context: RunContext, device: str, threads: int | None = None, compile: bool = False, scale: Scale | None = None
) -> Timed | None:
    """Time the steps of a single trial; return None if it cannot be compiled.

    Args:
        context: context of the experiment to measure.
        device: where to train.
        threads: number of CPU threads; unchanged if None.
        compile: whether to compile the model.
        scale: size of the model; the proxy's by default.
    """
    experiment = context.experiment
    plan = context.plan(scale or experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    with limited_threads(threads):
        training = Training(
            context.family, plan, context.required_data, steps=10**6, batch_size=experiment.batch_size,
            seed=experiment.seed, device=device, compile=compile,
        )  # fmt: skip
        try:
            return _timed(lambda: training.advance(training.step + 1), device)
        except Exception:
            if not compile:
                raise
            return None  # any error of the compiler, or no compiler


def fused_step(
    context: RunContext, count: int, device: str, precision: Precision = "float32", compile: bool = False
) -> Timed | None:
    """Time a step of ``count`` fused trials, divided by ``count``; None if memory is insufficient or they cannot be compiled."""
    experiment = context.experiment
    plan = context.plan(experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    slots = [Slot(plan, experiment.seed) for _ in range(count)]
    try:
        training = VectorizedTraining(
            context.family, slots, context.required_data, steps=10**6, batch_size=experiment.batch_size, device=device,
            precision=precision, clips=experiment.recipe.clip is not None or "clip" in experiment.search, compile=compile,
        )  # fmt: skip
        found = _timed(lambda: training.advance(1), device)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise
    return Timed(found.step / count, found.first) if training.compiles == compile else None


def _timed(step: Callable[[], None], device: str) -> Timed:
    """Time ``step``; the first two calls, which allocate, choose kernels and compile, are measured separately."""
    begun = perf_counter()
    for _ in range(2):
        step()
        _wait(device)
    first = perf_counter() - begun
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < ENOUGH and len(times) < MOST):
        _wait(device)
        begun = perf_counter()
        step()
        _wait(device)
        times.append(perf_counter() - begun)
    return Timed(statistics.median(times), first)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


How = Literal["one", "processes", "fused"]

VALIDATIONS = 2  # validations of a run: before its first step and after its last
FORWARD = 1 / 3  # cost of a forward pass relative to a training step: the backward pass costs twice as much


def _steps(context: RunContext) -> float:
    """Return how many training steps a run of the experiment is worth, its validations included."""
    examples = sum(len(targets) for _, targets in context.required_data.validation())
    return context.experiment.steps + VALIDATIONS * FORWARD * examples / context.experiment.batch_size


# Constants that are not measured, because a measurement would take longer than it saves.
START = 4.0  # seconds until processes have imported torch
SPOILED = 1.1  # slowdown of a process that runs in parallel with others
WORTH = 0.95  # doubling the number of fused trials must reduce the total time below this fraction
HOPED = 0.1  # share of the total time that the first doubling may gain
SHORT = 15.0  # seconds of work below which no alternative is measured
# Compilation takes from ten seconds to a minute for each executor. It is tried if more than LONG seconds of work are left and the
# measured steps promise that it pays off, and in any case above LONGER.
LONG, LONGER = 120.0, 400.0
FAR = 2.0  # an executor is also tried compiled if it is at most this many times slower than the fastest
# Compiling fused trials gains about the square of what compiling single ones gains: 1.8 and 1.3 at width 32.
SQUARE = 2.0
COMPILING = 20.0  # seconds that it takes to compile fused trials on a CPU
LEARNING = 3  # minimum number of batches in a study, so its sampler can learn from earlier ones
LARGEST = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class Choice:
    """How a sweep's trials are trained: ``seconds`` is the expected time for all of them, ``reason`` the measurements.

    ``step`` is the expected time of one step of one trial, in seconds.
    """

    how: How
    at_once: int
    compile: bool
    seconds: float
    reason: str
    step: float = 0.0

    def __str__(self) -> str:
        """Return the choice and the reason for it in one line."""
        return f"trials are trained {self.words}: {self.reason}."

    @property
    def words(self) -> str:
        """The choice as text, without the reason."""
        many = {
            "one": "one by one",
            "processes": f"in {self.at_once} processes",
            "fused": f"{self.at_once} at a time, fused",
        }
        return f"{many[self.how]}{', compiled' if self.compile else ''}"


@dataclass(frozen=True)
class _Work:
    """The trials to train, the device and precision for them, and whether the start of processes counts as done."""

    context: RunContext
    trials: int
    device: str
    precision: Precision
    started: bool

    def choice(self, how: How, at_once: int, compile: bool = False) -> Choice | None:
        """Measure one executor; return None if it cannot be used."""
        work, cores = self.trials * _steps(self.context), 1
        if how == "fused":
            found = fused_step(self.context, at_once, self.device, self.precision, compile)
        else:
            cores = at_once
            threads = 1 if how == "processes" else None
            found = single_step(self.context, self.device, threads, compile)
        if found is None:
            return None
        step = found.step * (SPOILED / cores if how == "processes" else 1.0)
        # The last round may leave slots idle, except for uncompiled fused trials, whose batch shrinks to those still running.
        filled = how == "one" or (how == "fused" and not compile)
        rounds = 1.0 if filled else math.ceil(self.trials / at_once) * at_once / self.trials
        seconds = (
            work * step * rounds
            + (START if how == "processes" and not self.started else 0.0)
            + (found.first if compile else 0.0)
        )
        choice = Choice(how, at_once, compile, seconds, "", step)
        about = "about " if how == "processes" else ""
        return replace(choice, reason=f"{about}{1e3 * step:.2f} ms {choice.words}")


def chosen(
    context: RunContext, trials: int, device: str = "cpu", *, at_once: int | None = None,
    precision: Precision = "float32", only: How | None = None, independent: bool = False, started: bool = False,
) -> Choice:  # fmt: skip
    """Return the fastest way to train ``trials`` trials of the experiment.

    Steps are measured one by one and fused, with an increasing number of trials at once as long as that is expected to gain more
    time than it takes to measure, and memory suffices. For processes, the time of a step on one thread is divided by the number
    of cores. If the fastest of these still takes minutes, it and those close to it are compiled and measured again, unless the
    gain of fusing, or that of compiling single trials, is too small for this to pay off.

    Args:
        context: context of the experiment whose proxy is trained.
        trials: number of trials to train.
        device: where to train.
        at_once: fixed number of trials at a time; chosen if None.
        precision: precision of fused trials; other than float32, only fused trials are considered.
        only: consider only this executor, and choose its number of trials and whether to compile.
        independent: any number of trials may run at once; otherwise, later ones are to learn from earlier ones.
        started: processes have been started already, or will be in any case.

    Raises:
        RequestError: the model cannot be trained.
    """
    work = _Work(context, trials, device, precision, started)
    found = list(_uncompiled(work, at_once, only, independent))
    if not found:
        raise RequestError(NOT_FOR_ONE)
    soonest = min(choice.seconds for choice in found)
    if soonest > (LONG if _compiling_promises(found) else LONGER):
        gain = math.inf  # of compiling a single trial, which is tried first; unlimited until it has been measured
        for how in dict.fromkeys(choice.how for choice in found):
            best = min((choice for choice in found if choice.how == how), key=lambda choice: choice.seconds)
            pays = how != "fused" or best.seconds / gain**SQUARE + COMPILING < min(choice.seconds for choice in found)
            if not pays or best.seconds > FAR * soonest or (again := work.choice(how, best.at_once, True)) is None:
                continue
            found.append(again)
            if how == "one" and device == "cpu":
                gain = max(1.0, best.step / again.step)
    best = min(found, key=lambda choice: choice.seconds)
    reason = f"a step of one trial takes {'; '.join(choice.reason for choice in found)}"
    why = refusal(context, device=device) if only in (None, "fused") else None
    return replace(best, reason=reason + (f"; they cannot be fused, as {why}" if why else ""))


def _compiling_promises(found: list[Choice]) -> bool:
    """Return whether compiling is likely to pay off, judging by what fusing gains: both save the launches of operations.

    Compiling gains single trials at most the square root of what fusing gains, and fused trials at most the same as fusing. At
    width 32, fusing gained 2.1, and compiling 1.3 (single trials) and 1.8 (fused); at width 256, 1.25, 1.07 and 1.1.
    """
    steps = {how: min((each.step for each in found if each.how == how), default=0.0) for how in ("one", "fused")}
    if not all(steps.values()):
        return False
    gain = max(1.0, math.sqrt(steps["one"] / steps["fused"]))
    compiled = (each.seconds / gain ** (SQUARE if each.how == "fused" else 1.0) for each in found)
    return min(compiled) + COMPILING < min(each.seconds for each in found)


def _uncompiled(work: _Work, at_once: int | None, only: How | None, independent: bool) -> Iterator[Choice]:
    fusable = refusal(work.context, device=work.device) is None
    unfused = (only is None and work.precision == "float32") or not fusable
    if unfused or only == "one":
        one = work.choice("one", 1)
        assert one is not None
        yield one
        if one.seconds < SHORT and only is None and at_once is None:
            return
    if work.device == "cpu" and (unfused or only == "processes"):
        cores = min(at_once or len(os.sched_getaffinity(0)), work.trials)
        if cores > 1 and (side_by_side := work.choice("processes", cores)) is not None:
            yield side_by_side
    if fusable and only in (None, "fused"):
        yield from _fused(work, at_once, 1 if independent else LEARNING)


def _fused(work: _Work, at_once: int | None, batches: int) -> Iterator[Choice]:
    """Measure fused trials, more and more at once as long as that is expected to gain more time than it takes to measure.

    A step of K fused trials takes a + b·K, so each doubling of K gains half as much per trial as the one before it.
    """
    most = min(LARGEST["cuda" if work.device.startswith("cuda") else "cpu"], max(2, work.trials // batches))
    before = math.inf
    count = max(1, min(at_once, work.trials)) if at_once else min(4, most)
    begun = perf_counter()
    while (choice := work.choice("fused", count)) is None and math.isinf(before) and count > 1:
        count //= 2  # not enough memory
        at_once = at_once and count
        begun = perf_counter()
    while choice is not None:
        yield choice
        took = perf_counter() - begun
        gain = HOPED * choice.seconds if math.isinf(before) else (before - choice.seconds) / 2
        if at_once or count >= most or choice.seconds > WORTH * before or 2 * took > gain:
            return
        before, count, begun = choice.seconds, min(2 * count, most), perf_counter()
        choice = work.choice("fused", count)


UNSURE = 10.0  # seconds of work during which the forecast has more weight than the clock


class Forecast:
    """Forecast of the time that a sequence of phases takes.

    Args:
        phases: name → expected seconds, in order.
        clock: returns the current time in seconds.
    """

    def __init__(self, phases: Mapping[str, float], clock: Callable[[], float] = perf_counter) -> None:
        self._open = dict(phases)
        self._current, self._rest = "", 0.0
        self._done = 0.0
        self._clock, self._begun = clock, clock()

    def begin(self, name: str) -> None:
        """Begin a phase; the current phase has then ended, and the phases in between are skipped."""
        self._done += self._rest
        while self._open and (first := next(iter(self._open))) != name:
            self._open.pop(first)
        self._current, self._rest = name, self._open.pop(name)

    def note(self, seconds: float) -> None:
        """Record work of the current phase that was expected to take ``seconds``."""
        done = min(seconds, self._rest)
        self._rest -= done
        self._done += done

    def left(self) -> float:
        """Return the remaining seconds of all phases, at the pace of the work done so far."""
        pace = (self._clock() - self._begun + UNSURE) / (self._done + UNSURE)
        if not self._done:  # the pace is not known yet
            return max(0.0, self._rest + sum(self._open.values()) - (self._clock() - self._begun))
        return pace * (self._rest + sum(self._open.values()))


class TimedExecutor(Executor):
    """Executor that wraps another one and records its finished runs in a forecast.

    Args:
        inner: the executor that trains the runs.
        forecast: forecast of the phases that the runs belong to.
        seconds: expected seconds of a whole run at each scale; of runs that are trained together, their time divided by their
            number.
    """

    def __init__(self, inner: Executor, forecast: Forecast, seconds: Mapping[Scale, float]) -> None:
        self.inner, self.forecast, self.seconds = inner, forecast, seconds

    @property
    def capacity(self) -> int:
        """See `Executor`."""
        return self.inner.capacity

    def expect(self, jobs: int, *, independent: bool = False) -> None:
        """See `Executor`."""
        self.inner.expect(jobs, independent=independent)

    def within(self, folder: Path) -> TimedExecutor:
        """See `Executor`."""
        return TimedExecutor(self.inner.within(folder), self.forecast, self.seconds)

    def events(self, session: Session) -> Events:
        """See `Executor`."""
        for event in self.inner.events(session):
            if isinstance(event, Done):
                share = event.outcome.steps / session.experiment.steps
                self.forecast.note(share * self.seconds.get(event.job.scale, 0.0))
            yield event


def run_seconds(context: RunContext, scale: Scale, device: str = "cpu", threads: int | None = None) -> float:
    """Return the expected seconds of one run of the experiment at ``scale``, measured from a few of its steps.

    Raises:
        RequestError: the model cannot be trained.
    """
    measured = single_step(context, device, threads, scale=scale)
    assert measured is not None
    return measured.first + measured.step * _steps(context)
