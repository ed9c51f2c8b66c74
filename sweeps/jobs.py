"""Training runs of a sweep as plain data that any process can execute, and the `Executor` protocol that runs them.

An `Executor` separates the choice of runs from their execution: the study and the basins do not depend on processes, devices
or vectorization.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from mutransfer.errors import RequestError, describe
from mutransfer.family import Family
from mutransfer.optimizers.rules import OPTIMIZERS, Muon
from mutransfer.planning.build import ObservedModel, observed_model, plan
from mutransfer.planning.plan import Plan
from mutransfer.price import Flops, optimizer_flops, step_cost
from mutransfer.proxies.data import Data, load_data
from mutransfer.proxies.importing import modules_in
from mutransfer.proxies.load import load_family
from mutransfer.proxies.training import Outcome, Training, train
from mutransfer.recipe import Recipe
from mutransfer.scale import Scale
from mutransfer.tracing.observe import observe

from .experiment import NO_DATA, Experiment, Size
from .user_trainers import TrialRun, call

__all__ = [
    "Executor", "Job", "SequentialExecutor", "Report", "Reported", "alone", "cost_of", "do", "family_of", "flops_of", "loaded",
    "plan_of",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training run of ``recipe`` at ``scale``; ``key`` identifies it to the caller."""

    key: Any
    scale: Scale
    parametrization: str
    recipe: Recipe
    seed: int
    rungs: tuple[int, ...] = ()


class Reported(NamedTuple):
    """Report of a job at a rung: validation ``loss`` in nats after ``step`` steps."""

    job: Job
    step: int
    loss: float


# Jobs that run in parallel report together: a pruner sees all of them before it decides on any. True stops a job.
Report = Callable[[Sequence[Reported]], Sequence[bool]]


def alone(report: Report, job: Job) -> Callable[[int, float], bool]:
    """Return a function of (step, loss) that reports for ``job`` alone and returns whether to stop it."""
    return lambda step, loss: report([Reported(job, step, loss)])[0]


class Executor(Protocol):
    """Runs jobs."""

    @property
    def capacity(self) -> int:
        """The maximum number of jobs that run at the same time."""
        ...

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """Take a job whenever there is capacity, and yield it with its outcome when it ends.

        ``jobs`` may choose the next job from the outcomes yielded so far; once exhausted, it is not advanced again.
        ``report`` is called at a job's rungs and stops it by returning True.
        """
        ...


class SequentialExecutor:
    """Executor that runs every job in this process, one after the other."""

    capacity = 1

    def __init__(self, device: str = "cpu", *, compile: bool = False) -> None:
        self.device, self.compile = device, compile

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`."""
        for job in jobs:
            yield job, do(experiment, job, self.device, report, self.compile)


def loaded(experiment: Experiment) -> tuple[Family, Data | None]:
    """Return the experiment's family and data (None if its trainer loads the data), loaded once per process."""
    return _loaded(_key(experiment))


def family_of(experiment: Experiment) -> tuple[Family, Data]:
    """Return the experiment's family and data, loaded once per process.

    Raises:
        RequestError: the experiment names no data.
    """
    family, data = loaded(experiment)
    if data is None:
        raise RequestError(f"data is {NO_DATA}, which only a user trainer can train on: name data or a trainer.")
    return family, data


def _key(experiment: Experiment) -> str:
    """Return a key of everything that the family and the data depend on."""
    keys = {"model", "options", "roles", "data", "sequence_length", "proxy", "base", "trainer", "folder"}
    base = Size(width=experiment.base_scale.width, depth=experiment.base_scale.depth)  # the same for every proxy
    folder = experiment.folder or os.getcwd()
    return (
        experiment.here()
        .model_copy(update={"proxy": base, "base": base, "folder": folder})
        .model_dump_json(include=keys)
    )


@functools.lru_cache(maxsize=4)
def _loaded(key: str) -> tuple[Family, Data | None]:
    experiment = Experiment.model_validate_json(key)
    data = None if experiment.data == NO_DATA else load_data(experiment.data, experiment.sequence_length)
    options, roles = experiment.options, experiment.roles
    with modules_in(experiment.folder):
        return load_family(experiment.model, data, experiment.base_scale, options=options, roles=roles), data


@functools.lru_cache(maxsize=32)
def _observed(key: str) -> Any:
    return observe(_loaded(key)[0])


@functools.lru_cache(maxsize=64)
def _observed_model(key: str, scale: Scale, parametrization: str) -> ObservedModel:
    return observed_model(_loaded(key)[0], scale, parametrization, _observed(key))


def cost_of(experiment: Experiment, scale: Scale) -> Flops | None:
    """Return the cost of one training step at ``scale``; None if a user trainer chooses its batches.

    Muon's iteration on hidden matrices is included; the elementwise work of other optimizers is left out.

    Raises:
        RequestError: the model does not accept the experiment's data.
    """
    if experiment.trainer is not None:
        return None
    family_of(experiment)
    try:
        cost = _step_cost(_key(experiment), scale, experiment.batch_size)
    except RequestError:
        raise
    except Exception as error:  # from the user's model, which has only run on its own example batch so far
        raise RequestError(
            f"{experiment.model} cannot be trained on {experiment.data} ({describe(error)}): its loss must accept batches "
            "(inputs, targets) of the experiment's data."
        ) from error
    if not isinstance(OPTIMIZERS[experiment.optimizer], Muon):
        return cost
    planned = plan_of(experiment, scale, experiment.parametrization, experiment.recipe)
    return replace(cost, total=cost.total + optimizer_flops(planned))


@functools.lru_cache(maxsize=64)
def _step_cost(key: str, scale: Scale, batch_size: int) -> Flops:
    family, data = _loaded(key)
    assert data is not None
    return step_cost(family, scale, data.batch(0, batch_size, 0))


def flops_of(experiment: Experiment, scale: Scale) -> float | None:
    """Return the total floating point operations of `cost_of`; None if unknown."""
    cost = cost_of(experiment, scale)
    return None if cost is None else cost.total


def plan_of(experiment: Experiment, scale: Scale, parametrization: str, recipe: Recipe) -> Plan:
    """Return the plan of a run at ``scale``; the model is traced once per process, and once at each scale."""
    family, _ = loaded(experiment)
    target = _observed_model(_key(experiment), scale, parametrization)
    return plan(family, scale, parametrization, experiment.optimizer, recipe, target=target)


def do(experiment: Experiment, job: Job, device: str, report: Report | None, compile: bool = False) -> Outcome:
    """Run ``job`` in this process on ``device`` (a user trainer chooses its own); ``report`` is called at its rungs.

    With ``compile``, the model is compiled for the first job of its kind.

    Raises:
        RequestError: the model, its data or its trainer cannot be used; or the trainer is a command.
    """
    planned = plan_of(experiment, job.scale, job.parametrization, job.recipe)
    ask = None if report is None else alone(report, job)
    if (trainer := experiment.trainer) is not None:
        if trainer.call is None:
            raise RequestError("the trainer is a command, but this executor calls functions: use executor_for.")
        reference = experiment.here().references()["call"]
        attempt = TrialRun(experiment.steps, job.rungs, ask, maximize=experiment.maximize)
        with modules_in(experiment.folder):
            return call(reference, job.recipe, planned, job.seed, attempt)
    family, data = family_of(experiment)
    training = Training(
        family, planned, data, steps=experiment.steps, batch_size=experiment.batch_size, seed=job.seed, device=device,
        compile=compile,
    )  # fmt: skip
    return train(training, job.rungs, ask)
