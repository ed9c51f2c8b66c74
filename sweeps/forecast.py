"""How long a sequence of phases will still take: counted before they begin, corrected by what has been done since."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from mutransfer.proxies.training import Outcome
from mutransfer.scale import Scale

from .autoselect import single_step
from .experiment import Experiment
from .jobs import Executor, Job, Report, family_of

__all__ = ["Forecast", "Watched", "run_seconds"]

UNSURE = 10.0  # seconds of work for which the forecast is believed rather than the clock
VALIDATIONS = 2  # of a run: before its first step and after its last
FORWARD = 1 / 3  # of a training step, whose backward pass costs twice as much


class Forecast:
    """Seconds that a sequence of phases takes, each expected to take so long by itself.

    Args:
        phases: name → expected seconds, in the order in which they come.
        clock: seconds.
    """

    def __init__(self, phases: Mapping[str, float], clock: Callable[[], float] = time.perf_counter) -> None:
        self._open = dict(phases)
        self._current, self._rest = "", 0.0
        self._done = 0.0
        self._clock, self._begun = clock, clock()

    def begin(self, name: str) -> None:
        """Begin a phase; the one before has ended, and those between are left out."""
        self._done += self._rest
        while self._open and (first := next(iter(self._open))) != name:
            self._open.pop(first)
        self._current, self._rest = name, self._open.pop(name)

    def note(self, seconds: float) -> None:
        """Count work of the current phase that was expected to take ``seconds``."""
        done = min(seconds, self._rest)
        self._rest -= done
        self._done += done

    def left(self) -> float:
        """Return the seconds until all phases have ended, at the pace of what has been done so far."""
        pace = (self._clock() - self._begun + UNSURE) / (self._done + UNSURE)
        if not self._done:  # nothing is known of the pace yet
            return max(0.0, self._rest + sum(self._open.values()) - (self._clock() - self._begun))
        return pace * (self._rest + sum(self._open.values()))


class Watched:
    """Another executor, whose finished runs a forecast is told of.

    Args:
        inner: does the runs.
        forecast: of phases in which the runs are done.
        seconds: of a whole run at each scale, by itself.
    """

    def __init__(self, inner: Executor, forecast: Forecast, seconds: Mapping[Scale, float]) -> None:
        self.inner, self.forecast, self.seconds = inner, forecast, seconds

    @property
    def capacity(self) -> int:
        """See `Executor`."""
        return self.inner.capacity

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`."""
        for job, outcome in self.inner.run(experiment, jobs, report):
            share = outcome.steps / experiment.steps / self.inner.capacity
            self.forecast.note(share * self.seconds.get(job.scale, 0.0))
            yield job, outcome


def run_seconds(experiment: Experiment, scale: Scale, device: str = "cpu", threads: int | None = None) -> float:
    """Return the seconds that one run of ``experiment`` takes at ``scale``, from a few of its steps.

    Raises:
        RequestError: the model cannot be trained.
    """
    measured = single_step(experiment, device, threads, scale=scale)
    assert measured is not None
    held_out = FORWARD * len(family_of(experiment)[1].validation())
    return measured.first + measured.step * (experiment.steps + VALIDATIONS * held_out)
