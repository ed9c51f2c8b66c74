"""`mutransfer demo`: the whole loop on real data, in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import AsJson, Device, Seed, device_of, emit, say

# A language model on the source of this Python's own standard library: real data that everyone has.
EXPERIMENT: dict[str, Any] = {
    "model": "transformer",
    "options": {"head_dim": 16, "ffn": "gelu"},
    "data": "bytes",
    "sequence_length": 16,
    "proxy": {"width": 16, "depth": 1},
    "steps": 80,
    "batch_size": 16,
    "recipe": {"lr": 2**-6, "schedule": "cosine", "warmup": 0.1, "clip": 1.0},
    "search": {
        "lr": {"low": 2**-8, "high": 2**-1, "log": True},
        # Not the initial scale: at width 16 half of it looks best, and costs 5% at width 256 (docs/log.md).
        "alpha_output": {"low": 0.25, "high": 8.0, "log": True},
    },
    "trials": 24,
}
WIDTHS = (16, 64, 256)
CHECK_WIDTHS = [16, 32, 64, 128, 256]
SEEDS = 5


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Run folder; an interrupted demo goes on in it.")] = Path("mutransfer-demo"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Check, tune a proxy of width 16, verify up to width 256 against SP, transfer, report: at most 3 minutes on two cores."""
    from ..files import write_json
    from ..frames import COORDINATES
    from ..reports import write_report
    from ..runs import RunFolder
    from ..sweeps.executors import executor_for
    from ..sweeps.experiment import Experiment
    from ..sweeps.jobs import family_of
    from ..sweeps.timing import limited
    from ..sweeps.tuning import tune
    from .check import begin, judge, summary
    from .console import Progress
    from .transfer import target_of
    from .verify import text_of, verify_run

    begun = time.perf_counter()
    experiment, where = Experiment.read({**EXPERIMENT, "seed": seed}, "demo"), device_of(device)
    folder = RunFolder(out).make()
    with executor_for(experiment, "processes" if where == "cpu" else "one", device=where) as executor:
        # So small a proxy gains nothing from a second thread, and on a busy machine would wait for it far longer than it works.
        with Progress("tuning the proxy, width 16") as progress, limited(1):
            found = tune(experiment, folder, device=where, progress=progress)
        gain = f", the default recipe's is {found.default:.3f}" if found.default is not None else ""
        say(f"best recipe: lr {found.best.lr:.4g}, loss {found.value:.3f}{gain}")
        verified, optima = verify_run(experiment, found.best, folder, WIDTHS, executor, seeds=SEEDS, control="sp")
    family, _ = family_of(experiment)
    asked = {"--widths": ",".join(map(str, CHECK_WIDTHS)), "--parametrization": "mup", "--seeds": 3, "--control": "sp"}
    begin(folder, experiment.subject(), asked)
    checked, frame = judge(family, CHECK_WIDTHS, "mup", "adamw", where, steps=4, seeds=3, lr=None)
    control, control_frame = judge(family, CHECK_WIDTHS, "sp", "adamw", where, steps=4, seeds=3, lr=None, patience=1)
    import pandas as pd

    COORDINATES.write(pd.concat([frame, control_frame], ignore_index=True), folder.coordinates)
    write_json(folder.check, summary(checked, "mup", control, "sp") | {"modules": None})
    folder.note_progress("check", **folder.progress("check") | {"ended": True})
    target_of(folder, WIDTHS[-1]).save(folder.target)
    report = write_report(folder.path)
    verdict = "pass" if verified["verdict"] == checked.status == "pass" else "fail"
    seconds = time.perf_counter() - begun
    result = {
        "verdict": verdict,
        "report": str(report),
        "drift_octaves": verified["drift_octaves"],
        "regret": verified["regret"],
        "price": verified["price"],
        "comparison": verified["comparison"],
        "coordinate_check": {"mup": checked.status, "sp": control.status},
        "seconds": seconds,
    }
    text = (
        f"{text_of(verified, optima)}\n"
        f"coordinate check: µP {checked.status}, SP {control.status} ({control.cause or 'healthy'})\n"
        f"{seconds:.0f} s in all\nreport: {report}"
    )
    emit(result, as_json, text)
    return 0 if verdict == "pass" else 1
