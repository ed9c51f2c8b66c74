"""Tuning: Optuna asks, an executor trains, Optuna is told; the run folder always holds all that is finished."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from mutransfer.errors import RequestError
from mutransfer.files import naming_the_disk
from mutransfer.frames import TRIALS
from mutransfer.proxies.training import Outcome
from mutransfer.runs import RunFolder

from .budgets import Spent
from .claims import FINISHED, Claims
from .executors import check_trainer, one_by_one
from .experiment import Experiment, with_values
from .failures import Failures
from .findings import Tuned, best_so_far, summary, usable
from .independent import Independent
from .jobs import Executor, Job, Reported, flops_of, loaded, plan_of
from .leases import LEASE, Leases, worker_name
from .locks import only_one
from .patience import Patient
from .repeating import repeat
from .storages import naming_the_storage, opened, own_journal
from .study import baseline, distributions, open_study, trials_frame

__all__ = ["Tuned", "tune"]

LOOK_EVERY = 0.5  # seconds between looks at what other workers do


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
) -> Tuned:
    """Bring the study in ``folder`` to ``experiment.trials`` finished trials, and write what it found.

    The first trial is the experiment's own recipe, the one to beat. A trial that diverges is told as a finite penalty of
    twice its starting loss, so that the sampler learns to keep away. Running it again adds only the missing trials, and
    running it on several machines shares them.

    Args:
        experiment: what to tune.
        folder: run folder; made if it does not exist.
        storage: address of a storage (`storages.opened`), which other workers may share; by default a journal in the folder.
        name: study name.
        lease: seconds without a sign of life after which others take this worker for dead; the same for all of a study.
        executor: how trials are trained; one by one in this process by default.
        device: for the default executor.
        progress: called with (finished, total, what was found).

    Raises:
        RequestError: another experiment or another data hash is in the folder, the disk is full, every trial diverged,
            the budget reaches for none, or too many in a row failed.
    """
    begun = time.perf_counter()
    executor = executor or one_by_one(experiment, folder.path, device)
    # A wrong model, corpus or size is said before anything is written.
    _, data = loaded(experiment)
    check_trainer(experiment)
    plan_of(experiment, experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    flops = flops_of(experiment, experiment.proxy_scale)
    if flops is None and experiment.budget.flops is not None:
        raise RequestError("budget.flops cannot be counted without mutransfer's own data: use budget.seconds.")
    _refuse_other_experiment(experiment, folder)
    with contextlib.ExitStack() as held:
        store = held.enter_context(opened(storage)) if storage else None
        folder.make()
        held.enter_context(naming_the_disk(folder.path))
        if store is None or not store.shared:
            held.enter_context(only_one(folder))
        facts = {} if data is None else {"data_sha256": data.sha256, "data_facts": data.facts}
        name_of_data = experiment.data if data is None else data.name
        folder.note_environment(**facts, data=name_of_data, seed=experiment.seed, device=device)
        experiment.save(folder.experiment)
        store = store or own_journal(folder)
        held.enter_context(naming_the_storage(store))
        owner = worker_name()
        study = open_study(experiment, store, name, owner)
        claims = Claims(study, distributions(experiment), experiment.trials, baseline(experiment), owner)
        if store.shared:
            leases = held.enter_context(Leases(study, owner, lease))
            dead = leases.lapsed
        else:
            claims.give_back(trial for trial in claims.trials() if trial.state is TrialState.RUNNING)
            dead = list
        while (finished := claims.finished()) < experiment.trials and (
            _affordable(experiment, claims, flops) or _busy(claims)
        ):
            progress(finished, experiment.trials, best_so_far(study))
            idle = True
            for _ in _told(experiment, claims, dead, executor, flops):
                idle = False
                TRIALS.write(trials_frame(claims.trials()), folder.trials)
                progress(min(claims.finished(), experiment.trials), experiment.trials, best_so_far(study))
            if idle:  # what is missing is being done by other workers
                time.sleep(LOOK_EVERY)
        claims.withdraw()
        frame = trials_frame(claims.trials())
        TRIALS.write(frame, folder.trials)
        again = None
        if experiment.repeats is not None:
            again = repeat(experiment, usable(study), folder, executor, flops, progress)
        tuned = summary(experiment, study, frame, again, time.perf_counter() - begun)
        tuned.best.save(folder.best)
    return tuned


def _told(
    experiment: Experiment,
    claims: Claims,
    dead: Callable[[], list[FrozenTrial]],
    executor: Executor,
    flops: float | None,
) -> Iterator[Trial]:
    """Begin trials as the executor has room, while there are any to begin; yield each after it is told.

    An interruption returns what is unfinished to the queue.
    """

    failures = Failures(executor.capacity)

    def begun() -> Iterator[Job]:
        while True:
            claims.give_back(dead())
            sampler = claims.study.sampler
            if isinstance(sampler, Independent) and sampler.waits(claims.study):
                return
            if not _affordable(experiment, claims, flops):
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                trial = claims.next()
            if trial is None:
                return
            yield _job(experiment, trial)

    def report(reported: Sequence[Reported]) -> list[bool]:
        dead = set()
        for job, step, loss in reported:
            try:
                claims.begun[job.key].report(loss, step)
            except UpdateFinishedTrialError:
                dead.add(job.key)  # taken for dead by others, who do it again: `_tell` says so
        return [job.key in dead or claims.begun[job.key].should_prune() for job, _, _ in reported]

    try:
        for job, outcome in executor.run(experiment, begun(), report):
            trial = claims.begun[job.key]
            failures.note(job.key, outcome, claims.finished())
            told = _tell(claims.study, trial, outcome, flops)
            del claims.begun[job.key]
            if told:
                yield trial
    except BaseException:
        # What cannot be told now (a full disk, an interruption inside the storage) is given back when the run resumes, or
        # by another worker.
        with contextlib.suppress(Exception):
            if isinstance(claims.study._storage, Patient):
                claims.study._storage.hurry()
            claims.give_back_own()
        raise


def _busy(claims: Claims) -> int:
    return sum(trial.state is TrialState.RUNNING for trial in claims.trials())


def _affordable(experiment: Experiment, claims: Claims, flops: float | None) -> bool:
    """Return whether the budget allows one more trial, beside those that run."""
    return Spent.of(claims.trials()).allows(
        experiment.budget, _busy(claims), None if flops is None else flops * experiment.steps
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

    Twice its start; an own trainer may not tell it, and then the worst loss of the others is doubled.
    """
    if not math.isfinite(start):
        told = [trial.user_attrs.get("outcome", {}) for trial in study.get_trials(deepcopy=False, states=FINISHED)]
        losses = [had["loss"] for had in told if not had.get("diverged") and had.get("loss") is not None]
        if not losses:
            return 100.0
        start = max(losses)
    return start + (abs(start) or 1.0)


def _job(experiment: Experiment, trial: Trial) -> Job:
    recipe = with_values(experiment.recipe, trial.params)
    return Job(
        trial.number, experiment.proxy_scale, experiment.parametrization, recipe, experiment.seed, experiment.rung_steps
    )


def _refuse_other_experiment(experiment: Experiment, folder: RunFolder) -> None:
    if not folder.experiment.exists():
        return
    before = Experiment.load(folder.experiment).question()
    now = experiment.question()
    for key in now:
        if before[key] != now[key]:
            raise RequestError(
                f"{folder.path} holds a study with {key} = {before[key]}, and this experiment has {now[key]}: use another "
                "--out, or put it back to go on with that study."
            )
