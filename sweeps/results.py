"""Results of a study: its trials, the best recipe, replicates over seeds, warnings about them, and what a target takes over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from mutransfer.errors import RequestError
from mutransfer.io import read_json
from mutransfer.planning.target import TargetConfig, of_evidence, regularizers, target_config
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import REPEATS

from .experiment import Experiment, with_values
from .jobs import Executor, Job, RunContext, run_jobs
from .study import baseline
from .user_trainers import needed
from .workers import FINISHED, Heartbeats

__all__ = [
    "LOOK_EVERY",
    "Replicates",
    "Tuned",
    "at_edges",
    "best_so_far",
    "means",
    "summary",
    "target_of_run",
    "usable",
]

DONE = "mutransfer:repeat:"  # prefix of the study attribute that holds a run's row, by trial and seed
CLAIM = "mutransfer:repeating:"  # prefix of the study attribute that names the worker of a run
LOOK_EVERY = 0.5  # seconds between checks of the other workers' progress


class Replicates:
    """Replicates of the best trials, with the seeds that follow the experiment's seed; the workers of a study share them.

    A claim is not a lock: if two workers claim a run at the same moment, both train it and the first result counts.

    Args:
        context: context of an experiment with ``repeats``.
        study: stores the finished runs, so none is repeated.
        trials: complete trials that did not diverge.
        owner: name of this worker.
        leases: heartbeats of the other workers; None if there are no others.
    """

    def __init__(
        self,
        context: RunContext,
        study: optuna.Study,
        trials: list[FrozenTrial],
        owner: str,
        leases: Heartbeats | None,
    ) -> None:
        experiment = context.experiment
        assert experiment.repeats is not None
        sign = -1 if experiment.maximize else 1
        top = sorted(trials, key=lambda trial: (sign * (trial.value or 0.0), trial.number))[: experiment.repeats.top]
        seeds = range(experiment.seed + 1, experiment.seed + experiment.repeats.seeds)
        self.wanted = [_job(experiment, trial, seed) for seed in seeds for trial in top]
        self.context, self.study, self.owner, self.leases = context, study, owner, leases

    def run(
        self, folder: RunFolder, executor: Executor, flops: float | None, progress: Callable[[int, int, str], None]
    ) -> pd.DataFrame:
        """Train the missing runs, wait for those of other workers, and return the frame `schemas.REPEATS`.

        The frame is written to the folder's ``repeats.csv`` after every run.

        Args:
            folder: run folder.
            executor: trains the runs.
            flops: floating point operations of one step; None if unknown.
            progress: called with (runs done, runs in total, text about the current runs).

        Raises:
            RequestError: a run failed.
        """
        words = f"the best {len({job.key[0] for job in self.wanted})} again, with other seeds"
        while len(rows := self._rows()) < len(self.wanted):
            idle = True
            for job, outcome in run_jobs(executor, self.context, self._claimed()):
                idle = False
                needed(outcome, f"trial {job.key[0]} with seed {job.seed}")
                if DONE + _name(job) not in self.study.user_attrs:
                    spent = flops and self.context.flops(job.scale, job.recipe)
                    self.study.set_user_attr(DONE + _name(job), _row(job, outcome, spent))
                rows = self._rows()
                REPEATS.write(REPEATS.frame(rows), folder.repeats)
                progress(len(rows), len(self.wanted), words)
            if idle:
                time.sleep(LOOK_EVERY)
        frame = REPEATS.frame(rows)
        REPEATS.write(frame, folder.repeats)
        return frame

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of the finished runs of the trials that are currently the best."""
        known = self.study.user_attrs
        return [known[DONE + _name(job)] for job in self.wanted if DONE + _name(job) in known]

    def _claimed(self) -> Iterator[Job]:
        """Claim and yield runs that have no worker, or whose worker missed its heartbeat."""
        for job in self.wanted:
            known = self.study.user_attrs
            owner = known.get(CLAIM + _name(job))
            if DONE + _name(job) in known or (owner is not None and owner != self.owner and not self._dead(owner)):
                continue
            self.study.set_user_attr(CLAIM + _name(job), self.owner)
            if (
                self.study.user_attrs[CLAIM + _name(job)] == self.owner
            ):  # otherwise another worker claimed it at the same moment
                yield job

    def _dead(self, owner: str) -> bool:
        return self.leases is None or self.leases.silent(owner)


def means(trials: list[FrozenTrial], repeats: pd.DataFrame, *, maximize: bool = False) -> dict[int, float]:
    """Return the mean loss over all seeds of each replicated trial; infinitely bad if any of its runs diverged."""
    values = {trial.number: trial.value for trial in trials}
    found = {}
    for number, rows in repeats.groupby("number"):
        losses = [values[int(number)], *rows["loss"]]
        worst = -math.inf if maximize else math.inf
        found[int(number)] = worst if rows["diverged"].any() else sum(losses) / len(losses)
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


EDGE = (
    0.03  # fraction of a range (in log scale if it is logarithmic): values closer to an end than this are "at the edge"
)


@dataclass(frozen=True)
class Tuned:
    """Results of a study so far.

    Attributes:
        trials: all trials (`schemas.TRIALS`).
        best: recipe of the best trial.
        value: loss of the best trial; its mean over seeds if it was replicated.
        params: searched hyperparameters of the best trial.
        default: loss of the experiment's own recipe; None if that is not among the complete trials.
        seconds: duration of the call.
        warnings: sentences about failed trials, missing reports and values at the end of their range.
    """

    trials: pd.DataFrame
    best: Recipe
    value: float
    params: dict[str, Any]
    default: float | None
    seconds: float
    warnings: list[str] = field(default_factory=list)


def best_so_far(study: optuna.Study) -> str:
    """Return the best loss as text, or an empty string before there is one."""
    values = [
        trial.value
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.value is not None
        and not trial.user_attrs.get("outcome", {}).get("diverged")  # whose value is a penalty
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
    """Return the results of a study.

    Args:
        experiment: the experiment that was tuned.
        study: its study.
        frame: the study's trials (`trials_frame`).
        again: replicates of the best trials (`schemas.REPEATS`); the best is then the trial with the best mean over seeds.
        seconds: duration of the call.

    Raises:
        RequestError: no trial has a usable loss.
    """
    trials = usable(study)
    if not trials:
        finished = int(frame["state"].isin([state.name for state in FINISHED]).sum())
        if not finished:
            raise RequestError("the budget does not allow a single trial: raise it, or lower steps.")
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
    # The baseline is not always trial 0: an interrupted trial is retried under another number.
    defaults = baseline(experiment)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = next((trial.number for trial in complete if trial.params == defaults), None)
    default = None if first is None else float(frame.loc[frame["number"] == first, "value"].iloc[0])
    return Tuned(
        frame, with_values(experiment.recipe, best.params), losses[best.number], best.params, default, seconds,
        [*_failed(study), *_never_pruned(experiment, study), *_at_edges(experiment, best.params)],
    )  # fmt: skip


def _failed(study: optuna.Study) -> list[str]:
    """Return a warning with the number of failed trials and the reason of the last failure; empty if none failed."""
    outcomes = {trial.number: trial.user_attrs.get("outcome", {}) for trial in study.get_trials(deepcopy=False)}
    failed = [number for number, outcome in outcomes.items() if outcome.get("failed")]
    many = f"{len(failed)} trials" if len(failed) > 1 else "one trial"
    return [f"{many} failed, and others were run instead; trial {n}: {outcomes[n]['failed']}." for n in failed[-1:]]


def _never_pruned(experiment: Experiment, study: optuna.Study) -> list[str]:
    """Return a warning if a user trainer reports nothing, or counts steps in other units: it can then never be pruned."""
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    if experiment.trainer is None or experiment.pruner == "none" or any(t.intermediate_values for t in finished):
        return []
    return [
        f"no trial reported a loss at or after step {experiment.rung_steps[0]}, the first rung with steps: "
        f"{experiment.steps}, so none could be pruned: report while training, count as steps does, or set pruner: none."
    ]


def at_edges(experiment: Experiment, params: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """Return (name, value, "low" or "high") for every searched value at an end of its range."""
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


def target_of_run(
    folder: RunFolder,
    width: int,
    depth: int | None = None,
    batch_size: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    written_to: Path | None = None,
    context: RunContext | None = None,
) -> TargetConfig:
    """Return the `TargetConfig` of a run folder at another scale; sizes default to the proxy's.

    ``written_to`` is the folder that the config will be written to, by default the run folder. The family and data of
    ``context`` are used if they are the run's.
    """
    experiment, recipe = Experiment.of_run(folder), Recipe.load(folder.best)
    context = RunContext(experiment) if context is None else context.for_(experiment)
    family, data = context.family, context.data
    scale = family.base.with_(width=width, depth=depth or experiment.proxy.depth)
    batch_size = batch_size or experiment.batch_size
    per_example = experiment.sequence_length if data is not None and data.kind == "tokens" else 1
    steps = (
        -(-tokens // (batch_size * per_example))
        if tokens
        else max(1, experiment.steps * experiment.batch_size // batch_size)
    )
    before = read_json(folder.environment, "the run's environment") if folder.environment.exists() else {}
    known = before.get("data_sha256")
    if known and data is not None and known != data.sha256:
        raise RequestError(
            f"{folder.path} holds results on data with SHA-256 {known[:12]}…, but the data is now {data.sha256[:12]}…: tune "
            "again on this data with another --out, or put the old data back."
        )
    provenance = {
        "run": str(folder.path),
        "data_sha256": data and data.sha256,
        "roles": dict(family.roles),
        "versions": before.get("versions"),
        "commands": before.get("commands"),
        "trainer": None if experiment.trainer is None else experiment.trainer.model_dump(mode="json"),
        "direction": experiment.direction,
        "folder": experiment.folder,
        "places": experiment.places(written_to or folder.path),
    }
    planned = partial(context.plan, parametrization=experiment.parametrization, recipe=recipe)
    unproven = of_evidence(folder, recipe, experiment.subject(), [experiment.base_scale.width * 2**k for k in range(4)])
    counted = planned(experiment.proxy_scale).rows if recipe.law == "power-lines" else ()
    return target_config(
        planned(scale),
        proxy_parameters=sum(math.prod(row.shape) for row in counted) or None,
        model=experiment.model,
        options=experiment.options,
        data=experiment.data,
        sequence_length=per_example,
        proxy=experiment.proxy_scale,
        proxy_batch_size=experiment.batch_size,
        proxy_steps=experiment.steps,
        batch_size=batch_size,
        steps=steps,
        tuned=sorted(experiment.search),
        seed=seed,
        provenance=provenance,
        regularizers=regularizers(family),
        unproven=list(unproven),
    )
