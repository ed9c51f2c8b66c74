"""Tune a proxy: Optuna suggests trials, an executor trains them, and every finished result is written to the run folder."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from mutransfer.errors import RequestError
from mutransfer.io import naming_the_disk
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe, Scale
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS, REPEATS, TRIALS, Schema

from .executors import check_trainer, one_by_one
from .experiment import Budget, Experiment, with_values
from .jobs import Done, Executor, Job, Ready, Reports, RunContext, Session
from .results import LOOK_EVERY, Replicates, Tuned, best_so_far, summary, usable
from .storage import naming_the_storage, only_one, opened, own_journal
from .study import open_queue, trials_frame
from .user_trainers import Failures
from .workers import FINISHED, LEASE, Heartbeats, TrialQueue, worker_name

__all__ = ["Spent", "Tuned", "affordable", "count_running", "price", "tune"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """Total cost of the trials with a recorded result.

    Interrupted trials have no recorded result, so their cost is unknown and not included.

    Attributes:
        flops: floating point operations of all of these trials.
        seconds: seconds of all of these trials.
        usual: median seconds of the complete trials. The median is used because the first trial in each process may have
            compiled the model.
    """

    flops: float = 0.0
    seconds: float = 0.0
    usual: float = 0.0

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> Self:
        """Add up the costs recorded in ``trials``."""
        finished = [trial for trial in trials if "outcome" in trial.user_attrs]
        outcomes = [trial.user_attrs["outcome"] for trial in finished]
        complete = [
            each.user_attrs["outcome"]["seconds"] or 0.0 for each in finished if each.state is TrialState.COMPLETE
        ]
        return cls(
            sum(outcome["flops"] or 0.0 for outcome in outcomes),
            sum(outcome["seconds"] or 0.0 for outcome in outcomes),
            statistics.median(complete) if complete else 0.0,
        )

    def allows(self, budget: Budget, running: int, flops: float | None) -> bool:
        """Return whether ``budget`` allows one more trial of ``flops`` in addition to ``running`` trials of the usual duration.

        The duration of a trial is unknown until one has completed, so the time budget always allows the first trials.
        """
        most = running + 1
        if budget.flops is not None and flops is not None and self.flops + most * flops > budget.flops:
            return False
        if budget.seconds is None:
            return True
        return not self.usual or self.seconds + most * self.usual <= budget.seconds


def price(context: RunContext, folder: RunFolder, target: Scale) -> dict[str, Any]:
    """Compare the floating point operations spent in ``folder`` with those of one run of the experiment at ``target``.

    Returns:
        ``tuning_flops`` (all trials, including pruned ones), ``repeats_flops`` (the best trials with other seeds),
        ``verify_flops`` (all runs of the basins, including the control's), ``target_flops``; ``ratio`` of tuning to target;
        ``uncounted``, the names of operations that none of these figures include. A value is None if the runs do not exist
        or their cost is unknown (user trainers). None of the figures include validation.
    """
    cost = context.cost(target, Recipe.load(folder.best) if folder.best.exists() else None)
    known = cost is not None
    tuning = _spent(folder.trials, TRIALS) if known else None
    whole = cost.total * context.experiment.steps if cost is not None else None
    return {
        "tuning_flops": tuning,
        "repeats_flops": _spent(folder.repeats, REPEATS) if known else None,
        "verify_flops": _spent(folder.basins, BASINS) if known else None,
        "target_flops": whole,
        "ratio": tuning / whole if tuning is not None and whole else None,
        "uncounted": list(cost.uncounted) if cost is not None else [],
    }


def _spent(path: Path, schema: Schema) -> float | None:
    total = schema.read(path)["flops"].sum(min_count=1) if path.exists() else math.nan
    return None if math.isnan(total) else float(total)


def run_trials(
    context: RunContext,
    claims: TrialQueue,
    dead: Callable[[], list[FrozenTrial]],
    executor: Executor,
    flops: float | None,
    beginning: Callable[[], None] = lambda: None,
    settled: Callable[[], None] = lambda: None,
) -> Iterator[Trial]:
    """Start trials while the executor has capacity, prune at rungs, record results; yield each trial once it is recorded.

    If interrupted, return the unfinished trials to the queue.

    Args:
        context: context of the experiment to tune.
        claims: this worker's trial queue.
        dead: returns the running trials whose workers missed their heartbeat.
        executor: trains the trials.
        flops: floating point operations of one step; None if unknown.
        beginning: called when the first trial starts, after any preparation by the executor.
        settled: called when all trials that ended at the same time are recorded.

    Raises:
        RequestError: too many trials in a row failed.
    """
    experiment, failures = context.experiment, Failures(executor.capacity)
    # Once there is nothing to ask for, the running trials end first; then `tune` decides whether to continue.
    asked = iter(functools.partial(_ask, experiment, claims, dead, flops), None)
    first, recorded = True, False
    with Session(executor, context) as session, _requeued_if_interrupted(claims):
        for event in session:
            if recorded and not isinstance(event, Done):
                settled()
                recorded = False
            match event:
                case Ready(count):
                    for trial in itertools.islice(asked, count):
                        if first:
                            beginning()
                        first = False
                        session.submit(_job(experiment, trial))
                case Reports(reports):
                    for report in reports:
                        with contextlib.suppress(UpdateFinishedTrialError):
                            claims.begun[report.job.key].report(report.loss, report.step)
                    for report in reports:
                        if _should_stop(claims, claims.begun[report.job.key]):
                            session.stop(report.job.key)
                case Done(job, outcome):
                    trial = claims.begun[job.key]
                    failures.note(job.key, outcome, claims.finished())
                    known = record_result(claims.study, trial, outcome, context.flops(job.scale, job.recipe))
                    del claims.begun[job.key]
                    if known:
                        recorded = True
                        yield trial
        if recorded:
            settled()


def _ask(
    experiment: Experiment, claims: TrialQueue, dead: Callable[[], list[FrozenTrial]], flops: float | None
) -> Trial | None:
    """Start a trial; return None if the sampler waits for results, the budget is used up, or all places are held."""
    claims.requeue(dead())
    if not affordable(experiment, claims, flops):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return claims.next()


def _should_stop(claims: TrialQueue, trial: Trial) -> bool:
    try:
        state = claims.trials()[trial.number].state
        return state is not TrialState.RUNNING or trial.should_prune()
    except UpdateFinishedTrialError:  # raised when halving records the rung in the trial
        return True  # another worker retries it because this one missed its heartbeat; `record_result` logs that


@contextlib.contextmanager
def _requeued_if_interrupted(claims: TrialQueue) -> Iterator[None]:
    """Return the unfinished trials to the queue when the block is left by any exception."""
    try:
        yield
    except BaseException:
        # If this fails too (a full disk, an interruption inside the storage), the trials are requeued when the run resumes,
        # or by another worker.
        with contextlib.suppress(Exception):
            claims.requeue_own()
        raise


class _Table:
    """The table of trials in a run folder, which is written once for all trials that end together, or each second."""

    def __init__(self, claims: TrialQueue, folder: RunFolder) -> None:
        self._claims, self._folder, self._written = claims, folder, -math.inf

    def write(self) -> None:
        TRIALS.write(trials_frame(self._claims.trials()), self._folder.trials)
        self._written = time.monotonic()

    def write_if_old(self) -> None:
        if time.monotonic() - self._written > 1.0:
            self.write()


def count_running(claims: TrialQueue) -> int:
    """Return how many trials are running, over all workers."""
    return sum(trial.state is TrialState.RUNNING for trial in claims.trials())


def affordable(experiment: Experiment, claims: TrialQueue, flops: float | None) -> bool:
    """Return whether the budget allows one more trial in addition to those that are running."""
    return Spent.of(claims.trials()).allows(
        experiment.budget, count_running(claims), None if flops is None else flops * experiment.steps
    )


def record_result(study: optuna.Study, trial: Trial, outcome: Outcome, flops: float | None) -> bool:
    """Record the outcome of ``trial`` in ``study``.

    Returns:
        False if this worker missed its heartbeat and another worker already retries the trial; True otherwise.
    """
    finite = outcome.loss if math.isfinite(outcome.loss) else None
    attributes = {
        "loss": finite,
        "start": outcome.start if math.isfinite(outcome.start) else None,
        "diverged": outcome.diverged,
        "steps": outcome.steps,
        "flops": None if flops is None else flops * outcome.steps,
        "seconds": outcome.seconds,
        **({"failed": outcome.failed} if outcome.failed else {}),
    }
    try:
        trial.set_user_attr("outcome", attributes)
        if outcome.failed:
            study.tell(trial, state=TrialState.FAIL)
        elif outcome.stopped:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, _penalty(study, outcome.start) if outcome.diverged else outcome.loss)
    except (UpdateFinishedTrialError, ValueError):
        if study.get_trials(deepcopy=False)[trial.number].state is not TrialState.FAIL:
            raise
        logger.warning("trial %d is retried by another worker, as this one missed its heartbeat", trial.number)
        return False
    return True


def _penalty(study: optuna.Study, start: float) -> float:
    """Return the finite penalty recorded for a diverged trial.

    Optuna would treat NaN as FAIL, which samplers ignore and which does not count towards ``trials``. The penalty is twice
    the starting loss or, if a user trainer does not report one, twice the worst loss of the other trials. For a metric to
    maximize, it is the same distance below.
    """
    sign = -1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else 1
    if not math.isfinite(start):
        outcomes = [trial.user_attrs.get("outcome", {}) for trial in study.get_trials(deepcopy=False, states=FINISHED)]
        losses = [each["loss"] for each in outcomes if not each.get("diverged") and each.get("loss") is not None]
        if not losses:
            return sign * 100.0
        start = sign * max(sign * loss for loss in losses)
    return start + sign * (abs(start) or 1.0)


def _job(experiment: Experiment, trial: Trial) -> Job:
    recipe = with_values(experiment.recipe, trial.params)
    return Job(
        trial.number, experiment.proxy_scale, experiment.parametrization, recipe, experiment.seed, experiment.rung_steps
    )


def tune(
    experiment: Experiment,
    folder: RunFolder,
    *,
    storage: str | None = None,
    name: str | None = None,
    lease: float = LEASE,
    executor: Executor | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    context: RunContext | None = None,
) -> Tuned:
    """Run the study in ``folder`` until it has ``experiment.trials`` finished trials or its budget is spent; write the results.

    The first trial is the experiment's own recipe, which serves as the baseline. A diverged trial is recorded with a finite
    penalty, usually twice its starting loss, which teaches the sampler to avoid that region. Calling this again adds only the
    missing trials, and several machines with one storage share them.

    Args:
        experiment: the experiment to tune.
        folder: run folder; created if it does not exist.
        storage: address of a storage (`storage.opened`), which other workers may share; by default a journal in the folder.
        name: study name.
        lease: seconds without a heartbeat after which other workers retry this worker's trials; use the same value for all
            workers of a study.
        executor: how trials are trained; one by one in this process by default.
        device: for the default executor.
        progress: called with (finished, total, text about the best result so far).
        context: family and data that are already loaded; they are reused if they are this experiment's.

    Raises:
        RequestError: the folder holds another experiment or another data hash, the disk is full, every trial diverged, the
            budget does not allow a single trial, or too many trials in a row failed.
    """
    begun = time.perf_counter()
    if experiment.folder is None:
        experiment = experiment.model_copy(update={"folder": os.getcwd()})
    context = RunContext(experiment) if context is None else context.for_(experiment)
    executor = executor or one_by_one(experiment, folder.path, device)
    # Report a wrong model, corpus or size before anything is written.
    data = context.data
    check_trainer(experiment)
    context.plan(experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    for extreme in experiment.extremes():
        context.plan(experiment.proxy_scale, experiment.parametrization, extreme)
    # Of the dearest trials, where they differ: a trial is only started if the budget allows one of them.
    flops = max((context.flops(experiment.proxy_scale, each) or 0.0 for each in experiment.extremes()), default=None)
    flops = flops or context.flops(experiment.proxy_scale)
    if flops is None and experiment.budget.flops is not None:
        raise RequestError("budget.flops cannot be counted without mutransfer's own data: use budget.seconds.")
    _refuse_other_experiment(experiment, folder)
    with contextlib.ExitStack() as held:
        store = held.enter_context(opened(storage)) if storage else None
        folder.make()
        held.enter_context(naming_the_disk(folder.path))
        if store is None or not store.shared:
            held.enter_context(only_one(folder))
        facts: dict[str, object] = {} if data is None else {"data_sha256": data.sha256, "data_facts": data.facts}
        name_of_data = experiment.data if data is None else data.name
        folder.note_environment(
            **facts, data=name_of_data, seed=experiment.seed, device=device, places=experiment.places(folder.path)
        )
        experiment.save(folder.experiment)
        folder.note_progress("tune", planned=experiment.trials, ended=False)
        store = store or own_journal(folder)
        held.enter_context(naming_the_storage(store))
        owner = worker_name()
        claims = open_queue(experiment, store, name, owner)
        study = claims.study
        leases = held.enter_context(Heartbeats(study, owner, lease)) if store.shared else None
        if leases is None:
            claims.requeue(trial for trial in claims.trials() if trial.state is TrialState.RUNNING)
        dead = list if leases is None else leases.lapsed
        executor.expect(max(1, experiment.trials - claims.finished()))
        table = _Table(claims, folder)
        while (finished := claims.finished()) < experiment.trials and (
            affordable(experiment, claims, flops) or count_running(claims)
        ):
            idle = True
            # Report progress from the start of the first trial: before that, an executor may measure and compile for minutes.
            beginning = functools.partial(progress, finished, experiment.trials, best_so_far(study))
            for _ in run_trials(context, claims, dead, executor, flops, beginning, table.write):
                idle = False
                table.write_if_old()
                progress(min(claims.finished(), experiment.trials), experiment.trials, best_so_far(study))
            if idle:  # other workers are running the missing trials
                beginning()
                time.sleep(LOOK_EVERY)
        claims.withdraw()
        frame = trials_frame(claims.trials())
        TRIALS.write(frame, folder.trials)
        again = None
        if experiment.repeats is not None:
            repeating = Replicates(context, study, usable(study), owner, leases)
            folder.note_progress("repeats", planned=len(repeating.wanted), ended=False)
            again = repeating.run(folder, executor, flops, progress)
            folder.note_progress("repeats", planned=len(repeating.wanted), ended=True)
        tuned = summary(experiment, study, frame, again, time.perf_counter() - begun)
        tuned.best.save(folder.best)
        folder.note_progress("tune", planned=experiment.trials, ended=True)
    return tuned


def _refuse_other_experiment(experiment: Experiment, folder: RunFolder) -> None:
    if not folder.experiment.exists():
        return
    before = Experiment.load(folder.experiment).question()
    now = experiment.question()
    for key in now:
        if before[key] != now[key]:
            raise RequestError(
                f"{folder.path} holds a study with {key} = {before[key]}, but this experiment has {now[key]}: use another "
                "--out, or put it back to go on with that study."
            )
