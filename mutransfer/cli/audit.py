"""`mutransfer audit`: compare a running optimizer with the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, UnusedDevice, UnusedSeed, emit, records, table


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("audit")(audit)


def audit(
    target: Annotated[Path, typer.Argument(help="A target config from `mutransfer transfer`.")],
    dump: Annotated[Path, typer.Argument(help="A checkpoint or JSON file with the optimizer's state_dict.")],
    seed: UnusedSeed = 0,
    device: UnusedDevice = "auto",
    as_json: AsJson = False,
) -> int:
    """Compare a running optimizer with the plan.

    Check whether the optimizer uses the planned settings (exit 1 if not).
    """
    from ..planning import audit as auditing
    from ..planning.target import TargetConfig

    found = auditing.audit(TargetConfig.load(target).plan, dump)
    verdict = "pass" if found.empty else "fail"
    text = "verdict: pass, all settings are as planned" if found.empty else f"{table(found)}\n\nverdict: fail"
    emit({"verdict": verdict, "differences": records(found)}, as_json, text)
    return 0 if found.empty else 1
