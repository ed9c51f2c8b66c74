"""Jobs of one scale that run together: each is looked at on its own rungs, and who ends makes room for the next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mutransfer.proxies.training import Outcome

from ..jobs import Job, Report, Reported
from .training import FusedTraining, Place, Snapshot

__all__ = ["Batch", "Running"]

LONGEST = 25  # steps between looks, so that trials that are lost are soon replaced


@dataclass
class Running:
    """A job on its way: ``start`` is its loss before the first step, ``told`` its reports, ``seconds`` its share of the time."""

    job: Job
    course: str
    place: Place
    snapshot: Snapshot | None = None
    start: float | None = None
    told: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def outcome(self, loss: float, stopped: bool) -> Outcome:
        """Return how it ended."""
        assert self.start is not None
        return Outcome(loss, self.start, self.place.step, stopped, self.seconds)

    def entry(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return what `resume` needs, as plain data."""
        return {**snapshot, "start": self.start, "told": list(self.told), "seconds": self.seconds}

    def resume(self, entry: dict[str, Any]) -> None:
        """Go on from an entry when it is put in a place."""
        self.snapshot = {"step": entry["step"], "tensors": entry["tensors"]}
        self.place.step = entry["step"]
        self.start, self.told, self.seconds = entry["start"], [tuple(pair) for pair in entry["told"]], entry["seconds"]


class Batch:
    """Jobs in a `FusedTraining`, one in each place; a place without a job waits for one.

    Args:
        make: a training of some jobs.
        jobs: those to begin with, in the order of their places.
        report: asked at rungs, of all that are at one; True stops a job.
    """

    def __init__(
        self, make: Callable[[Sequence[Running]], FusedTraining], jobs: Sequence[Running], report: Report | None
    ) -> None:
        self.report = report
        self.training = make(jobs)
        self.running: list[Running | None] = list(jobs)

    @property
    def live(self) -> list[Running]:
        """The jobs that run."""
        return [each for each in self.running if each is not None]

    @property
    def free(self) -> list[int]:
        """The places that wait."""
        return [index for index, each in enumerate(self.running) if each is None]

    def put(self, index: int, running: Running) -> None:
        """Begin, or go on with, a job in a free place."""
        self.training.begin(index, running.place, running.snapshot)
        running.snapshot = None
        self.running[index] = running

    def compact(self) -> None:
        """Give up free places, if what is left is then faster: a compiled step is of one size, so it must lose half."""
        kept = [index for index, each in enumerate(self.running) if each is not None]
        if len(kept) < len(self.running) and (not self.training.compiles or 2 * len(kept) <= len(self.running)):
            self.training.keep(kept)
            self.running = [self.running[index] for index in kept]

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the jobs that run as plain data, by their courses."""
        return {each.course: each.entry(self.training.snapshot(index)) for index, each in self._places()}

    def taken_out(self) -> list[Running]:
        """Return the jobs that run, each with all that it needs to go on elsewhere, or to begin again."""
        for index, each in self._places():
            if each.place.step > 0:
                each.snapshot = self.training.snapshot(index)
        return self.live

    def go(self) -> tuple[list[tuple[Job, Outcome]], bool]:
        """Train up to the next rung or end of any job; return those that have ended, and whether there was a rung."""
        self._start()
        steps = self.training.steps
        ahead = min(
            min(mark for mark in (*r.place.marks, steps) if mark > r.place.step) - r.place.step for r in self.live
        )
        with self._shared():
            self.training.advance(min(ahead, LONGEST))
        due = [
            i for i, each in self._places() if not each.place.finite or each.place.step in (*each.place.marks, steps)
        ]
        whole = [i for i in due if self.training.places[i].finite]
        with self._shared():
            losses = dict(zip(whole, self.training.validate(whole), strict=True)) if whole else {}
        return self._judged({index: losses.get(index, math.nan) for index in due}), bool(losses)

    def _start(self) -> None:
        fresh = [index for index, each in self._places() if each.start is None]
        if fresh:
            with self._shared():
                losses = self.training.validate(fresh)
            for index, loss in zip(fresh, losses, strict=True):
                self.running[index].start = loss  # type: ignore[union-attr]

    def _judged(self, losses: dict[int, float]) -> list[tuple[Job, Outcome]]:
        """Take out what has ended, as `proxies.training.train` does at a rung and at the end; all at a rung report together."""
        at_rung = {
            index: Reported(running.job, running.place.step, losses[index])
            for index, running in self._places()
            if math.isfinite(losses.get(index, math.nan)) and running.place.step < self.training.steps
        }
        answers = self.report(list(at_rung.values())) if self.report is not None and at_rung else []
        stopped = {index for index, stop in zip(at_rung, answers, strict=False) if stop}
        ended = []
        for index in losses:
            running = self.running[index]
            assert running is not None
            if index in at_rung:
                running.told.append((running.place.step, losses[index]))
            if index not in at_rung or index in stopped:
                ended.append((running.job, running.outcome(losses[index], stopped=index in stopped)))
                self.running[index] = None
        return ended

    def _places(self) -> Iterator[tuple[int, Running]]:
        return ((index, each) for index, each in enumerate(self.running) if each is not None)

    def _shared(self) -> _Shared:
        return _Shared(self.live)


class _Shared:
    """Counts the time inside of it towards all jobs alike."""

    def __init__(self, jobs: list[Running]) -> None:
        self.jobs = jobs

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        for each in self.jobs:
            each.seconds += (time.perf_counter() - self.begun) / len(self.jobs)
