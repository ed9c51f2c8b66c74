"""`mutransfer tune`: tune the proxy with Optuna."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, Device, Progress, device_of, emit, ended_as_by_ctrl_c, say


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("tune")(tune)


def tune(
    experiment: Annotated[Path, typer.Argument(help="An experiment file; `mutransfer init` writes one.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="Change a value: --set recipe.lr=0.01.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Storage that workers share: postgresql://…, grpc://…, redis://…, journal:FILE.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study in that storage.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Total number of finished trials, including earlier ones.")
    ] = None,
    lease: Annotated[
        float,
        typer.Option(min=1, help="Seconds without a heartbeat after which other workers retry a worker's trials."),
    ] = 60,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/NAME, with the name of the experiment.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed.")] = None,
    executor: Annotated[
        str,
        typer.Option(
            help="one: one trial after the other; processes: trials in parallel on the CPU; fused: many trials as one program; "
            "auto: the fastest of these according to a short measurement."
        ),
    ] = "auto",
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Number of trials to run in parallel; by default chosen for speed.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Matrix products of fused trials: float32, tf32 (on a GPU), or bfloat16.")
    ] = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Find the best hyperparameters of the proxy.

    Another call, also by other workers, adds only the missing trials.
    """
    import torch

    from ..run_dir import RunFolder
    from ..sweeps.executors import executor_for
    from ..sweeps.experiment import Experiment
    from ..sweeps.jobs import RunContext
    from ..sweeps.tune import tune as run

    overrides = list(changes or [])
    overrides += [f"trials={trials}"] if trials is not None else []
    overrides += [f"seed={seed}"] if seed is not None else []
    loaded = Experiment.load(experiment, overrides)
    context = RunContext(loaded)
    folder = RunFolder(
        out
        or Path("runs")
        / (experiment.parent.name if experiment.stem == "experiment" and experiment.parent.name else experiment.stem)
    )
    torch.set_num_threads(min(torch.get_num_threads(), 2))  # a proxy is too small to use more
    where = device_of(device)
    with (
        ended_as_by_ctrl_c(),
        executor_for(
            loaded, executor, at_once, where,
            # Workers that share a study may also share the folder, but a checkpoint belongs to one process.
            precision=precision, checkpoints=None if storage else folder.path / "checkpoints",
            folder=folder.path, context=context,
        ) as trial_executor,
        Progress(f"tuning {loaded.model} at width {loaded.proxy.width}") as progress,
    ):  # fmt: skip
        found = run(
            loaded, folder,
            storage=storage, name=study, lease=lease, executor=trial_executor, device=where, progress=progress,
            context=context,
        )  # fmt: skip
    folder.note_environment(precision=precision)
    frame = found.trials
    result = {
        "trials": len(frame),
        "finished": int(frame["state"].isin(["COMPLETE", "PRUNED"]).sum()),
        "diverged": int(frame["diverged"].sum()),
        "pruned": int((frame["state"] == "PRUNED").sum()),
        "best": {"value": found.value, "params": found.params},
        "default": {"value": found.default},
        "seconds": found.seconds,
        "run": str(folder.path),
        "warnings": found.warnings,
    }
    for warning in found.warnings:
        say(f"warning: {warning}")
    gain = "" if found.default is None else f" (default recipe: {found.default:.4f})"
    params = "\n".join(
        f"  {name:<16} {value:.5g}" if isinstance(value, float) else f"  {name:<16} {value}"
        for name, value in found.params.items()
    )
    text = (
        f"best validation loss {found.value:.4f}{gain} of {result['finished']} finished trials, {result['pruned']} pruned, "
        f"{result['diverged']} diverged, {found.seconds:.0f} s\n{params}\n"
        f"next: mutransfer verify {shlex.quote(str(folder.path))}"
    )
    emit(result, as_json, text)
    return 0
