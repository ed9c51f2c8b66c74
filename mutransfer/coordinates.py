"""The coordinate check: how the size of every module's output, and of its change, moves with width.

`record` measures, `verdict` judges. The measure is the same for every parametrization: the slopes of width-stable
feature learning (`tables.HEALTHY`), so the standard parametrization fails it, as it should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch.utils._pytree import tree_leaves

from .errors import RequestError
from .family import Family
from .frames import COORDINATES
from .observe import observe
from .optimizers import OPTIMIZERS
from .planning import plan
from .plans import Plan
from .recipe import Recipe
from .tables import table
from .verdicts import MARGIN as MARGIN
from .verdicts import Verdict as Verdict
from .verdicts import verdict as verdict

__all__ = ["MARGIN", "Verdict", "record", "verdict"]

CHECK_LR = {"adam": 2**-8, "sgd": 2**-3}


def record(
    family: Family,
    widths: Sequence[int],
    parametrization: str = "mup",
    optimizer: str = "adamw",
    *,
    lr: float | None = None,
    depth: int | None = None,
    steps: int = 4,
    seeds: Iterable[int] = range(5),
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """Train ``family`` a few steps at each width and record the size of every module's output.

    The family's example batch is used for every step: outputs before and after training must be compared on the same data.

    Args:
        family: what to check; its base anchors the plan.
        widths: at least two, in any order.
        parametrization: name of the table that sets init and learning rates.
        optimizer: name of a torch optimizer.
        lr: base learning rate; by default one at which all the built-in models learn.
        depth: layers; the base's by default.
        steps: optimizer steps, at least 1.
        seeds: of the initial weights, at least one.
        device: where to train.
        progress: called with (runs done, runs in all).

    Returns:
        A frame with the columns of `frames.COORDINATES`.

    Raises:
        RequestError: fewer than two different widths, or a model that cannot be planned.
    """
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise RequestError(f"a slope needs at least two widths, and {widths} is {len(widths)}: give 4 or more.")
    seeds = list(seeds)
    if steps < 1 or not seeds:
        raise RequestError(f"{steps} steps and {len(seeds)} seeds: give at least one of each.")
    column = OPTIMIZERS[optimizer].column if optimizer in OPTIMIZERS else "adam"
    recipe = Recipe(lr=lr or CHECK_LR[column], schedule="constant", warmup=0)
    scale = family.base.with_(depth=depth or family.base.depth)
    seen = observe(family)
    rows: list[dict[str, Any]] = []
    for i, width in enumerate(widths):
        planned = plan(family, scale.with_(width=width), parametrization, optimizer, recipe, observation=seen)
        for j, seed in enumerate(seeds):
            progress(i * len(seeds) + j, len(widths) * len(seeds))
            model = family.build(planned.scale).to(device)
            planned.initialize(model, seed)
            common = {"parametrization": parametrization, "optimizer": optimizer, "seed": seed}
            common |= {"width": width, "depth": scale.depth}
            rows += [row | common for row in _one_run(family, planned, model, steps, device)]
    progress(len(widths) * len(seeds), len(widths) * len(seeds))
    return COORDINATES.frame(rows)


def _one_run(family: Family, planned: Plan, model: torch.nn.Module, steps: int, device: str) -> list[dict[str, Any]]:
    batch = family.batch_on(device)
    optimizer = planned.make_optimizer(model)
    roles = module_roles(model, planned)
    rows_of = table(planned.parametrization).rows  # a multiplier that the table itself folds is part of the function
    gauges = {
        row.name.removesuffix(".weight"): row.gauge / rows_of[row.role].gauge(row.m_in, row.m_out)
        for row in planned.rows
    }
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, _: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if tensors:
            outputs[names[module]] = tensors[0].detach()

    handles = [module.register_forward_hook(keep) for name, module in model.named_modules() if name in roles]
    rows: list[dict[str, Any]] = []
    initial: dict[str, torch.Tensor] = {}
    for step in range(steps + 1):
        loss = family.loss(model, batch)
        if step == 0:
            initial = {name: output.clone() for name, output in outputs.items()}
        sizes = outputs if step == 0 else {name: output - initial[name] for name, output in outputs.items()}
        values = torch.stack([size.abs().mean().double() for size in sizes.values()]).tolist()
        # A feature that carries a folded multiplier (queries, a final norm before a tied readout) is compared as it is
        # without it; a logit is what it is.
        values = [
            value / gauges.get(name, 1.0) if roles[name] == "feature" else value
            for name, value in zip(sizes, values, strict=True)
        ]
        statistic = "activation" if step == 0 else "change"
        rows += [
            {"module": name, "role": roles[name], "statistic": statistic, "step": step, "value": value}
            for name, value in zip(sizes, values, strict=True)
        ]
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for handle in handles:
        handle.remove()
    return rows


def module_roles(model: torch.nn.Module, planned: Plan) -> dict[str, str]:
    """Return, for every module that owns parameters, whether its output is a "feature" or an "output" (a logit)."""
    roles: dict[str, str] = {}
    planned_roles = {row.name: row.role for row in planned.rows}
    for name, _ in model.named_parameters(remove_duplicate=False):
        module, _, _ = name.rpartition(".")
        # A second name for a tied matrix is the readout's.
        is_output = planned_roles.get(name, "output") == "output"
        # The whole model's output is a logit, also where the model owns a parameter of its own.
        roles[module] = "output" if is_output or not module else roles.get(module, "feature")
    return roles
