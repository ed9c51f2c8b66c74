"""`mutransfer train`: the big run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, Device, Progress, UnusedSeed, device_of, emit


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("train")(train)


def train(
    target: Annotated[Path, typer.Argument(help="A target config of `mutransfer transfer`.")],
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints; beside the target by default.")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    seed: UnusedSeed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Train the target on one device; an interrupted run goes on from its last checkpoint."""
    from ..proxies.bigrun import run_target
    from ..transfer import TargetConfig

    config = TargetConfig.load(target)
    with Progress(f"training {config.model} at width {config.plan.scale.width}") as progress:
        result = run_target(
            config, out or target.parent / "train",
            device=device_of(device), checkpoint_every=checkpoint_every, progress=progress,
        )  # fmt: skip
    loss, pace = result["loss"], result["tokens_per_second"]
    text = (
        ("diverged" if loss is None else f"validation loss {loss:.4f}") + f" after {result['steps']} steps"
        f"{', nothing left to do' if pace is None else f', {pace:.0f} tokens/s'}\ncheckpoint: {result['checkpoint']}"
    )
    emit({"verdict": "fail" if loss is None else "pass", **result}, as_json, text)
    return 0 if loss is not None else 1
