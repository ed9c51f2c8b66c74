"""Which sampler, pruner and number at once find the best recipe? Sweeps of `search_quality.py` on losses that are looked up.

A sweep of 48 trials takes a quarter of a minute to train, and telling two samplers apart takes many. So the losses of one seed
at every rung are tabulated once over a grid of recipes (six minutes), and sweeps by `tune` itself, which takes a second each,
read them off, linear in between. What is chosen here is to be confirmed by `search_quality.py`, on seeds that were not tabulated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from harness import publish
from scipy.interpolate import RegularGridInterpolator
from search_quality import NO_WORSE, experiment, interval

from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Budget, Experiment, with_values
from mutransfer.sweeps.jobs import Done, Events, Executor, Job, Report, Reports, RunContext, Session, run_jobs
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

STEPS, TRIALS = 100, 48
POINTS = {"lr": 28, "init_scale": 11, "alpha_output": 11}


def axes(asked: Experiment) -> list[np.ndarray]:
    """Return the grid's places in octaves, by hyperparameter."""
    ends = {name: np.log2(asked.search[name].ends()) for name in POINTS}
    return [np.linspace(*ends[name], count) for name, count in POINTS.items()]


def tabulated(seed: int, file: Path) -> np.ndarray:
    """Return losses at each rung and at the end, by hyperparameter; trained unless ``file`` holds them."""
    if file.exists():
        return np.load(file)
    asked = experiment(seed, TRIALS, STEPS)
    rungs = (*asked.rung_steps, STEPS)
    losses = np.full((*POINTS.values(), len(rungs)), np.nan)

    def jobs() -> Iterator[Job]:
        for at in itertools.product(*(range(count) for count in POINTS.values())):
            values = {
                name: 2 ** axis[k] for (name, axis), k in zip(zip(POINTS, axes(asked), strict=True), at, strict=True)
            }
            recipe = with_values(asked.recipe, values)
            yield Job(at, asked.proxy_scale, asked.parametrization, recipe, asked.seed, asked.rung_steps)

    def report(reports: Sequence[Report]) -> tuple[()]:
        for each in reports:
            losses[(*each.job.key, rungs.index(each.step))] = each.loss
        return ()

    for done, (job, outcome) in enumerate(run_jobs(VectorizedExecutor(64), RunContext(asked), jobs(), report), 1):
        losses[(*job.key, -1)] = 2 * outcome.start if outcome.diverged else outcome.loss
        if done % 320 == 0:
            print(f"seed {seed}: {done} of {losses[..., 0].size} recipes", file=sys.stderr, flush=True)
    np.save(file, losses)
    return losses


class LookedUp(Executor):
    """An executor whose trials, ``capacity`` at a time, take their losses from a table instead of training."""

    def __init__(self, capacity: int, losses: np.ndarray, asked: Experiment, floor: float) -> None:
        self._capacity, self._floor = capacity, floor
        heights = np.log(np.where(np.isfinite(losses), losses, np.nanmax(losses)) - floor)
        self._heights = RegularGridInterpolator(axes(asked), heights, bounds_error=False, fill_value=None)

    @property
    def capacity(self) -> int:
        """See `Executor`."""
        return self._capacity

    def losses(self, recipe: Recipe) -> list[float]:
        """Return the losses of ``recipe`` at its rungs and at the end."""
        return (self._floor + np.exp(self._heights([np.log2(getattr(recipe, name)) for name in POINTS])[0])).tolist()

    def events(self, session: Session) -> Events:
        """See `Executor`; all that are begun come to their next rung together."""
        running = dict[int, tuple[Job, list[float]]]()
        marks = (*session.experiment.rung_steps, session.experiment.steps)
        while True:
            for job in (yield from session.take(self.capacity - len(running))):
                running[job.key] = job, self.losses(job.recipe)
            if not running:
                return
            come = {key: Report(job, marks[-len(left)], left.pop(0)) for key, (job, left) in running.items()}
            if rungs := tuple(each for key, each in come.items() if running[key][1]):
                yield Reports(rungs)
            for key, each in come.items():
                stopped = bool(running[key][1]) and session.is_stopped(key)
                if stopped or not running[key][1]:
                    del running[key]
                    yield Done(each.job, Outcome(each.loss, 2 * each.loss, each.step, stopped, 0.01))


def main() -> None:
    """Measure and publish."""
    default = Experiment()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--tables", type=Path, default=Path("tabulated"), help="folder of the tables, made where missing"
    )
    parser.add_argument("--landscapes", type=int, nargs="+", default=[1000, 1001], help="seeds that are tabulated")
    parser.add_argument("--seeds", type=int, default=30, help="sweeps of each landscape")
    parser.add_argument("--sampler", default=default.sampler)
    parser.add_argument(
        "--pruner", default=default.pruner, choices=["half", "median", "none"], help="its rungs are tabulated"
    )
    parser.add_argument("--count", type=int, default=16, help="K, the trials at once")
    given = parser.parse_args()
    given.tables.mkdir(parents=True, exist_ok=True)
    warm = experiment(0, TRIALS, STEPS)
    context = RunContext(warm)
    data, each = context.required_data, context.flops(warm.proxy_scale)
    assert each is not None
    assert data.floor is not None
    more = {
        "sampler": given.sampler,
        "pruner": given.pruner,
        "trials": 10**4,
        "budget": Budget(flops=each * STEPS * TRIALS),
    }
    worse = []
    with tempfile.TemporaryDirectory() as folder:

        def best(asked: Experiment, executor: Executor, name: str) -> float:
            return tune(asked, RunFolder(Path(folder) / name), executor=executor).value

        for landscape, seed in itertools.product(given.landscapes, range(given.seeds)):
            losses = tabulated(landscape, given.tables / f"{landscape}.npy")
            asked = experiment(seed, TRIALS, STEPS)
            plain = best(asked, LookedUp(1, losses, asked, data.floor), f"plain-{landscape}-{seed}")
            changed = asked.model_copy(update=more)
            found = best(changed, LookedUp(given.count, losses, asked, data.floor), f"changed-{landscape}-{seed}")
            worse.append((found - plain) / (plain - data.floor))
    name = f"(K = {given.count}, {given.sampler}, {given.pruner} − sequential TPE's best loss) / (sequential − floor)"
    publish([interval(name, np.array(worse), NO_WORSE, at_most=True)], given.json)


if __name__ == "__main__":
    main()
