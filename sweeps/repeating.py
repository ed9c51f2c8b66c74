"""Seeds as repeats: the best few trials trained again with other seeds, so that the best is not the luckiest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial

from mutransfer.frames import REPEATS
from mutransfer.runs import RunFolder

from .experiment import Experiment, Repeats, with_values
from .failures import needed
from .jobs import Executor, Job

__all__ = ["means", "repeat"]


def repeat(
    experiment: Experiment,
    trials: list[FrozenTrial],
    folder: RunFolder,
    executor: Executor,
    flops: float | None,
    progress: Callable[[int, int, str], None],
) -> pd.DataFrame:
    """Train the best of ``trials`` with the seeds after the experiment's own, and return the frame `frames.REPEATS`.

    Every finished run is in the folder's ``repeats.csv`` at once, and runs found there are not done again.

    Args:
        experiment: with ``repeats``.
        trials: complete trials that did not diverge.
        folder: run folder.
        executor: how runs are done.
        flops: of one step; None if they are not known.
        progress: called with (runs done, runs in all, what runs).

    Raises:
        RequestError: a run failed.
    """
    assert experiment.repeats is not None
    wanted = list(_wanted(experiment, experiment.repeats, trials))
    rows: list[Any] = REPEATS.read(folder.repeats).to_dict("records") if folder.repeats.exists() else []
    known = {(row["number"], row["seed"]) for row in rows}
    missing = [job for job in wanted if job.key not in known]
    for done, (job, outcome) in enumerate(executor.run(experiment, iter(missing)), len(wanted) - len(missing) + 1):
        needed(outcome, f"trial {job.key[0]} with seed {job.seed}")
        rows.append(
            {
                "number": job.key[0],
                "seed": job.seed,
                "loss": outcome.loss if math.isfinite(outcome.loss) else None,
                "diverged": outcome.diverged,
                "flops": None if flops is None else flops * outcome.steps,
                "seconds": outcome.seconds,
            }
        )
        REPEATS.write(REPEATS.frame(rows), folder.repeats)
        progress(done, len(wanted), f"the best {len({job.key[0] for job in wanted})} again, with other seeds")
    return REPEATS.frame(rows)


def means(trials: list[FrozenTrial], repeats: pd.DataFrame) -> dict[int, float]:
    """Return the mean loss over all seeds of each trial that was repeated; infinite where any of them diverged."""
    own = {trial.number: trial.value for trial in trials}
    found = {}
    for number, rows in repeats.groupby("number"):
        losses = [own[int(number)], *rows["loss"]]
        found[int(number)] = math.inf if rows["diverged"].any() else sum(losses) / len(losses)
    return found


def _wanted(experiment: Experiment, repeats: Repeats, trials: list[FrozenTrial]) -> Iterator[Job]:
    top = sorted(trials, key=lambda trial: (trial.value, trial.number))[: repeats.top]
    for seed in range(experiment.seed + 1, experiment.seed + repeats.seeds):
        for trial in top:
            recipe = with_values(experiment.recipe, trial.params)
            yield Job((trial.number, seed), experiment.proxy_scale, experiment.parametrization, recipe, seed)
