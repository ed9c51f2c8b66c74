"""`mutransfer demo`: the whole loop on real data, in minutes."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import AsJson, Device, Seed, device_of, emit, say

if TYPE_CHECKING:
    from ..recipe import Scale
    from ..sweeps.experiment import Experiment
    from ..sweeps.jobs import Executor

# A language model on the source code of the installed Python's standard library: real data that is always available.
EXPERIMENT: dict[str, Any] = {
    "model": "transformer",
    "options": {"head_dim": 16, "ffn": "gelu"},
    "data": "bytes",
    "sequence_length": 16,
    "proxy": {"width": 16, "depth": 1},
    "steps": 64,
    "batch_size": 16,
    "recipe": {"lr": 2**-6, "schedule": "cosine", "warmup": 0.1, "clip": 1.0},
    "search": {
        "lr": {"low": 2**-8, "high": 2**-1, "log": True},
        # init_scale is not searched: at width 16 half the scale looks best, but it costs 5% at width 256 (docs/log.md).
        "alpha_output": {"low": 0.25, "high": 8.0, "log": True},
    },
    "trials": 24,
}
# Assumptions of the forecast of the time left, measured on two cores of an EPYC.
PRUNED = 0.7  # average cost of a trial, as a fraction of a whole run, if the worse half ends at 40%
ASKING = 0.1  # seconds that the sampler takes to propose a trial
SIDE_BY_SIDE = 1.1  # how much slower a run is while another one runs
# Seconds of a fused run on two cores, relative to one alone on one core: 0.15 at width 16, 0.3 at 64, 0.55 at 256.
FUSED, FUSED_POWER = 0.04, 0.47
START = 5.0  # seconds until processes have imported torch
CHECK_AND_REPORT = 18.0  # seconds
MANY = 5  # cores from which processes are faster than fused runs
WIDTHS = (16, 64, 256)
CHECK_WIDTHS = [16, 32, 64, 128, 256]
SEEDS = 5
AT_ONCE = 25  # largest number of fused runs


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Run folder; an interrupted demo resumes from it.")] = Path(
        "mutransfer-demo"
    ),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Run the whole loop on real data.

    Tune a proxy of width 16, verify up to width 256 against SP, check, transfer and report: about two minutes on two cores.
    """
    from ..devices import limited_threads
    from ..io import write_json
    from ..reports import write_report
    from ..run_dir import RunFolder
    from ..schemas import COORDINATES
    from ..sweeps.autoselect import Forecast, TimedExecutor, run_seconds
    from ..sweeps.executors import PerScaleExecutor, executor_for
    from ..sweeps.experiment import Experiment
    from ..sweeps.jobs import RunContext
    from ..sweeps.results import target_of_run
    from ..sweeps.tune import tune
    from ..sweeps.verify import verify_run
    from .check import begin, judge, summary
    from .console import Progress
    from .verify import text_of

    start = time.perf_counter()
    experiment, where = Experiment.read({**EXPERIMENT, "seed": seed}, "demo"), device_of(device)
    folder, context = RunFolder(out).make(), RunContext(experiment)
    with contextlib.ExitStack() as held:
        fused = where != "cpu" or len(os.sched_getaffinity(0)) < MANY
        executor: Executor = PerScaleExecutor(lambda at, jobs, independent: _fused(jobs, independent, where))
        if not fused:
            executor = held.enter_context(executor_for(experiment, "processes", device=where))
        scales = [experiment.proxy_scale.with_(width=width) for width in WIDTHS]
        with limited_threads(1):  # one thread, as in a process
            alone = {scale: run_seconds(context, scale, where) for scale in scales}
        side_by_side = SIDE_BY_SIDE / executor.capacity
        seconds = {
            scale: alone[scale] * (FUSED * scale.width**FUSED_POWER if fused else side_by_side) for scale in scales
        }
        forecast = Forecast(_phases(experiment, seconds, 0.0 if fused else START))
        timed = TimedExecutor(executor, forecast, seconds)
        forecast.begin("tuning")
        with Progress(f"tuning the proxy, width {WIDTHS[0]}", forecast.left) as progress:
            found = tune(experiment, folder, executor=timed, device=where, progress=progress, context=context)
        gain = f" (default recipe: {found.default:.3f})" if found.default is not None else ""
        say(f"best recipe: lr {found.best.lr:.4g}, loss {found.value:.3f}{gain}")
        verified, optima = verify_run(
            context, found.best, folder, WIDTHS, timed,
            seeds=SEEDS, control="sp", device=where, forecast=forecast, progress=Progress,
        )  # fmt: skip
    arguments = {
        "--widths": ",".join(map(str, CHECK_WIDTHS)),
        "--parametrization": "mup",
        "--seeds": 3,
        "--control": "sp",
    }
    begin(folder, experiment.subject(), arguments)
    forecast.begin("check and report")
    checked, frame = judge(context.family, CHECK_WIDTHS, "mup", "adamw", where, steps=4, seeds=3, lr=None)
    control, control_frame = judge(
        context.family, CHECK_WIDTHS, "sp", "adamw", where, steps=4, seeds=3, lr=None, patience=1
    )
    import pandas as pd

    COORDINATES.write(pd.concat([frame, control_frame], ignore_index=True), folder.coordinates)
    write_json(folder.check, summary(checked, "mup", control, "sp") | {"modules": None})
    folder.note_progress("check", **folder.progress("check") | {"ended": True})
    target_of_run(folder, WIDTHS[-1], context=context).save(folder.target)
    report = write_report(folder.path)
    verdict = "pass" if verified["verdict"] == checked.status == "pass" else "fail"
    took = time.perf_counter() - start
    result = {
        "verdict": verdict,
        "report": str(report),
        "drift_octaves": verified["drift_octaves"],
        "regret": verified["regret"],
        "price": verified["price"],
        "comparison": verified["comparison"],
        "control": verified["control"],
        "coordinate_check": {"mup": checked.status, "sp": control.status},
        "seconds": took,
    }
    text = (
        f"{text_of(verified, optima)}\n"
        f"coordinate check: µP {checked.status}, SP {control.status} ({control.cause or 'healthy'})\n"
        f"{took:.0f} s in total\nreport: {report}"
    )
    emit(result, as_json, text)
    return 0 if verdict == "pass" else 1


def _fused(jobs: int | None, independent: bool, device: str) -> Executor:
    """Return an executor of fused runs: all at once, or so many that a sampler learns from several batches."""
    from ..sweeps.autoselect import LEARNING
    from ..sweeps.vectorized.executor import VectorizedExecutor

    count = jobs or AT_ONCE
    return VectorizedExecutor(max(2, min(count if independent else count // LEARNING, AT_ONCE)), device)


def _phases(experiment: Experiment, seconds: Mapping[Scale, float], start: float) -> dict[str, float]:
    """Return the expected seconds of each phase.

    Args:
        experiment: the experiment.
        seconds: seconds of a run at each scale.
        start: seconds until the executor has started.
    """
    from ..sweeps.verify import REACH

    proxy, *_, widest = seconds
    # Learning rates around the transferred one; for SP those around its likely best one, and the transferred one.
    points = {scale: 2 * (2 * REACH + 1) + (math.log2(scale.width / proxy.width) > REACH) for scale in seconds}
    return {
        "tuning": start + experiment.trials * (PRUNED * seconds[proxy] + ASKING),
        "basins": SEEDS * sum(points[scale] * each for scale, each in seconds.items()),
        "control": (experiment.trials * PRUNED + SEEDS) * seconds[widest] + experiment.trials * ASKING,
        "check and report": CHECK_AND_REPORT,
    }
