"""One worker's trials: begun as there is room for them, judged at rungs, told when they end."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from mutransfer.proxies.training import Outcome

from .budgets import Spent
from .claims import FINISHED, Claims
from .experiment import Experiment, with_values
from .failures import Failures
from .independent import Independent
from .jobs import Executor, Job, Reported
from .patience import Patient

__all__ = ["affordable", "busy", "told"]


def told(
    experiment: Experiment,
    claims: Claims,
    dead: Callable[[], list[FrozenTrial]],
    executor: Executor,
    flops: float | None,
    beginning: Callable[[], None] = lambda: None,
) -> Iterator[Trial]:
    """Begin trials as the executor has room, while there are any to begin; yield each after it is told.

    An interruption returns what is unfinished to the queue.

    Args:
        experiment: what is tuned.
        claims: this worker's trials.
        dead: says which trials' workers are dead.
        executor: trains.
        flops: of one step; None if they are not known.
        beginning: called when the first trial begins, after whatever the executor does before.

    Raises:
        RequestError: too many in a row failed.
    """

    failures = Failures(executor.capacity)

    def begun() -> Iterator[Job]:
        first = True
        while True:
            claims.give_back(dead())
            sampler = claims.study.sampler
            if isinstance(sampler, Independent) and not claims.waiting() and sampler.waits(claims.study):
                return
            if not affordable(experiment, claims, flops):
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                trial = claims.next()
            if trial is None:
                return
            if first:
                beginning()
            first = False
            yield _job(experiment, trial)

    def report(reported: Sequence[Reported]) -> list[bool]:
        for job, step, loss in reported:
            with contextlib.suppress(UpdateFinishedTrialError):
                claims.begun[job.key].report(loss, step)
        return [hopeless(claims.begun[job.key]) for job, _, _ in reported]

    def hopeless(trial: Trial) -> bool:
        try:
            state = claims.trials()[trial.number].state
            return state is not TrialState.RUNNING or trial.should_prune()
        except UpdateFinishedTrialError:  # as halving notes a trial's rung in it
            return True  # taken for dead by others, who do it again: `_tell` says so

    try:
        for job, outcome in executor.run(experiment, begun(), report):
            trial = claims.begun[job.key]
            failures.note(job.key, outcome, claims.finished())
            known = _tell(claims.study, trial, outcome, flops)
            del claims.begun[job.key]
            if known:
                yield trial
    except BaseException:
        # What cannot be told now (a full disk, an interruption inside the storage) is given back when the run resumes, or
        # by another worker.
        with contextlib.suppress(Exception):
            if isinstance(claims.study._storage, Patient):
                claims.study._storage.hurry()
            claims.give_back_own()
        raise


def busy(claims: Claims) -> int:
    """Return how many trials run, by any worker."""
    return sum(trial.state is TrialState.RUNNING for trial in claims.trials())


def affordable(experiment: Experiment, claims: Claims, flops: float | None) -> bool:
    """Return whether the budget allows one more trial, beside those that run."""
    return Spent.of(claims.trials()).allows(
        experiment.budget, busy(claims), None if flops is None else flops * experiment.steps
    )


def _tell(study: optuna.Study, trial: Trial, outcome: Outcome, flops: float | None) -> bool:
    """Tell the outcome; False if others took this worker for dead and the trial is not its own any more."""
    finite = outcome.loss if math.isfinite(outcome.loss) else None
    said = {
        "loss": finite,
        "start": outcome.start if math.isfinite(outcome.start) else None,
        "diverged": outcome.diverged,
        "steps": outcome.steps,
        "flops": None if flops is None else flops * outcome.steps,
        "seconds": outcome.seconds,
        **({"failed": outcome.failed} if outcome.failed else {}),
    }
    try:
        trial.set_user_attr("outcome", said)
        if outcome.failed:
            study.tell(trial, state=TrialState.FAIL)
        elif outcome.stopped:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, _penalty(study, outcome.start) if outcome.diverged else outcome.loss)
    except (UpdateFinishedTrialError, ValueError):
        if study.get_trials(deepcopy=False)[trial.number].state is not TrialState.FAIL:
            raise
        print(
            f"trial {trial.number} was taken for dead, as this worker had shown no sign of life, and is done again",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return False
    return True


def _penalty(study: optuna.Study, start: float) -> float:
    """What a diverged trial is told as: a NaN would be a failure, which samplers ignore and `trials` does not count.

    Twice its start; an own trainer may not tell it, and then the worst loss of the others is doubled. A metric to be
    maximized is as far below.
    """
    sign = -1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else 1
    if not math.isfinite(start):
        told = [trial.user_attrs.get("outcome", {}) for trial in study.get_trials(deepcopy=False, states=FINISHED)]
        losses = [had["loss"] for had in told if not had.get("diverged") and had.get("loss") is not None]
        if not losses:
            return sign * 100.0
        start = sign * max(sign * loss for loss in losses)
    return start + sign * (abs(start) or 1.0)


def _job(experiment: Experiment, trial: Trial) -> Job:
    recipe = with_values(experiment.recipe, trial.params)
    return Job(
        trial.number, experiment.proxy_scale, experiment.parametrization, recipe, experiment.seed, experiment.rung_steps
    )
