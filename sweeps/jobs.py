"""Training runs of a sweep as plain data that any process can execute, what they share, and the base of what runs them.

An `Executor` separates the choice of runs from their execution: the study and the basins do not depend on processes, devices
or vectorization. Both sides meet in a `Session`: the caller submits jobs and takes events, as in

    with Session(executor, context) as session:
        for event in session:
            match event:
                case Ready(count): ...  # session.submit(job) up to `count` times; the session ends if no job is left
                case Reports(reports): ...  # session.stop(key) for each job that should end here
                case Done(job, outcome): ...
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from mutransfer.devices import is_out_of_memory
from mutransfer.errors import RequestError, describe
from mutransfer.family import Family
from mutransfer.optimizers.rules import OPTIMIZERS, Muon
from mutransfer.planning.build import observed_model, plan
from mutransfer.planning.plan import Plan
from mutransfer.price import Flops, optimizer_flops, step_cost
from mutransfer.proxies.data import Data, load_data
from mutransfer.proxies.importing import modules_in
from mutransfer.proxies.load import load_family
from mutransfer.proxies.methods import pruned_densities
from mutransfer.proxies.training import Outcome, Training, train
from mutransfer.recipe import Recipe, Scale
from mutransfer.tracing.observe import observe

from .experiment import NO_DATA, Experiment, Size
from .user_trainers import TrialRun, call

__all__ = [
    "Done", "Event", "Events", "Executor", "Job", "Ready", "Report", "Reports", "RunContext", "SequentialExecutor", "Session",
    "do", "run_jobs",
]  # fmt: skip

T = TypeVar("T")


class RunContext:
    """What the runs of an experiment share: family, data, traced model and costs, each made when it is first needed.

    Create one for each command or worker process and pass it on.

    Args:
        experiment: the experiment.
        subjects: what other contexts have made; see `for_`.

    Attributes:
        experiment: the experiment.
    """

    def __init__(self, experiment: Experiment, subjects: dict[str, _Subject] | None = None) -> None:
        self.experiment = experiment
        self._subjects = {} if subjects is None else subjects
        subject = _Subject(experiment)
        self._subject = self._subjects.setdefault(subject.key, subject)

    def for_(self, experiment: Experiment) -> RunContext:
        """Return the context of another experiment, which shares all that does not depend on what differs between the two."""
        return RunContext(experiment, self._subjects)

    @property
    def family(self) -> Family:
        """The model at any size, and its loss."""
        return self._subject.loaded[0]

    @property
    def data(self) -> Data | None:
        """The experiment's data; None if its trainer loads the data."""
        return self._subject.loaded[1]

    @property
    def required_data(self) -> Data:
        """The experiment's data.

        Raises:
            RequestError: the experiment names no data.
        """
        if self.data is None:
            raise RequestError(f"data is {NO_DATA}, which only a user trainer can train on: name data or a trainer.")
        return self.data

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of ``make``, called once for a key by all contexts that share their family and data."""
        known = self._subject.known
        if key not in known:
            known[key] = make()
        return known[key]

    def plan(self, scale: Scale, parametrization: str, recipe: Recipe) -> Plan:
        """Return the plan of a run at ``scale``; the model is traced once, and once at each scale."""
        observation = self.once("observation", lambda: observe(self.family))
        target = self.once(
            ("model", scale, parametrization), lambda: observed_model(self.family, scale, parametrization, observation)
        )
        pruned = self.once(
            ("pruned", recipe.method.model_dump_json()), lambda: pruned_densities(recipe, self.family, observation)
        )
        return plan(
            self.family, scale, parametrization, self.experiment.optimizer, recipe, target=target, pruned=pruned
        )

    def cost(self, scale: Scale, recipe: Recipe | None = None) -> Flops | None:
        """Return the cost of one training step at ``scale``; None if a user trainer chooses its batches.

        The method is that of ``recipe``, by default the experiment's.

        Muon's iteration on hidden matrices is included; the elementwise work of other optimizers is left out.

        Raises:
            RequestError: the model does not accept the experiment's data.
        """
        experiment = self.experiment
        if experiment.trainer is not None:
            return None
        batch_size, data = experiment.batch_size, self.required_data
        try:
            cost = self.once(
                ("cost", scale, batch_size), lambda: step_cost(self.family, scale, data.batch(0, batch_size, 0))
            )
        except RequestError:
            raise
        except Exception as error:  # from the user's model, which has only run on its own example batch so far
            if is_out_of_memory(error):
                raise
            raise RequestError(
                f"{experiment.model} cannot be trained on {experiment.data} ({describe(error)}): its loss must accept batches "
                "(inputs, targets) of the experiment's data."
            ) from error
        cost = replace(cost, total=(recipe or experiment.recipe).method.flops(cost.total))
        if not isinstance(OPTIMIZERS[experiment.optimizer], Muon):
            return cost
        planned = self.plan(scale, experiment.parametrization, experiment.recipe)
        return replace(cost, total=cost.total + optimizer_flops(planned))

    def flops(self, scale: Scale, recipe: Recipe | None = None) -> float | None:
        """Return the total floating point operations of `cost`; None if unknown."""
        cost = self.cost(scale, recipe)
        return None if cost is None else cost.total


class _Subject:
    """A family and its data, loaded when first needed, and what has been computed from them.

    Attributes:
        key: everything that the family and the data depend on.
        known: computed results by key; see `RunContext.once`.
    """

    def __init__(self, experiment: Experiment) -> None:
        base = Size(width=experiment.base_scale.width, depth=experiment.base_scale.depth)  # the same for every proxy
        changes = {"proxy": base, "base": base, "folder": experiment.folder or os.getcwd()}
        self._experiment = experiment.here().model_copy(update=changes)
        keys = {"model", "options", "roles", "data", "sequence_length", "proxy", "base", "trainer", "folder"}
        self.key = self._experiment.model_dump_json(include=keys)
        self.known: dict[Hashable, Any] = {}

    @functools.cached_property
    def loaded(self) -> tuple[Family, Data | None]:
        given = self._experiment
        data = None if given.data == NO_DATA else load_data(given.data, given.sequence_length)
        with modules_in(given.folder):
            return load_family(given.model, data, given.base_scale, options=given.options, roles=given.roles), data


@dataclass(frozen=True)
class Job:
    """One training run of ``recipe`` at ``scale``; ``key`` identifies it to the caller."""

    key: Any
    scale: Scale
    parametrization: str
    recipe: Recipe
    seed: int
    rungs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ready:
    """The executor can start ``count`` more jobs; it goes on without new ones if none are submitted now."""

    count: int


@dataclass(frozen=True)
class Report:
    """Report of a job at a rung: validation ``loss`` in nats after ``step`` steps."""

    job: Job
    step: int
    loss: float


@dataclass(frozen=True)
class Reports:
    """Reports of jobs that reached their rungs at the same time, so that a pruner sees all of them before it decides on any."""

    reports: tuple[Report, ...]


@dataclass(frozen=True)
class Done:
    """A job has ended."""

    job: Job
    outcome: Outcome


Event = Ready | Reports | Done
Events = Generator[Event, None, None]


class Executor(ABC):
    """Trains jobs."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """The maximum number of jobs that run at the same time."""

    @abstractmethod
    def events(self, session: Session) -> Events:
        """Train the jobs submitted to ``session``, and yield what happens until no job is left.

        A job that has reported continues when the generator is advanced again, or ends there if it was stopped by then. Closing
        the generator ends all running jobs without an outcome.
        """

    def expect(self, jobs: int, *, independent: bool = False) -> None:  # noqa: B027 - most executors do not need to know
        """Prepare for ``jobs`` more jobs; ``independent`` if none of them is chosen by the outcomes of others."""

    def within(self, folder: Path) -> Executor:
        """Return this executor with ``folder`` as the run folder, for those that write files for each job."""
        return self


class Session:
    """Jobs submitted to an executor, and the events that follow; a context manager that ends the running jobs at its exit.

    Args:
        executor: trains the jobs.
        context: context of the experiment that the jobs belong to.
    """

    def __init__(self, executor: Executor, context: RunContext) -> None:
        self.context, self.experiment = context, context.experiment
        self._submitted = deque[Job]()
        self._stopped = set[Any]()
        self._events = executor.events(self)

    def submit(self, job: Job) -> None:
        """Add a job, after an event `Ready`; its ``key`` differs from those of all running jobs."""
        self._submitted.append(job)

    def stop(self, key: Any) -> None:
        """End a job at the rung where it waits, or else at its next rung."""
        self._stopped.add(key)

    def __iter__(self) -> Iterator[Event]:
        """Yield events until no job is left."""
        for event in self._events:
            yield event
            if isinstance(event, Done):
                self._stopped.discard(event.job.key)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    # For executors.

    def take(self, count: int, alike: Callable[[Job], bool] = lambda job: True) -> Generator[Ready, None, list[Job]]:
        """Announce room for ``count`` jobs, and return at most as many submitted ones: ``jobs = yield from session.take(2)``.

        Jobs are taken in their order, up to the first for which ``alike`` is false; that one waits.
        """
        if count > len(self._submitted) and all(map(alike, self._submitted)):
            yield Ready(count - len(self._submitted))
        taken: list[Job] = []
        while len(taken) < count and self._submitted and alike(self._submitted[0]):
            taken.append(self._submitted.popleft())
        return taken

    def peek(self) -> Generator[Ready, None, Job | None]:
        """Return the next job, which waits to be taken, or None if there is none: ``job = yield from session.peek()``."""
        if not self._submitted:
            yield Ready(1)
        return self._submitted[0] if self._submitted else None

    def is_stopped(self, key: Any) -> bool:
        """Return whether the caller has stopped a job."""
        return key in self._stopped


def run_jobs(
    executor: Executor,
    context: RunContext,
    jobs: Iterable[Job],
    report: Callable[[Sequence[Report]], Iterable[Any]] = lambda reports: (),
) -> Iterator[tuple[Job, Outcome]]:
    """Yield each of ``jobs`` with its outcome when it ends.

    Args:
        executor: trains the jobs.
        context: context of the experiment that the jobs belong to.
        jobs: taken one by one, whenever the executor has room, so they may depend on the outcomes yielded so far.
        report: maps the reports of jobs that reached their rungs at the same time to the keys of the jobs to stop.
    """
    source = iter(jobs)
    with Session(executor, context) as session:
        for event in session:
            match event:
                case Ready(count):
                    for job in itertools.islice(source, count):
                        session.submit(job)
                case Reports(reports):
                    for key in report(reports):
                        session.stop(key)
                case Done(job, outcome):
                    yield job, outcome


class SequentialExecutor(Executor):
    """Executor that runs every job in this process, one after the other."""

    capacity = 1

    def __init__(self, device: str = "cpu", *, compile: bool = False) -> None:
        self.device, self.compile = device, compile

    def events(self, session: Session) -> Events:
        """See `Executor`."""
        while jobs := (yield from session.take(1)):
            yield from self.train(session, jobs[0])

    def train(self, session: Session, job: Job) -> Events:
        """Train one job of ``session``."""
        with _Suspended(lambda report: do(session.context, job, self.device, report, self.compile)) as run:
            while (reported := run.resume(session.is_stopped(job.key))) is not None:
                yield Reports((Report(job, *reported),))
        yield Done(job, run.outcome)


class _Suspended:
    """Call of ``function(report)`` that is suspended inside ``report``, a function of (step, loss), until it is resumed.

    A user's training function calls ``report`` at any depth, so it cannot be a generator; it runs in a greenlet of this thread.
    Whatever it raises, Ctrl-C included, arrives in `resume`.

    Attributes:
        outcome: what the function has returned.
    """

    outcome: Outcome

    def __init__(self, function: Callable[[Callable[[int, float], bool]], Outcome]) -> None:
        self._loop = getcurrent()
        self._greenlet = greenlet(lambda stop: function(self._report))
        self._greenlet.gr_context = contextvars.copy_context()  # such as numpy's error state
        self._closed = False

    def __enter__(self) -> _Suspended:
        return self

    def resume(self, stop: bool) -> tuple[int, float] | None:
        """Start or continue the function, whose ``report`` returns ``stop``; return its next report, or None at its end."""
        found = self._greenlet.switch(stop)
        if not self._greenlet.dead:
            return found
        self.outcome = found
        return None

    def _report(self, step: int, loss: float) -> bool:
        if self._closed:  # the function has caught the first GreenletExit
            raise GreenletExit
        stop: bool = self._loop.switch((step, loss))
        return stop

    def __exit__(self, *_: object) -> None:
        """End the function if it is suspended: ``report`` raises GreenletExit there."""
        self._closed = True
        if self._greenlet:
            with contextlib.suppress(Exception):  # what it raises on its way out concerns nobody any more
                self._greenlet.throw()


def do(
    context: RunContext, job: Job, device: str, report: Callable[[int, float], bool], compile: bool = False
) -> Outcome:
    """Run ``job`` in this process on ``device`` (a user trainer chooses its own).

    With ``compile``, the model is compiled for the first job of its kind. ``report`` is called with (step, loss) at the job's
    rungs and returns whether the job should end there.

    Raises:
        RequestError: the model, its data or its trainer cannot be used; or the trainer is a command.
    """
    experiment = context.experiment
    planned = context.plan(job.scale, job.parametrization, job.recipe)
    if (trainer := experiment.trainer) is not None:
        if trainer.call is None:
            raise RequestError("the trainer is a command, but this executor calls functions: use executor_for.")
        reference = experiment.here().references()["call"]
        attempt = TrialRun(experiment.steps, job.rungs, maximize=experiment.maximize)
        with modules_in(experiment.folder):
            return call(reference, job.recipe, planned, job.seed, attempt, report)
    training = Training(
        context.family, planned, context.required_data, steps=experiment.steps, batch_size=experiment.batch_size,
        seed=job.seed, device=device, compile=compile,
    )  # fmt: skip
    return train(training, job.rungs, report)
