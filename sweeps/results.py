"""Results of a study: its trials, the best recipe, replicates of the best few over seeds, and what to say about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from mutransfer.errors import RequestError
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import REPEATS

from .experiment import Experiment, with_values
from .jobs import Executor, Job
from .study import baseline
from .user_trainers import needed
from .workers import FINISHED, Heartbeats

__all__ = ["LOOK_EVERY", "Replicates", "Tuned", "at_edges", "best_so_far", "means", "summary", "usable"]

DONE = "mutransfer:repeat:"  # of a study's attribute: a run's row, by trial and seed
CLAIM = "mutransfer:repeating:"  # and who does it
LOOK_EVERY = 0.5  # seconds between looks at what other workers do


class Replicates:
    """The runs of the best trials with the seeds after the experiment's own; workers of a study share them.

    A claim is no lock: two workers that claim a run in the same moment both do it, and the first to end is taken.

    Args:
        experiment: with ``repeats``.
        study: where finished runs are kept, so that none is done again.
        trials: complete trials that did not diverge.
        owner: this worker.
        leases: tells the others that are dead; None if there are no others.
    """

    def __init__(
        self,
        experiment: Experiment,
        study: optuna.Study,
        trials: list[FrozenTrial],
        owner: str,
        leases: Heartbeats | None,
    ) -> None:
        assert experiment.repeats is not None
        sign = -1 if experiment.maximize else 1
        top = sorted(trials, key=lambda trial: (sign * (trial.value or 0.0), trial.number))[: experiment.repeats.top]
        seeds = range(experiment.seed + 1, experiment.seed + experiment.repeats.seeds)
        self.wanted = [_job(experiment, trial, seed) for seed in seeds for trial in top]
        self.experiment, self.study, self.owner, self.leases = experiment, study, owner, leases

    def run(
        self, folder: RunFolder, executor: Executor, flops: float | None, progress: Callable[[int, int, str], None]
    ) -> pd.DataFrame:
        """Do what is missing, wait for what others do, and return the frame `schemas.REPEATS`.

        It is in the folder's ``repeats.csv`` after every run.

        Args:
            folder: run folder.
            executor: how runs are done.
            flops: of one step; None if they are not known.
            progress: called with (runs done, runs in all, what runs).

        Raises:
            RequestError: a run failed.
        """
        words = f"the best {len({job.key[0] for job in self.wanted})} again, with other seeds"
        while len(rows := self._rows()) < len(self.wanted):
            idle = True
            for job, outcome in executor.run(self.experiment, self._claimed()):
                idle = False
                needed(outcome, f"trial {job.key[0]} with seed {job.seed}")
                if DONE + _name(job) not in self.study.user_attrs:
                    self.study.set_user_attr(DONE + _name(job), _row(job, outcome, flops))
                rows = self._rows()
                REPEATS.write(REPEATS.frame(rows), folder.repeats)
                progress(len(rows), len(self.wanted), words)
            if idle:
                time.sleep(LOOK_EVERY)
        frame = REPEATS.frame(rows)
        REPEATS.write(frame, folder.repeats)
        return frame

    def _rows(self) -> list[dict[str, Any]]:
        """The finished runs of the trials that are the best now."""
        known = self.study.user_attrs
        return [known[DONE + _name(job)] for job in self.wanted if DONE + _name(job) in known]

    def _claimed(self) -> Iterator[Job]:
        """Claim what nobody does, or who does it is dead."""
        for job in self.wanted:
            known = self.study.user_attrs
            owner = known.get(CLAIM + _name(job))
            if DONE + _name(job) in known or (owner is not None and owner != self.owner and not self._dead(owner)):
                continue
            self.study.set_user_attr(CLAIM + _name(job), self.owner)
            if self.study.user_attrs[CLAIM + _name(job)] == self.owner:  # or another was as fast
                yield job

    def _dead(self, owner: str) -> bool:
        return self.leases is None or self.leases.silent(owner)


def means(trials: list[FrozenTrial], repeats: pd.DataFrame, *, maximize: bool = False) -> dict[int, float]:
    """Return the mean loss over all seeds of each trial that was repeated; infinitely bad where any of them diverged."""
    own = {trial.number: trial.value for trial in trials}
    found = {}
    for number, rows in repeats.groupby("number"):
        losses = [own[int(number)], *rows["loss"]]
        lost = -math.inf if maximize else math.inf
        found[int(number)] = lost if rows["diverged"].any() else sum(losses) / len(losses)
    return found


def _job(experiment: Experiment, trial: FrozenTrial, seed: int) -> Job:
    recipe = with_values(experiment.recipe, trial.params)
    return Job((trial.number, seed), experiment.proxy_scale, experiment.parametrization, recipe, seed)


def _name(job: Job) -> str:
    return ":".join(map(str, job.key))


def _row(job: Job, outcome: Outcome, flops: float | None) -> dict[str, Any]:
    return {
        "number": job.key[0],
        "seed": job.seed,
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
        "diverged": outcome.diverged,
        "flops": None if flops is None else flops * outcome.steps,
        "seconds": outcome.seconds,
    }


EDGE = 0.03  # of a range, in its own scale: closer to an end than this is "at the edge"


@dataclass(frozen=True)
class Tuned:
    """What a study has found so far; ``value`` is the best's loss, a mean over seeds where it was repeated."""

    trials: pd.DataFrame
    best: Recipe
    value: float
    params: dict[str, Any]
    default: float | None
    seconds: float
    warnings: list[str] = field(default_factory=list)


def best_so_far(study: optuna.Study) -> str:
    """Return the best loss in words, or nothing before there is one."""
    values = [
        trial.value
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.value is not None
    ]
    if study.direction is optuna.study.StudyDirection.MAXIMIZE:
        return f"best metric {max(values):.4f}" if values else ""
    return f"best loss {min(values):.4f}" if values else ""


def usable(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials that did not diverge."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in complete if not trial.user_attrs.get("outcome", {}).get("diverged", False)]


def summary(
    experiment: Experiment, study: optuna.Study, frame: pd.DataFrame, again: pd.DataFrame | None, seconds: float
) -> Tuned:
    """Return what was found.

    Args:
        experiment: what was tuned.
        study: its study.
        frame: the study's trials (`trials_frame`).
        again: `schemas.REPEATS` of the best few; the best is then the one with the best mean over seeds.
        seconds: that it took.

    Raises:
        RequestError: no trial has a loss to choose by.
    """
    trials = usable(study)
    if not trials:
        finished = int(frame["state"].isin([state.name for state in FINISHED]).sum())
        if not finished:
            raise RequestError("the budget does not reach for one trial: raise it, or lower steps.")
        raise RequestError(
            f"all {finished} trials diverged or were pruned: lower search.lr in the experiment and use another --out."
        )
    losses = (
        {trial.number: float(trial.value or 0.0) for trial in trials}
        if again is None
        else means(trials, again, maximize=experiment.maximize)
    )
    best = study.get_trials(deepcopy=False)[
        max(losses, key=losses.__getitem__) if experiment.maximize else min(losses, key=losses.__getitem__)
    ]
    if math.isinf(losses[best.number]):
        raise RequestError(
            f"the best {len(losses)} trials all diverged with another seed: lower search.lr in the experiment and use "
            "another --out."
        )
    # Not simply the first: an interrupted trial is done again under another number.
    own = baseline(experiment)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = next((trial.number for trial in complete if trial.params == own), None)
    default = None if first is None else float(frame.loc[frame["number"] == first, "value"].iloc[0])
    return Tuned(
        frame, with_values(experiment.recipe, best.params), losses[best.number], best.params, default, seconds,
        [*_failed(study), *_unheard(experiment, study), *_at_edges(experiment, best.params)],
    )  # fmt: skip


def _failed(study: optuna.Study) -> list[str]:
    """Say how many trials gave no loss, and why the last did not."""
    outcomes = {trial.number: trial.user_attrs.get("outcome", {}) for trial in study.get_trials(deepcopy=False)}
    failed = [number for number, outcome in outcomes.items() if outcome.get("failed")]
    many = f"{len(failed)} trials" if len(failed) > 1 else "one trial"
    return [f"{many} failed, and others were done instead; trial {n}: {outcomes[n]['failed']}." for n in failed[-1:]]


def _unheard(experiment: Experiment, study: optuna.Study) -> list[str]:
    """An own trainer that counts in other units, or tells nothing, is never pruned: say so."""
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    if experiment.trainer is None or experiment.pruner == "none" or any(t.intermediate_values for t in finished):
        return []
    return [
        f"no trial reported a loss at or after step {experiment.rung_steps[0]}, the first rung of a run of steps: "
        f"{experiment.steps}, so none could be pruned: report while training, count as steps does, or set pruner: none."
    ]


def at_edges(experiment: Experiment, params: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """Return (name, value, "low" or "high") of every searched value that lies at an end of its range."""
    found = []
    for name, range_ in experiment.search.items():
        if range_.low is None or range_.high is None:
            continue
        value, low, high = (math.log(x) if range_.log else x for x in (params[name], range_.low, range_.high))
        place = (value - low) / (high - low)
        if place < EDGE or place > 1 - EDGE:
            found.append((name, params[name], "low" if place < EDGE else "high"))
    return found


def _at_edges(experiment: Experiment, params: dict[str, Any]) -> list[str]:
    return [
        f"the best {name} {value:.4g} is at the {end} end of its range: widen search.{name}.{end}."
        for name, value, end in at_edges(experiment, params)
    ]
