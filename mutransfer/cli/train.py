"""`mutransfer train`: train the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, Device, Progress, UnusedSeed, device_of, emit, ended_as_by_ctrl_c


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("train")(train)


def train(
    target: Annotated[Path, typer.Argument(help="A target config from `mutransfer transfer`.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints; by default the folder train next to the target config.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    seed: UnusedSeed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Train the target.

    It is trained on one device, or by the user trainer. An interrupted run resumes from its last checkpoint.
    """
    from ..planning.target import TargetConfig
    from ..proxies.target_run import run_target
    from ..sweeps.commands import train_target, trainer_of

    config = TargetConfig.load(target)
    folder, trainer = out or target.parent / "train", trainer_of(config)
    with Progress(f"training {config.model} at width {config.plan.scale.width}") as progress:
        if trainer is None:
            result = run_target(
                config, folder, device=device_of(device), checkpoint_every=checkpoint_every, progress=progress
            )
        else:
            with ended_as_by_ctrl_c():
                result = train_target(config, folder, progress=progress)
    loss, pace = result["loss"], result["tokens_per_second"]
    text = ("diverged" if loss is None else f"validation loss {loss:.4f}") + f" after {result['steps']} steps"
    if trainer is None:
        text += f"{', nothing left to do' if pace is None else f', {pace:.0f} tokens/s'}\ncheckpoint: {result['checkpoint']}"
    else:
        text += f", trained by {trainer}" + ("" if trainer.command is None else f"\nfiles: {folder}")
    emit({"verdict": "fail" if loss is None else "pass", **result}, as_json, text)
    return 0 if loss is not None else 1
