"""The executor that trains many jobs as one program."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch

from mutransfer.errors import RequestError
from mutransfer.proxies.training import Outcome
from mutransfer.scale import Scale

from ..experiment import Experiment
from ..jobs import Job, OneByOne, Report, alone, family_of, plan_of
from .batch import Batch, Running
from .checkpoint import Checkpoints, course_of
from .memory import NOT_FOR_ONE, is_out_of_memory
from .refusing import refusal
from .training import FusedTraining, Place, Step

__all__ = ["Fused", "Precision"]

Precision = Literal["float32", "bfloat16"]
# Of an experiment, what its training step does not depend on.
NOT_COMPILED = {
    "trials", "search", "recipe", "steps", "seed", "sampler", "pruner", "rungs", "budget", "repeats",
}  # fmt: skip


class Fused:
    """``count`` jobs as one program, in this process.

    Jobs of another scale than those that run wait until these have ended. What cannot be fused is done one by one, with a
    line on stderr that says why; where memory does not suffice, half as many go on.

    Args:
        count: how many at a time.
        device: where to train.
        precision: of matrix products; bfloat16 is `torch.autocast`, weights and optimizer states stay float32.
        compile: compile the training step, which takes from ten seconds to a minute for each scale.
        checkpoints: where running trials are saved at rungs; nowhere if None.
    """

    def __init__(
        self, count: int, device: str = "cpu", *, precision: Precision = "float32", compile: bool = False,
        checkpoints: Checkpoints | None = None,
    ) -> None:  # fmt: skip
        self.capacity = count
        self.device, self.precision, self.compile, self.checkpoints = device, precision, compile, checkpoints
        self._known: dict[str, dict[str, Step | None]] = {}

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`."""
        source = _Source(iter(jobs))
        while (scale := source.scale()) is not None:
            reason = refusal(experiment, scale, self.device)
            if reason is None:
                yield from self._together(experiment, scale, source, report)
            else:
                _say(f"trials at width {scale.width} run one by one: {reason}.")
                yield from OneByOne(self.device).run(experiment, source.all_of(scale), report)
        if self.checkpoints is not None:
            self.checkpoints.clear()

    def _together(
        self, experiment: Experiment, scale: Scale, source: _Source, report: Report | None
    ) -> Iterator[tuple[Job, Outcome]]:
        """Do jobs of one scale until the next is of another, or there are none."""
        waiting: list[Running] = []
        batch: Batch | None = None
        clips = experiment.recipe.clip is not None or "clip" in experiment.search
        while True:
            room = self.capacity - len(waiting) - (len(batch.live) if batch else 0)
            for job in source.several_of(scale, room):
                waiting.append(running := self._running(experiment, job))
                if stopped := self._replayed(running, report):
                    waiting.pop()
                    yield job, stopped
            if not waiting and (batch is None or not batch.live):
                return
            try:
                if batch is None:
                    first = waiting[: self.capacity]
                    batch = Batch(lambda jobs: self._training(experiment, jobs, clips), first, report)
                    del waiting[: len(first)]
                for index in batch.free[: len(waiting)]:
                    batch.put(index, waiting[0])
                    waiting.pop(0)
                batch.compact()
                ended, rung = batch.go()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                waiting, batch, ended, rung = self._halved(batch, waiting, error), None, [], False
            yield from ended
            if rung and batch is not None:
                self._save(batch, waiting)

    def _running(self, experiment: Experiment, job: Job) -> Running:
        plan = plan_of(experiment, job.scale, job.parametrization, job.recipe)
        marks = frozenset(rung for rung in job.rungs if 0 < rung < experiment.steps)
        sha256 = family_of(experiment)[1].sha256
        course = course_of(experiment, plan, job.seed, sha256, self.precision) if self.checkpoints else ""
        running = Running(job, course, Place(plan, job.seed, marks))
        if self.checkpoints is not None and (entry := self.checkpoints.take(course)) is not None:
            running.resume(entry)
        return running

    def _replayed(self, running: Running, report: Report | None) -> Outcome | None:
        """Tell a trial that goes on after a kill what it reported before; it may be stopped there now."""
        for step, loss in running.told if report is not None else []:
            assert report is not None
            if alone(report, running.job)(step, loss):
                running.place.step = step
                return running.outcome(loss, stopped=True)
        return None

    def _training(self, experiment: Experiment, jobs: Sequence[Running], clips: bool) -> FusedTraining:
        family, data = family_of(experiment)
        same = experiment.model_dump_json(exclude=NOT_COMPILED)
        known = self._known.setdefault(f"{same} at {jobs[0].job.scale}, {len(jobs)} at once", {})
        training = FusedTraining(
            family, [each.place for each in jobs], data, steps=experiment.steps, batch_size=experiment.batch_size,
            device=self.device, precision=torch.bfloat16 if self.precision == "bfloat16" else None,
            clips=clips or any(each.job.recipe.clip is not None for each in jobs),
            # A program is of one size: it pays where all places are filled again and again.
            compile=self.compile and len(jobs) == self.capacity, known=known, snapshots=[each.snapshot for each in jobs],
        )  # fmt: skip
        for each in jobs:
            each.snapshot = None
        return training

    def _halved(self, batch: Batch | None, waiting: list[Running], error: Exception) -> list[Running]:
        """Take all out that can go on, and make room for half as many."""
        running = batch.taken_out() if batch is not None else []
        at_once = len(running) or min(len(waiting), self.capacity)
        if at_once <= 1:
            raise RequestError(NOT_FOR_ONE) from error
        self.capacity = at_once // 2
        _say(f"out of memory with {at_once} trials at once: going on with {self.capacity}.")
        if self.device != "cpu":
            torch.cuda.empty_cache()
        return [*running, *waiting]

    def _save(self, batch: Batch, waiting: Sequence[Running]) -> None:
        if self.checkpoints is not None and self.checkpoints.due():
            halted = {each.course: each.entry(each.snapshot) for each in waiting if each.snapshot is not None}
            self.checkpoints.save({**halted, **batch.entries()})


class _Source:
    """Jobs as they are asked for, with one look ahead."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self._ahead: Job | None = None

    def scale(self) -> Scale | None:
        """Return the next job's scale, or None if there is no next one."""
        if self._ahead is None:
            self._ahead = next(self._jobs, None)
        return None if self._ahead is None else self._ahead.scale

    def several_of(self, scale: Scale, count: int) -> Iterator[Job]:
        """Hand out at most ``count`` jobs, as long as they are of ``scale``."""
        while count > 0 and self.scale() == scale:
            assert self._ahead is not None
            job, self._ahead = self._ahead, None
            count -= 1
            yield job

    def all_of(self, scale: Scale) -> Iterator[Job]:
        """Hand out jobs one by one, as long as they are of ``scale``."""
        return self.several_of(scale, sys.maxsize)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
