"""`mutransfer transfer`: from the tuned proxy to the settings of the target."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import AsJson, UnusedDevice, emit, say

if TYPE_CHECKING:
    from ..planning.target import TargetConfig
    from ..run_dir import RunFolder
    from ..sweeps.jobs import RunContext


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


def target_of_run(
    folder: RunFolder,
    width: int,
    depth: int | None = None,
    batch_size: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    written_to: Path | None = None,
    context: RunContext | None = None,
) -> TargetConfig:
    """Return the `TargetConfig` of a run folder at another scale; sizes default to the proxy's.

    ``written_to`` is the folder that the config will be written to, by default the run folder. The family and data of
    ``context`` are used if they are the run's.
    """
    from ..errors import RequestError
    from ..io import read_json
    from ..planning.build import plan
    from ..planning.target import of_evidence, regularizers, target_config
    from ..recipe import Recipe
    from ..sweeps.experiment import Experiment
    from ..sweeps.jobs import RunContext

    experiment, recipe = Experiment.of_run(folder), Recipe.load(folder.best)
    context = RunContext(experiment) if context is None else context.for_(experiment)
    family, data = context.family, context.data
    scale = family.base.with_(width=width, depth=depth or experiment.proxy.depth)
    batch_size = batch_size or experiment.batch_size
    per_example = experiment.sequence_length if data is not None and data.kind == "tokens" else 1
    steps = (
        -(-tokens // (batch_size * per_example))
        if tokens
        else max(1, experiment.steps * experiment.batch_size // batch_size)
    )
    before = read_json(folder.environment, "the run's environment") if folder.environment.exists() else {}
    known = before.get("data_sha256")
    if known and data is not None and known != data.sha256:
        raise RequestError(
            f"{folder.path} holds results on data with SHA-256 {known[:12]}…, but the data is now {data.sha256[:12]}…: tune "
            "again on this data with another --out, or put the old data back."
        )
    provenance = {
        "run": str(folder.path),
        "data_sha256": data and data.sha256,
        "roles": dict(family.roles),
        "versions": before.get("versions"),
        "commands": before.get("commands"),
        "trainer": None if experiment.trainer is None else experiment.trainer.model_dump(mode="json"),
        "direction": experiment.direction,
        "folder": experiment.folder,
        "places": experiment.places(written_to or folder.path),
    }
    rules = experiment.parametrization, experiment.optimizer, recipe
    unproven = of_evidence(folder, recipe, experiment.subject(), [experiment.base_scale.width * 2**k for k in range(4)])
    counted = plan(family, experiment.proxy_scale, *rules).rows if recipe.law == "power-lines" else ()
    return target_config(
        plan(family, scale, *rules),
        proxy_parameters=sum(math.prod(row.shape) for row in counted) or None,
        model=experiment.model,
        options=experiment.options,
        data=experiment.data,
        sequence_length=per_example,
        proxy=experiment.proxy_scale,
        proxy_batch_size=experiment.batch_size,
        proxy_steps=experiment.steps,
        batch_size=batch_size,
        steps=steps,
        tuned=sorted(experiment.search),
        seed=seed,
        provenance=provenance,
        regularizers=regularizers(family),
        unproven=list(unproven),
    )
