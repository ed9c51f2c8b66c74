"""Seeds as repeats: the best few trials trained again with other seeds, so that the best is not the luckiest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from mutransfer.proxies.training import Outcome
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import REPEATS

from .experiment import Experiment, with_values
from .failures import needed
from .jobs import Executor, Job
from .leases import Leases

__all__ = ["LOOK_EVERY", "Repeating", "means"]

DONE = "mutransfer:repeat:"  # of a study's attribute: a run's row, by trial and seed
CLAIM = "mutransfer:repeating:"  # and who does it
LOOK_EVERY = 0.5  # seconds between looks at what other workers do


class Repeating:
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
        self, experiment: Experiment, study: optuna.Study, trials: list[FrozenTrial], owner: str, leases: Leases | None
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
