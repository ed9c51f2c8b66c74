"""`mutransfer verify`: learning-rate basins across widths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import AsJson, Device, Progress, UnusedSeed, device_of, emit, numbers, table

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "parametrization": "", "width": "", "log2_lr": ".2f", "drift": "+.2f", "drift_low": "+.2f", "drift_high": "+.2f",
    "best_loss": ".4f", "transferred_loss": ".4f", "regret": ".4f", "regret_low": ".4f", "regret_high": ".4f",
}  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("verify")(verify)


def verify(
    run: Annotated[Path, typer.Argument(help="A run folder from `mutransfer tune`.")],
    widths: Annotated[
        str | None, typer.Option(help="Widths to compare; 1, 2 and 4 times the proxy's by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per run.")] = 3,
    control: Annotated[str | None, typer.Option(help="A second parametrization to compare with, such as sp.")] = None,
    control_trials: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Trials of the control's search at the widest width, over everything that `tune` searched; by default as many "
            "as `tune` had, 0 for the learning rate alone.",
        ),
    ] = None,
    step: Annotated[float, typer.Option(min=0.1, max=4, help="Octaves between learning rates.")] = 1.0,
    regret_limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest acceptable cost of the proxy's learning rate, in the loss's unit; by default 0.02 nats, or 2% of the "
            "size of another loss.",
        ),
    ] = None,
    seed: UnusedSeed = 0,
    executor: Annotated[
        str, typer.Option(help="auto, one, processes or fused, as in tune; auto and fused choose for each width.")
    ] = "auto",
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of runs at a time; by default one per core in processes, or what is fastest fused."
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Check whether the learning rate transfers.

    Measure whether the best learning rate stays the same across widths (exit 1 if not), and what the proxy's rate costs.
    """
    from ..recipe import Recipe
    from ..run_dir import RunFolder
    from ..sweeps.executors import executor_for
    from ..sweeps.experiment import Experiment
    from ..sweeps.jobs import RunContext
    from ..sweeps.verify import verify_run

    folder = RunFolder(run).existing()
    experiment, recipe = Experiment.of_run(folder), Recipe.load(folder.best)
    proxy = experiment.proxy.width
    sizes = numbers(widths, "--widths") if widths is not None else [proxy, 2 * proxy, 4 * proxy]
    where = device_of(device)
    context = RunContext(experiment)
    with executor_for(
        experiment, executor, at_once, where,
        checkpoints=folder.path / "checkpoints", folder=folder.path, context=context, per_scale=True,
    ) as run_executor:  # fmt: skip
        result, optima = verify_run(
            context, recipe, folder, sizes, run_executor,
            seeds=seeds, control=control, control_trials=control_trials, step=step, device=where,
            regret_limit=regret_limit, progress=Progress,
        )  # fmt: skip
    emit(result, as_json, text_of(result, optima))
    return 0 if result["verdict"] == "pass" else 1


def text_of(result: dict[str, Any], optima: pd.DataFrame) -> str:
    """Return the result as text."""
    price, widest = result["price"], int(optima["width"].max())
    unit = result["limits"]["unit"]
    lines = [
        table(optima[list(COLUMNS)], **COLUMNS),
        f"regret: fitted loss at the transferred learning rate minus the fitted minimum, {unit}, over {result['seeds']} seeds",
        "",
    ]
    for kind, worth in result["regret_compute"].items():
        if worth is not None:
            regret = result["regret"][kind][widest]
            lines.append(
                f"width {widest}: a regret of {regret['value']:.4f} {unit} ({kind}) is worth {worth['value']:.1%} "
                f"[{worth['low']:.1%}, {worth['high']:.1%}] of its compute, judging by how the loss falls from width to width"
            )
    lines += [
        f"width {widest}: {row['label']} (lr 2^{row['log2_lr']:.1f}): loss {row['loss']:.4f}"
        for row in result["comparison"]
    ]
    if result["control"] is not None:
        lines.append(f"compared at width {widest}: {result['control']['conclusion']}")
    lines += price_lines(price, widest)
    return "\n".join([*lines, f"verdict: {result['verdict']}", *result["reasons"]])


def price_lines(price: dict[str, Any], widest: int) -> list[str]:
    """Return lines about the compute spent, relative to one run at the ``widest`` width, and the operations not counted."""
    target = price["target_flops"]
    if not target:
        return []
    spent = {"tuning": price["tuning_flops"], "repeats": price["repeats_flops"], "verify": price["verify_flops"]}
    parts = [
        f"{name} took {flops:.2e} FLOPs ({flops / target:.1%})" for name, flops in spent.items() if flops is not None
    ]
    lines = [f"price, relative to one run at width {widest} ({target:.2e} FLOPs): {', '.join(parts)}"] if parts else []
    if price["uncounted"]:
        lines.append(f"not counted in the price, because no formula is known: {', '.join(price['uncounted'])}")
    return lines
