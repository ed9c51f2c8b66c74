"""Tuning: Optuna asks, an executor trains, Optuna is told; the run folder always holds all that is finished."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optuna
import pandas as pd
from optuna.trial import Trial, TrialState

from mutransfer.errors import RequestError
from mutransfer.files import naming_the_disk
from mutransfer.frames import TRIALS
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe
from mutransfer.runs import RunFolder

from .experiment import Experiment, with_values
from .failures import Failures
from .jobs import Executor, Job, OneByOne, family_of, flops_of, plan_of
from .study import FINISHED, baseline, distributions, only_one, open_study, reach, trials_frame

__all__ = ["Tuned", "tune"]

EDGE = 0.03  # of a range, in its own scale: closer to an end than this is "at the edge"


@dataclass(frozen=True)
class Tuned:
    """What a study has found so far."""

    trials: pd.DataFrame
    best: Recipe
    value: float
    params: dict[str, Any]
    default: float | None
    seconds: float
    warnings: list[str] = field(default_factory=list)


def tune(
    experiment: Experiment,
    folder: RunFolder,
    *,
    storage: str | None = None,
    name: str | None = None,
    executor: Executor | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Tuned:
    """Bring the study in ``folder`` to ``experiment.trials`` finished trials, and write what it found.

    The first trial is the experiment's own recipe, the one to beat. A trial that diverges is told as a finite penalty of
    twice its starting loss, so that the sampler learns to keep away. Running it again adds only the missing trials.

    Args:
        experiment: what to tune.
        folder: run folder; made if it does not exist.
        storage: Optuna storage URL; by default a journal in the folder.
        name: study name.
        executor: how trials are trained; one by one in this process by default.
        device: for the default executor.
        progress: called with (finished, total, what was found).

    Raises:
        RequestError: another experiment or another data hash is in the folder, the disk is full, every trial diverged, or
            too many in a row failed.
    """
    begun = time.perf_counter()
    executor = executor or OneByOne(device)
    # A wrong model, corpus or size is said before anything is written.
    _, data = family_of(experiment)
    plan_of(experiment, experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    flops = flops_of(experiment, experiment.proxy_scale)
    space = distributions(experiment)
    backend = reach(storage) if storage else None
    _refuse_other_experiment(experiment, folder)
    folder.make()
    with naming_the_disk(folder.path), only_one(folder):
        folder.note_environment(
            data_sha256=data.sha256, data=data.name, data_facts=data.facts, seed=experiment.seed, device=device
        )
        experiment.save(folder.experiment)
        study = open_study(experiment, folder, backend, name)
        if not study.get_trials(deepcopy=False) and (first := baseline(experiment)) is not None:
            study.enqueue_trial(first)
        while (missing := experiment.trials - _finished(study)) > 0:
            progress(experiment.trials - missing, experiment.trials, _best_so_far(study))
            for _ in _told(experiment, study, space, executor, flops):
                TRIALS.write(trials_frame(study.get_trials(deepcopy=False)), folder.trials)
                progress(min(_finished(study), experiment.trials), experiment.trials, _best_so_far(study))
        frame = trials_frame(study.get_trials(deepcopy=False))
        TRIALS.write(frame, folder.trials)
        tuned = _summary(experiment, study, frame, time.perf_counter() - begun)
        tuned.best.save(folder.best)
    return tuned


def _told(
    experiment: Experiment, study: optuna.Study, space: dict[str, Any], executor: Executor, flops: float
) -> Iterator[Trial]:
    """Ask for trials as the executor has room, until those finished and begun are enough; yield each after it is told.

    An interruption returns what is unfinished to the queue.
    """
    begun: dict[int, Trial] = {}
    failures = Failures(executor.capacity)

    def asked() -> Iterator[Job]:
        while _finished(study) + len(begun) < experiment.trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                trial = study.ask(fixed_distributions=space)
            begun[trial.number] = trial
            yield _job(experiment, trial)

    def report(job: Job, step: int, loss: float) -> bool:
        begun[job.key].report(loss, step)
        return begun[job.key].should_prune()

    try:
        for job, outcome in executor.run(experiment, asked(), report):
            trial = begun[job.key]
            failures.note(job.key, outcome, _finished(study))
            _tell(study, trial, outcome, flops)
            del begun[job.key]
            yield trial
    except BaseException:
        # What cannot be told now (a full disk, an interruption inside the storage) is reaped when the run resumes.
        with contextlib.suppress(Exception):
            _give_back(study, begun)
        raise


def _tell(study: optuna.Study, trial: Trial, outcome: Outcome, flops: float) -> None:
    finite = outcome.loss if math.isfinite(outcome.loss) else None
    trial.set_user_attr(
        "outcome",
        {
            "loss": finite,
            "start": outcome.start if math.isfinite(outcome.start) else None,
            "diverged": outcome.diverged,
            "steps": outcome.steps,
            "flops": flops * outcome.steps,
            "seconds": outcome.seconds,
            **({"failed": outcome.failed} if outcome.failed else {}),
        },
    )
    if outcome.failed:
        study.tell(trial, state=TrialState.FAIL)
    elif outcome.stopped:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, _penalty(outcome.start) if outcome.diverged else outcome.loss)


def _penalty(start: float) -> float:
    """What a diverged trial is told as: a NaN would be a failure, which samplers ignore and `trials` does not count."""
    return 2 * start if math.isfinite(start) else 100.0


def _give_back(study: optuna.Study, open_trials: dict[int, Trial]) -> None:
    for number, trial in open_trials.items():
        # Another state: interrupted right after its tell.
        if study.get_trials(deepcopy=False)[number].state is TrialState.RUNNING:
            study.enqueue_trial(trial.params)
            study.tell(trial, state=TrialState.FAIL)


def _job(experiment: Experiment, trial: Trial) -> Job:
    rungs = tuple(round(experiment.steps * k / (experiment.rungs + 1)) for k in range(1, experiment.rungs + 1))
    recipe = with_values(experiment.recipe, trial.params)
    return Job(trial.number, experiment.proxy_scale, experiment.parametrization, recipe, experiment.seed, rungs)


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def _best_so_far(study: optuna.Study) -> str:
    values = [trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if trial.value]
    return f"best loss {min(values):.4f}" if values else ""


def _summary(experiment: Experiment, study: optuna.Study, frame: pd.DataFrame, seconds: float) -> Tuned:
    usable = frame[(frame["state"] == "COMPLETE") & ~frame["diverged"]]
    if usable.empty:
        raise RequestError(
            f"all {len(frame)} trials diverged or were pruned: lower search.lr in the experiment and use another --out."
        )
    best = study.get_trials(deepcopy=False)[int(usable.loc[usable["value"].idxmin(), "number"])]
    assert best.value is not None
    # Not simply the first: an interrupted trial is done again under another number.
    own = baseline(experiment)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = next((trial.number for trial in complete if trial.params == own), None)
    default = None if first is None else float(frame.loc[frame["number"] == first, "value"].iloc[0])
    return Tuned(
        frame, with_values(experiment.recipe, best.params), best.value, best.params, default, seconds,
        [*_failed(study), *_at_edges(experiment, best.params)],
    )  # fmt: skip


def _failed(study: optuna.Study) -> list[str]:
    """Say how many trials gave no loss, and why the last did not."""
    outcomes = {trial.number: trial.user_attrs.get("outcome", {}) for trial in study.get_trials(deepcopy=False)}
    failed = [number for number, outcome in outcomes.items() if outcome.get("failed")]
    many = f"{len(failed)} trials" if len(failed) > 1 else "one trial"
    return [f"{many} failed, and others were done instead; trial {n}: {outcomes[n]['failed']}." for n in failed[-1:]]


def _at_edges(experiment: Experiment, params: dict[str, Any]) -> list[str]:
    found = []
    for name, range_ in experiment.search.items():
        if range_.low is None or range_.high is None:
            continue
        value, low, high = (math.log(x) if range_.log else x for x in (params[name], range_.low, range_.high))
        place = (value - low) / (high - low)
        if place < EDGE or place > 1 - EDGE:
            end = "low" if place < EDGE else "high"
            found.append(
                f"the best {name} {params[name]:.4g} is at the {end} end of its range: widen search.{name}.{end}."
            )
    return found


def _refuse_other_experiment(experiment: Experiment, folder: RunFolder) -> None:
    if not folder.experiment.exists():
        return
    before = Experiment.load(folder.experiment).model_dump(mode="json")
    now = experiment.model_dump(mode="json")
    for key in now:
        if key != "trials" and before[key] != now[key]:
            raise RequestError(
                f"{folder.path} holds a study with {key} = {before[key]}, and this experiment has {now[key]}: use another "
                "--out, or put it back to go on with that study."
            )
