"""`mutransfer plan`: the settings per parameter, at any size."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import AsJson, UnusedDevice, UnusedSeed, emit, records, table
from .models import BASE_WIDTH_HELP, MODEL, DepthField, MethodOption, Optimizer, Parametrization, Roles, WidthField

BASE_WIDTH = 64  # default for built-in models


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("plan")(plan)


def plan(
    model: Annotated[str, typer.Argument(help=MODEL)],
    width: Annotated[int, typer.Option(min=1, help="Width to plan for.")],
    depth: Annotated[int | None, typer.Option(min=1, help="Depth to plan for; the base's by default.")] = None,
    base_width: Annotated[int | None, typer.Option(min=1, help=BASE_WIDTH_HELP)] = None,
    base_depth: Annotated[int | None, typer.Option(min=1, help="Depth at which nothing is scaled.")] = None,
    parametrization: Parametrization = "mup",
    optimizer: Optimizer = "adamw",
    recipe: Annotated[str | None, typer.Option(help="A recipe (best.json) instead of the defaults.")] = None,
    data: Annotated[str | None, typer.Option(help="Data that determines the number of inputs and classes.")] = None,
    width_field: WidthField = None,
    depth_field: DepthField = None,
    role: Roles = None,
    method: MethodOption = None,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "auto",
    as_json: AsJson = False,
) -> int:
    """Print the planned settings of every parameter.

    No memory is allocated for the model, so it can be very large.
    """
    from ..planning import build
    from ..proxies.hf_config import describe_changes
    from ..proxies.methods import pruned_densities
    from .models import family_for, fields_asked_for, fields_between, method_for

    options = fields_asked_for(model, width_field, depth_field)
    family, _ = family_for(model, data, base_width, base_depth, default_width=BASE_WIDTH, options=options, roles=role)
    scale = family.base.with_(width=width, depth=depth or base_depth or family.base.depth)
    grown = fields_between(family, scale)
    given = build.recipe_for(family, recipe, parametrization)
    if method is not None or recipe is None:
        given = given.with_(method=method_for(model, method))
    planned = build.plan(family, scale, parametrization, optimizer, given, pruned=pruned_densities(given, family))
    frame = planned.frame()
    compact = {column: ".4g" for column in frame.columns if frame[column].dtype.kind == "f"}
    text = table(frame, **compact)
    deeper = "" if scale.depth == family.base.depth else f", depth {family.base.depth} → {scale.depth}"
    heading = f"{family.name} {parametrization} {optimizer}: width {family.base.width} → {width}{deeper}, {len(frame)} parameters"
    text = "\n".join(
        [heading, *([describe_changes(grown)] if grown else []), "", text, *(f"note: {note}" for note in planned.notes)]
    )
    parameters = [
        row
        | {"shape": list(plan_row.shape)}
        | ({"columns": [vars(each) for each in plan_row.columns]} if plan_row.columns else {})
        | {key: value for key in ("density", "tangent") if (value := getattr(plan_row, key)) != 1}
        for row, plan_row in zip(records(frame), planned.rows, strict=True)
    ]
    result = {"parameters": parameters, "groups": planned.groups(), "notes": list(planned.notes)}
    emit(result | ({"fields": grown} if grown else {}), as_json, text)
    return 0
