"""`mutransfer report`: one page about everything in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, UnusedDevice, UnusedSeed, emit


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    seed: UnusedSeed = 0,
    device: UnusedDevice = "auto",
    as_json: AsJson = False,
) -> int:
    """Write a self-contained report.html.

    Its figures and tables are also written as separate files.
    """
    from ..errors import RequestError
    from ..reports import write_report

    if not run.is_dir():
        raise RequestError(f"there is no folder {run}: create a run with `mutransfer tune`.")
    path = write_report(run)
    emit({"report": str(path)}, as_json, str(path))
    return 0
