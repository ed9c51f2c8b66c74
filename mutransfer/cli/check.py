"""`mutransfer check`: the coordinate check, with a verdict."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError, nearest
from .console import AsJson, Device, Progress, device_of, emit, numbers, records, say, table
from .models import BASE_WIDTH_HELP, MODEL, DepthField, MethodOption, Optimizer, Roles, WidthField

if TYPE_CHECKING:
    import pandas as pd

    from ..coord_check import Verdict
    from ..coord_check.cache import CheckCache
    from ..family import Family
    from ..methods import Method
    from ..run_dir import RunFolder

WIDTHS = "64,128,256,512"
BATCH, LENGTH = 4, 16  # few examples are enough, because the mean is also taken over features (docs/log.md)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("check")(check)


def check(
    model: Annotated[
        str,
        typer.Argument(help=f"{MODEL} Or the experiment.yaml of a run."),
    ],
    widths: Annotated[
        str, typer.Option(help="Widths to compare; with --depths a single width, by default the base's.")
    ] = WIDTHS,
    parametrization: Annotated[
        str,
        typer.Option(
            help="mup, sp, completep (with --depths), depth-mup, umup, spectral, ntk, or own: the model as it is built, with "
            "mup's optimizer if mup has annotated it."
        ),
    ] = "mup",
    optimizer: Optimizer = "adamw",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 4,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds to start with; while the verdict is undecided, more are added.")
    ] = 5,
    max_seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Most seeds in total while the verdict is undecided; by default 4 times --seeds."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Number of layers; with --depths, that of the base.")] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="Depths to compare instead of widths, such as 2,4,8,16,32; completep has a rule for depth."),
    ] = None,
    base_width: Annotated[
        int | None, typer.Option(min=1, help=f"{BASE_WIDTH_HELP} Here the default is the smallest width.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="A second parametrization to check for comparison, such as sp.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="digits, bytes, markov, text:PATH or bin:PATH.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for coordinates.csv, the figures and report.html; an interrupted check resumes from it."
        ),
    ] = None,
    width_field: WidthField = None,
    depth_field: DepthField = None,
    role: Roles = None,
    method: MethodOption = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Run the coordinate check.

    Check whether activations and their changes keep their size as the width, or the depth, grows (exit 1 if not).
    """
    from ..coord_check import OWN
    from ..parametrizations.tables import TABLES
    from ..proxies.hf_config import describe_changes
    from ..recipe import Recipe
    from .models import family_for, fields_asked_for, fields_between, method_for, subject_of

    sizes, layers = _sizes(widths, depths)
    options = fields_asked_for(model, width_field, depth_field)
    smallest = min(sizes, default=int(WIDTHS.split(",")[0]))
    family, source = family_for(
        model, data, base_width, depth,
        default_width=smallest, batch_size=BATCH, sequence_length=LENGTH, options=options, roles=role,
    )  # fmt: skip
    if layers and depth is None and family.base.depth > min(layers):
        family = family.with_base(
            family.base.with_(depth=min(layers))
        )  # every layer needs a corresponding layer in the base
    where = device_of(device)
    target = family.base.with_(
        width=max(sizes, default=family.base.width), depth=max(layers, default=family.base.depth)
    )
    if grown := fields_between(family, target):
        say(f"{family.name} {describe_changes(grown)}")
    if lr is not None:
        Recipe.read({"lr": lr}, "--lr")
    trained_by = method_for(model, method)
    if trained_by.name == "forward-gradient":
        raise RequestError(
            "the check trains by backpropagation, which says nothing about the noise of forward gradients: check with --method "
            "backprop, and verify the learning rate."
        )
    if trained_by.name != "backprop" and OWN in (parametrization, control):
        raise RequestError(
            f"the method {trained_by.name} needs a plan, but {OWN} checks the model as it is built: name a parametrization, or "
            "--method backprop."
        )
    for name in (parametrization, control):
        if name and name not in (known := [*TABLES, OWN]):
            raise RequestError(f"unknown parametrization {name!r}: {nearest(name, known)}")
    if out is not None:
        from ..run_dir import RunFolder

        folder = RunFolder(out).make()
        folder.note_environment(device=where, **({"data_sha256": source.sha256, "data": source.name} if source else {}))
        arguments: dict[str, Any] = {
            "--widths": widths,
            "--depths": depths,
            "--parametrization": parametrization,
            "--optimizer": optimizer,
            "--method": method,
        }
        arguments |= {
            "--steps": steps,
            "--seeds": seeds,
            "--max-seeds": max_seeds,
            "--lr": lr,
            "--control": control,
            "--seed": seed,
        }
        begin(folder, subject_of(model, parametrization, optimizer, options, trained_by), arguments)
    cache = _cache(out, model)
    judged_under = partial(
        judge, family, sizes, optimizer=optimizer, device=where, steps=steps, seeds=seeds, lr=lr, first=seed, depths=layers,
        cache=cache, method=trained_by,
    )  # fmt: skip
    judged, frame = judged_under(parametrization, most=max_seeds)
    second = None
    if control:
        second, control_frame = judged_under(control, patience=1)
        import pandas as pd

        frame = pd.concat([frame, control_frame], ignore_index=True)
    result = summary(judged, parametrization, second, control)
    if out is not None:
        from ..io import write_json
        from ..reports import write_report
        from ..run_dir import RunFolder
        from ..schemas import COORDINATES

        COORDINATES.write(frame, folder.coordinates)
        write_json(folder.check, result | {"report": None, "modules": None})
        folder.note_progress("check", **folder.progress("check") | {"ended": True})
        result["report"] = str(write_report(folder.path))
    emit(result, as_json, _text(judged, parametrization, second, control))
    return 0 if judged.status == "pass" else 1


def _cache(out: Path | None, model: str) -> CheckCache | None:
    """Return the cache of finished work in the folder ``out``; its key includes the content of a config that MODEL names."""
    from ..coord_check.cache import CheckCache

    if out is None:
        return None
    file = Path(model.removeprefix("hf:"))
    content = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return CheckCache(out / "check", f"{model} {content}")


def begin(folder: RunFolder, subject: dict[str, Any], asked: dict[str, Any]) -> None:
    """Record in the folder that a check starts, and remove the verdict of an earlier one."""
    arguments = {flag: str(value) for flag, value in asked.items() if value is not None}
    folder.note_progress("check", planned=None, ended=False, arguments=arguments, question=subject)
    folder.check.unlink(missing_ok=True)


def _sizes(widths: str, depths: str | None) -> tuple[list[int], list[int]]:
    """Return the widths and the depths to record, of which one varies.

    Raises:
        RequestError: an entry is not a positive integer, there are fewer than two depths, or both vary.
    """
    if depths is None:
        return numbers(widths, "--widths"), []
    sizes, layers = [] if widths == WIDTHS else numbers(widths, "--widths"), numbers(depths, "--depths")
    if len(set(sizes)) > 1:
        raise RequestError(
            f"--widths {widths} and --depths {depths} both vary, but a slope is along one of them: give one width with --depths."
        )
    if len(set(layers)) < 2:
        raise RequestError(f"--depths {depths}: a slope needs at least two depths, such as 2,4,8,16,32.")
    return sizes, layers


def judge(
    family: Family, widths: list[int], parametrization: str, optimizer: str, device: str, steps: int, seeds: int,
    lr: float | None, first: int = 0, patience: int | None = None, depths: list[int] | None = None,
    most: int | None = None, cache: CheckCache | None = None, method: Method | None = None,
) -> tuple[Verdict, pd.DataFrame]:  # fmt: skip
    """Run the check with a progress bar, and print warnings about what cannot be measured to stderr."""
    import warnings

    from ..coord_check import PATIENCE, judge_coordinates
    from ..proxies.methods import planner_for

    with warnings.catch_warnings(record=True) as caught, Progress(_title(family, parametrization)) as progress:
        warnings.simplefilter("always", UserWarning)
        check = judge_coordinates(
            family, widths, parametrization, optimizer, seeds=seeds, first=first, patience=patience or PATIENCE, most=most,
            cache=cache, more=lambda done, adding, judged: say(f"not decided with {done} seeds, adding {adding}: {judged.cause}"),
            lr=lr, depths=depths or (), steps=steps, device=device, progress=progress,
            planner=None if method is None or method.name == "backprop" else planner_for(method),
        )  # fmt: skip
    for text in dict.fromkeys(str(each.message) for each in caught):
        say(text)
    return check.verdict, check.coordinates


def _title(family: Family, parametrization: str) -> str:
    return f"coordinate check of {family.name} under {parametrization}"


def summary(judged: Verdict, name: str, second: Verdict | None, control: str | None) -> dict[str, Any]:
    """Return the result under the keys of the command's JSON output."""
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
