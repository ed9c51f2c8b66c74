"""`mutransfer init`: a commented experiment file to start from."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, UnusedDevice, UnusedSeed, emit


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("init")(init)


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write experiment.yaml.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "auto",
    as_json: AsJson = False,
) -> int:
    """Write a commented experiment file.

    DIR/experiment.yaml is ready to tune.
    """
    from ..errors import RequestError
    from ..io import write_text

    path = folder / "experiment.yaml"
    if path.exists() and not force:
        raise RequestError(f"{path} already exists: edit it, choose another folder, or overwrite it with --force.")
    write_text(path, resources.files("mutransfer.cli").joinpath("experiment.yaml").read_text(encoding="utf-8"))
    emit({"path": str(path)}, as_json, f"{path}\nnext: mutransfer tune {shlex.quote(str(path))}")
    return 0
