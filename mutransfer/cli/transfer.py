"""`mutransfer transfer`: from the tuned proxy to the settings of the target."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, UnusedDevice, emit, say


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("transfer")(transfer)


def transfer(
    run: Annotated[Path, typer.Argument(help="A run folder from `mutransfer tune`.")],
    width: Annotated[int, typer.Option(min=1, help="Width of the target.")],
    depth: Annotated[int | None, typer.Option(min=1, help="Depth of the target; the proxy's by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step; the proxy's by default.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Total number of training tokens (or images); the proxy's by default.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Also export for a framework: pytorch.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output file; target.json in the run folder by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the target run.")] = 0,
    device: UnusedDevice = "auto",
    as_json: AsJson = False,
) -> int:
    """Write the target config.

    It holds every parameter's settings, the schedule, the provenance, and warnings about what may not transfer.
    """
    from ..export import export
    from ..io import write_text
    from ..run_dir import RunFolder
    from ..sweeps.results import target_of_run

    home = out.parent if out is not None and to is None else run
    target = target_of_run(RunFolder(run).existing(), width, depth, batch_size, tokens, seed, written_to=home)
    exported = export(target, to) if to is not None else None
    written = []
    if exported is not None:
        name, content = exported
        written.append(str(write_text(out or run / name, content)))
    path = target.save(out if out is not None and exported is None else run / "target.json")
    written.append(str(path))
    plan = target.plan
    for kind, sentences in {"note": plan.notes, "warning": target.warnings}.items():
        for sentence in sentences:
            say(f"{kind}: {sentence}")
    text = (
        f"{target.model} at width {plan.scale.width}, depth {plan.scale.depth}: {len(plan.rows)} parameters in "
        f"{len(plan.groups())} groups, {target.steps} steps of {target.batch_size}\nwritten: {', '.join(written)}\n"
        f"next: mutransfer train {shlex.quote(str(path))}"
    )
    emit(target.as_dict(), as_json, text)
    return 0
