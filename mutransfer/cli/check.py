"""`mutransfer check`: the coordinate check, with a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from .console import AsJson, Device, Progress, device_of, emit, numbers, records, say, table
from .models import DepthField, WidthField

if TYPE_CHECKING:
    import pandas as pd

    from ..coordinates import Verdict
    from ..family import Family

PATIENCE = 4  # an undecided check adds seeds up to this many times the first ones


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("check")(check)


def check(
    model: Annotated[
        str, typer.Argument(help="mlp, transformer, resnet, file.py:name, package.module:name or hf:config.json.")
    ],
    widths: Annotated[str, typer.Option(help="Widths to compare.")] = "64,128,256,512",
    parametrization: Annotated[str, typer.Option(help="mup or sp.")] = "mup",
    optimizer: Annotated[str, typer.Option(help="adamw, adam or sgd.")] = "adamw",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 4,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds to begin with; an open verdict adds up to 4 times as many.")
    ] = 5,
    lr: Annotated[float | None, typer.Option(help="Base learning rate.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers.")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Depths to compare; no parametrization of this version has a rule.")
    ] = None,
    base_width: Annotated[
        int | None, typer.Option(min=1, help="Width at which nothing is scaled; the smallest.")
    ] = None,
    control: Annotated[str | None, typer.Option(help="A second parametrization to show beside it, such as sp.")] = None,
    data: Annotated[str | None, typer.Option(help="digits, bytes, markov, text:PATH or bin:PATH.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for coordinates.csv, the pictures and report.html.")] = None,
    width_field: WidthField = None,
    depth_field: DepthField = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Say whether activations and their changes keep their size as the width grows (exit 1 if not)."""
    from ..proxies.hf_fields import told
    from ..recipe import Recipe
    from ..tables import table as parametrization_table
    from .models import family_for, fields_asked_for, fields_between

    if depths is not None:
        raise RequestError(
            f"--depths {depths}: neither mup nor sp has a rule for depth, so there is nothing to check; compare --widths instead."
        )
    sizes = numbers(widths, "--widths")
    options = fields_asked_for(model, width_field, depth_field)
    family, source = family_for(model, data, base_width, depth, default_width=min(sizes, default=None), options=options)
    where = device_of(device)
    if sizes and (grown := fields_between(family, family.base.with_(width=max(sizes)))):
        say(f"{family.name} {told(grown)}")
    if lr is not None:
        Recipe.read({"lr": lr}, "--lr")
    if control:
        parametrization_table(control)
    if out is not None:
        from ..runs import RunFolder

        folder = RunFolder(out).make()
        folder.note_environment(device=where, **({"data_sha256": source.sha256, "data": source.name} if source else {}))
    judged, frame = judge(family, sizes, parametrization, optimizer, where, steps, seeds, lr, seed)
    second = None
    if control:
        second, control_frame = judge(family, sizes, control, optimizer, where, steps, seeds, lr, seed, patience=1)
        import pandas as pd

        frame = pd.concat([frame, control_frame], ignore_index=True)
    result = summary(judged, parametrization, second, control)
    if out is not None:
        from ..files import write_json
        from ..frames import COORDINATES
        from ..reports import write_report
        from ..runs import RunFolder

        COORDINATES.write(frame, folder.coordinates)
        write_json(folder.check, result | {"report": None, "modules": None})
        result["report"] = str(write_report(folder.path))
    emit(result, as_json, _text(judged, parametrization, second, control))
    return 0 if judged.status == "pass" else 1


def judge(
    family: Family, widths: list[int], parametrization: str, optimizer: str, device: str, steps: int, seeds: int,
    lr: float | None, first: int = 0, patience: int = PATIENCE,
) -> tuple[Verdict, pd.DataFrame]:  # fmt: skip
    """Record and judge; while the evidence does not tell, add as many seeds again."""
    import pandas as pd

    from ..coordinates import record, verdict

    frames: list[pd.DataFrame] = []
    for repeat in range(patience):
        chosen = range(first + repeat * seeds, first + (repeat + 1) * seeds)
        with Progress(f"coordinate check of {family.name} under {parametrization}") as progress:
            frames.append(
                record(
                    family,
                    widths,
                    parametrization,
                    optimizer,
                    lr=lr,
                    steps=steps,
                    seeds=chosen,
                    device=device,
                    progress=progress,
                )
            )
        frame = pd.concat(frames, ignore_index=True)
        judged = verdict(frame)
        if judged.status != "undecided":
            break
        if repeat + 1 < patience:
            say(f"not decided with {(repeat + 1) * seeds} seeds: adding {seeds}.")
    return judged, frame


def summary(judged: Verdict, name: str, second: Verdict | None, control: str | None) -> dict[str, Any]:
    """Return the contract's JSON keys."""
    return {
        "verdict": judged.status,
        "parametrization": name,
        "modules": records(judged.slopes),
        "cause": judged.cause,
        "control": None
        if second is None
        else {"parametrization": control, "verdict": second.status, "cause": second.cause},
        "report": None,
    }


def _text(judged: Verdict, name: str, second: Verdict | None, control: str | None) -> str:
    shown = judged.slopes.drop(columns="parametrization")
    lines = [table(shown, slope="+.3f", low="+.3f", high="+.3f"), ""]
    lines.append(f"{name}: {judged.status}" + (f": {judged.cause}" if judged.cause else ""))
    if second is not None:
        lines.append(f"control {control}: {second.status}" + (f": {second.cause}" if second.cause else ""))
    return "\n".join(lines)
