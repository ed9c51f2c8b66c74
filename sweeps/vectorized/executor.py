"""Executor that trains many jobs as one program: each job is pruned at its own rungs, and a finished job frees its slot.

Running trials are saved, so a killed sweep can resume in the middle of them: one file per batch, named by its hash, replaces the
previous one. A saved trial is identified by everything that its course of training depends on, not by its number, since the
study retries a killed trial under another number.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mutransfer.devices import is_out_of_memory
from mutransfer.errors import RequestError
from mutransfer.io import write_bytes
from mutransfer.planning.plan import Plan
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Scale

from ..experiment import Experiment
from ..jobs import Done, Events, Executor, Job, Report, Reports, RunContext, SequentialExecutor, Session
from .batch_training import NOT_FOR_ONE, Precision, Slot, Snapshot, VectorizedTraining, refusal
from .compile import Step

__all__ = ["SlotBatch", "Checkpoints", "VectorizedExecutor", "Running", "course_of"]

logger = logging.getLogger(__name__)

LONGEST = 25  # maximum number of steps between checks, so diverged trials are soon replaced


@dataclass
class Running:
    """A running job.

    Attributes:
        job: the job.
        course: hash that identifies its course of training (`course_of`).
        slot: its state in the `VectorizedTraining`.
        snapshot: its tensors while it is in no slot.
        start: validation loss before the first step.
        reported: (step, loss) of each report so far.
        seconds: its share of the training time.
    """

    job: Job
    course: str
    slot: Slot
    snapshot: Snapshot | None = None
    start: float | None = None
    reported: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def outcome(self, loss: float, stopped: bool) -> Outcome:
        """Return the outcome of the job that ends with ``loss``."""
        assert self.start is not None
        return Outcome(loss, self.start, self.slot.step, stopped, self.seconds)

    def entry(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return what `resume` needs, as plain data."""
        return {**snapshot, "start": self.start, "reported": list(self.reported), "seconds": self.seconds}

    def resume(self, entry: dict[str, Any]) -> None:
        """Set the state from an entry; training continues once the job is put in a slot."""
        self.snapshot = {"step": entry["step"], "tensors": entry["tensors"]}
        self.slot.step = entry["step"]
        self.start, self.reported, self.seconds = (
            entry["start"],
            [tuple(pair) for pair in entry["reported"]],
            entry["seconds"],
        )


class SlotBatch:
    """Jobs in the slots of a `VectorizedTraining`; free slots can be filled with further jobs.

    Args:
        make: returns a training of the given jobs.
        jobs: initial jobs, in the order of their slots.
    """

    def __init__(self, make: Callable[[Sequence[Running]], VectorizedTraining], jobs: Sequence[Running]) -> None:
        self.training = make(jobs)
        self.running: list[Running | None] = list(jobs)

    @property
    def live(self) -> list[Running]:
        """The running jobs."""
        return [each for each in self.running if each is not None]

    @property
    def free(self) -> list[int]:
        """The indices of the free slots."""
        return [index for index, each in enumerate(self.running) if each is None]

    def put(self, index: int, running: Running) -> None:
        """Start or continue a job in a free slot."""
        self.training.begin(index, running.slot, running.snapshot)
        running.snapshot = None
        self.running[index] = running

    def compact(self) -> None:
        """Remove free slots if that is faster: for a step of fixed size, only if at least half are free.

        A captured step is captured again for every size, which then happens at most log2(K) times.
        """
        kept = [index for index, each in enumerate(self.running) if each is not None]
        if len(kept) < len(self.running) and (not self.training.is_fixed or 2 * len(kept) <= len(self.running)):
            self.training.keep(kept)
            self.running = [self.running[index] for index in kept]

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the running jobs as plain data, by their courses."""
        places = dict(self._places())
        snapshots = self.training.snapshots(list(places))
        return {each.course: each.entry(snap) for each, snap in zip(places.values(), snapshots, strict=True)}

    def taken_out(self) -> list[Running]:
        """Return the running jobs, each with a snapshot to continue from, or without one if it has not done a step yet.

        The batch must not be used afterwards.
        """
        begun = {index: each for index, each in self._places() if each.slot.step > 0}
        for each, snapshot in zip(begun.values(), self.training.snapshots(list(begun), last=True), strict=True):
            each.snapshot = snapshot
        return self.live

    def go(self) -> dict[int, float]:
        """Train up to the next rung or end of any job, for at most `LONGEST` steps.

        Returns:
            Slot → validation loss of the jobs that are at a rung or at their end; NaN for those that have diverged.
        """
        self._start()
        steps = self.training.steps
        ahead = min(min(mark for mark in (*r.slot.marks, steps) if mark > r.slot.step) - r.slot.step for r in self.live)
        with self._shared():
            self.training.advance(min(ahead, LONGEST))
        due = [i for i, each in self._places() if not each.slot.finite or each.slot.step in (*each.slot.marks, steps)]
        whole = [i for i in due if self.training.slots[i].finite]
        with self._shared():
            losses = dict(zip(whole, self.training.validate(whole), strict=True)) if whole else {}
        return {index: losses.get(index, math.nan) for index in due}

    def _start(self) -> None:
        """Set the loss before the first step of new jobs; jobs that start with the same weights share it."""
        alike: dict[Any, list[Running]] = {}
        first: list[int] = []
        for index, each in self._places():
            if each.start is None:
                weights = each.slot.seed, tuple((row.init, row.density) for row in each.slot.plan.rows)
                if weights not in alike:
                    first.append(index)
                alike.setdefault(weights, []).append(each)
        if first:
            with self._shared():
                losses = self.training.validate(first)
            for jobs, loss in zip(alike.values(), losses, strict=True):
                for each in jobs:
                    each.start = loss

    def at_rung(self, losses: dict[int, float]) -> dict[int, Report]:
        """Return the reports of the jobs that are at a rung and may continue, given the ``losses`` of `go`."""
        return {
            index: Report(running.job, running.slot.step, losses[index])
            for index, running in self._places()
            if math.isfinite(losses.get(index, math.nan)) and running.slot.step < self.training.steps
        }

    def ended(self, losses: dict[int, float], stopped: Callable[[Any], bool]) -> list[Done]:
        """Remove and return the jobs that have ended, as `proxies.training.train` does; ``stopped`` is asked by a job's key."""
        at_rung = self.at_rung(losses)
        found = []
        for index, loss in losses.items():
            running = self.running[index]
            assert running is not None
            stop = index in at_rung and stopped(running.job.key)
            if index in at_rung:
                running.reported.append((running.slot.step, loss))
            if index not in at_rung or stop:
                found.append(Done(running.job, running.outcome(loss, stopped=stop)))
                self.running[index] = None
        return found

    def _places(self) -> Iterator[tuple[int, Running]]:
        return ((index, each) for index, each in enumerate(self.running) if each is not None)

    def _shared(self) -> _Shared:
        return _Shared(self.live)


class _Shared:
    """Context manager that divides the time spent inside equally among ``jobs``."""

    def __init__(self, jobs: list[Running]) -> None:
        self.jobs = jobs

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        for each in self.jobs:
            each.seconds += (time.perf_counter() - self.begun) / len(self.jobs)


# Keys of an experiment that its compiled training step does not depend on.
NOT_COMPILED = {
    "trials", "search", "recipe", "steps", "seed", "sampler", "pruner", "rungs", "budget", "repeats",
}  # fmt: skip


class VectorizedExecutor(Executor):
    """Executor that trains ``count`` jobs as one program in this process.

    Jobs of another scale, or of a parametrization with other forward multipliers, wait until the running jobs have ended. Jobs
    that cannot be fused are trained one by one, and a line on stderr gives the reason. If memory is insufficient, training
    continues with half as many jobs at a time.

    Args:
        count: number of jobs at a time.
        device: where to train.
        precision: precision of matrix products; bfloat16 uses `torch.autocast`, with weights and optimizer states in float32.
        compile: compile the training step, which takes from ten seconds to a minute for each scale.
        checkpoints: where running trials are saved, at rungs and every 25 steps; None disables checkpoints.

    Attributes:
        programs: compiled steps by name, for each experiment, scale and number of jobs; None where compiling failed.
    """

    def __init__(
        self, count: int, device: str = "cpu", *, precision: Precision = "float32", compile: bool = False,
        checkpoints: Checkpoints | None = None,
    ) -> None:  # fmt: skip
        self._capacity = self._count = count
        self._fitting: dict[Scale, int] = {}  # the number that fits into memory, where that is less
        self.device, self.precision, self.compile, self.checkpoints = device, precision, compile, checkpoints
        self.programs: dict[str, dict[str, Step | None]] = {}

    @property
    def capacity(self) -> int:
        """See `Executor`; at a scale for which memory does not suffice, half as many, or half of that, and so on."""
        return self._capacity

    def events(self, session: Session) -> Events:
        """See `Executor`."""
        while (job := (yield from session.peek())) is not None:
            scale = job.scale
            self._capacity = self._fitting.get(scale, self._count)
            reason = refusal(session.context, scale, self.device)
            if reason is None:
                yield from self._together(session, job)
            else:
                logger.info(f"trials at width {scale.width} run one by one: {reason}.")
                yield from self._one_by_one(session, scale)
        if self.checkpoints is not None:
            self.checkpoints.clear()

    def _one_by_one(self, session: Session, scale: Scale) -> Events:
        """Train jobs of one scale until the next job has another scale or there is none."""
        alone = SequentialExecutor(self.device)
        while jobs := (yield from session.take(1, lambda job: job.scale == scale)):
            yield from alone.train(session, jobs[0])

    def _together(self, session: Session, first: Job) -> Events:
        """Train jobs with the structure of the ``first`` at the same time, until the next job has another or there is none."""
        experiment, scale = session.experiment, first.scale
        structure = _structure(session.context, first)
        waiting: list[Running] = []
        batch: SlotBatch | None = None
        clips = experiment.recipe.clip is not None or "clip" in experiment.search
        while True:
            room = self.capacity - len(waiting) - (len(batch.live) if batch else 0)
            for job in (yield from session.take(room, lambda job: _structure(session.context, job) == structure)):
                running = self._running(session.context, job)
                if (stopped := (yield from self._replayed(running, session))) is not None:
                    yield Done(running.job, stopped)
                else:
                    waiting.append(running)
            if not waiting and (batch is None or not batch.live):
                return
            short = False
            try:
                if batch is None:
                    fitting = waiting[: self.capacity]
                    batch = SlotBatch(lambda jobs: self._training(session.context, jobs, clips), fitting)
                    del waiting[: len(fitting)]
                for index in batch.free[: len(waiting)]:
                    batch.put(index, waiting[0])
                    waiting.pop(0)
                batch.compact()
                losses = batch.go()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(scale, len(batch.live) if batch else min(len(waiting), self.capacity), error)
                short = True
            if short:
                # The memory of the step is free only now: until the end of the handler, the error's traceback holds it.
                waiting, batch = [*(batch.taken_out() if batch else ()), *waiting], None
                if self.device != "cpu":
                    torch.cuda.empty_cache()
                continue
            assert batch is not None
            if reports := tuple(batch.at_rung(losses).values()):
                yield Reports(reports)
            yield from batch.ended(losses, session.is_stopped)
            if batch.live:
                self._save(batch, waiting)

    def _running(self, context: RunContext, job: Job) -> Running:
        experiment, plan = context.experiment, context.plan(job.scale, job.parametrization, job.recipe)
        marks = frozenset(rung for rung in job.rungs if 0 < rung < experiment.steps)
        sha256 = context.required_data.sha256
        course = course_of(experiment, plan, job.seed, sha256, self.precision) if self.checkpoints else ""
        running = Running(job, course, Slot(plan, job.seed, marks))
        if self.checkpoints is not None and (entry := self.checkpoints.take(course)) is not None:
            running.resume(entry)
        return running

    def _replayed(self, running: Running, session: Session) -> Generator[Reports, None, Outcome | None]:
        """Repeat the earlier reports of a resumed trial; return its outcome if it is now stopped at one of them."""
        for step, loss in running.reported:
            yield Reports((Report(running.job, step, loss),))
            if session.is_stopped(running.job.key):
                running.slot.step = step
                return running.outcome(loss, stopped=True)
        return None

    def _training(self, context: RunContext, jobs: Sequence[Running], clips: bool) -> VectorizedTraining:
        experiment = context.experiment
        same = f"{experiment.model_dump_json(exclude=NOT_COMPILED)} by {experiment.recipe.method.name}"
        known = self.programs.setdefault(f"{same} at {jobs[0].job.scale}, {len(jobs)} at once", {})
        training = VectorizedTraining(
            context.family, [each.slot for each in jobs], context.required_data, steps=experiment.steps,
            batch_size=experiment.batch_size, device=self.device,
            precision=self.precision,
            clips=clips or any(each.job.recipe.clip is not None for each in jobs),
            # A program has a fixed size: compiling pays off only if all slots are refilled again and again.
            compile=self.compile and len(jobs) == self.capacity, known=known, snapshots=[each.snapshot for each in jobs],
        )  # fmt: skip
        for each in jobs:
            each.snapshot = None
        return training

    def _halve(self, scale: Scale, at_once: int, error: Exception) -> None:
        """Halve the capacity after running out of memory with ``at_once`` jobs."""
        if at_once <= 1:
            raise RequestError(NOT_FOR_ONE) from error
        self._capacity = self._fitting[scale] = at_once // 2
        logger.info(f"out of memory with {at_once} trials at once: continuing with {self.capacity}.")

    def _save(self, batch: SlotBatch, waiting: Sequence[Running]) -> None:
        if self.checkpoints is not None and self.checkpoints.due():
            halted = {each.course: each.entry(each.snapshot) for each in waiting if each.snapshot is not None}
            self.checkpoints.save(lambda: {**halted, **batch.entries()})


def _structure(context: RunContext, job: Job) -> Any:
    """Return what jobs of one program have in common: the scale, and where the forward pass has multipliers."""

    def made() -> Any:
        rows = context.plan(job.scale, job.parametrization, job.recipe).rows
        return job.scale, [(row.name, row.multiplier, row.columns) for row in rows]

    return context.once(("structure", job.scale, job.parametrization), made)


SUFFIX = ".trials"
LAYOUT = 2  # of the tensors in an entry; files of another layout are not read
SHARE = 0.02  # maximum fraction of time spent on writing


class Checkpoints:
    """Checkpoint files of running trials in ``folder``, which only this process may use.

    Args:
        folder: created when the first file is written.
        share: maximum fraction of time spent on writing; 1 to write each time.
    """

    def __init__(self, folder: Path, share: float = SHARE) -> None:
        self.folder, self.share = folder, share
        self._entries: dict[str, Any] | None = None
        self._current: Path | None = None
        self._written, self._cost = 0.0, 0.0

    def take(self, course: str) -> Any | None:
        """Return and remove the saved entry of a trial; None if there is none."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries.pop(course, None)

    def due(self) -> bool:
        """Return whether enough time has passed since the last write."""
        return time.monotonic() - self._written >= self._cost / self.share - self._cost

    def save(self, entries: Callable[[], Mapping[str, Any]]) -> None:
        """Write the running trials, by their courses, and remove the previous file.

        ``entries`` is called here, so the time that it takes, such as to copy from a GPU, counts as time spent on writing.

        Raises:
            RequestError: the disk is full or cannot be written; the previous file is kept.
        """
        begun = time.monotonic()
        file = io.BytesIO()
        torch.save(dict(entries()), file)
        content = file.getvalue()
        path = self.folder / (hashlib.sha256(content).hexdigest() + SUFFIX)
        write_bytes(path, content)
        if self._current not in (None, path):
            self._current.unlink(missing_ok=True)
        self._current = path
        self._written = time.monotonic()
        self._cost = self._written - begun

    def clear(self) -> None:
        """Remove all files, once every trial has ended."""
        self._entries, self._current = {}, None
        for path in self.folder.glob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _read(self) -> dict[str, Any]:
        """Return the entries of all intact files and delete damaged ones; for a trial in two files, keep the later step."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:
                path.unlink(missing_ok=True)
                continue
            for course, entry in torch.load(io.BytesIO(content), weights_only=True).items():
                if course not in found or found[course]["step"] < entry["step"]:
                    found[course] = entry
        return found


def course_of(experiment: Experiment, plan: Plan, seed: int, data_sha256: str, precision: str) -> str:
    """Return a hash of everything that a trial's course of training depends on, except the code of a user's model."""
    facts = {
        "layout": LAYOUT,
        "plan": plan.as_dict(),
        "seed": seed,
        "data": data_sha256,
        "precision": precision,
        **experiment.model_dump(mode="json", include={"model", "options", "steps", "batch_size", "sequence_length"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
