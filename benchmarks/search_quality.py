"""Does a fused sweep find as good a recipe as Optuna's plain sequential TPE, with as much compute, and how much sooner?

The language is the Markov one, whose floor is known exactly, so that losses are differences from it. The sequential sweep
asks TPE for a trial when the one before is told, and stops none. The fused one has the defaults of `mutransfer tune`, asks for
up to K trials while none of them is told, and ends with as many floating point operations: of trials that are stopped early it
has more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Claim, publish
from scipy import stats

from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Budget, Experiment, Range, Size
from mutransfer.sweeps.jobs import Executor, RunContext, SequentialExecutor
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

NO_WORSE = 0.01  # of the loss above the floor: the margin of "no worse"


def experiment(seed: int, trials: int, steps: int) -> Experiment:
    """Return the sequential sweep: three hyperparameters of a one-layer transformer, by TPE, without pruning."""
    return Experiment(
        model="transformer", data="markov", sequence_length=32, proxy=Size(width=32, depth=1), batch_size=8, steps=steps,
        search={
            "lr": Range(low=2**-11, high=2**-2, log=True),
            "init_scale": Range(low=0.25, high=4, log=True),
            "alpha_output": Range(low=0.25, high=4, log=True),
        },
        sampler="tpe", pruner="none", trials=trials, seed=seed,
    )  # fmt: skip


def sweep(asked: Experiment, folder: Path, executor: Executor) -> tuple[float, float, float]:
    """Return the best loss, the seconds that the sweep took, and the floating point operations in each second of its trials."""
    begun = time.perf_counter()
    found = tune(asked, RunFolder(folder), executor=executor)
    seconds = time.perf_counter() - begun
    return found.value, seconds, found.trials["flops"].sum() / found.trials["seconds"].sum()


def interval(name: str, values: np.ndarray, bar: float, *, at_most: bool) -> Claim:
    """Return the mean with Student's 95% interval over seeds; ok if all of the interval is on the right side of the bar."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean, low, high = float(values.mean()), float(values.mean() - half), float(values.mean() + half)
    return Claim(name, mean, low, high, bar, high <= bar if at_most else low >= bar)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="does it run: two seeds, eight short trials")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--steps", type=int, default=100)
    default = Experiment()
    parser.add_argument("--sampler", default=default.sampler, help="of the fused")
    parser.add_argument("--pruner", default=default.pruner, help="of the fused")
    parser.add_argument("--count", type=int, default=16, help="K, the trials that are fused")
    parser.add_argument("--compile", action="store_true", help="the fused program, in time that is not counted")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.trials, given.steps, given.count = 2, 8, 10, 4
    fused, plain = VectorizedExecutor(given.count, compile=given.compile), SequentialExecutor()
    warm = experiment(0, given.count, given.steps)
    context = RunContext(warm)
    data = context.required_data
    assert data.floor is not None
    rows = []
    each = context.flops(warm.proxy_scale)
    assert each is not None
    budget = Budget(flops=each * given.steps * given.trials)
    more = {"sampler": given.sampler, "pruner": given.pruner, "trials": 10**4, "budget": budget}
    with tempfile.TemporaryDirectory() as folder:
        # What is compiled once is not part of any sweep's time.
        sweep(warm, Path(folder) / "warm", fused)
        for seed in range(given.first, given.first + given.seeds):
            asked = experiment(seed, given.trials, given.steps)
            runs = {"fused": (asked.model_copy(update=more), fused), "plain": (asked, plain)}
            found = {
                name: sweep(which, Path(folder) / f"{name}-{seed}", executor)
                for name, (which, executor) in (runs.items() if seed % 2 else reversed(runs.items()))
            }
            rows.append((*found["fused"], *found["plain"]))
            print(
                f"seed {seed}: fused {found['fused'][0]:.4f} in {found['fused'][1]:.1f} s, "
                f"one by one {found['plain'][0]:.4f} in {found['plain'][1]:.1f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    table = np.array(rows)
    worse = (table[:, 0] - table[:, 3]) / (table[:, 3] - data.floor)
    sooner, faster = table[:, 4] / table[:, 1], table[:, 2] / table[:, 5]
    publish(
        [
            interval("(fused − sequential best loss) / (sequential − floor)", worse, NO_WORSE, at_most=True),
            interval("sequential / fused seconds", sooner, 1.0, at_most=False),
            interval("fused / sequential operations in a trial's second", faster, 1.0, at_most=False),
        ],
        given.json,
    )


if __name__ == "__main__":
    main()
