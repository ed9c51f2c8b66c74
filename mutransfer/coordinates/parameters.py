"""What is measured of a parameter itself: its size, how far it moves, its gradient against epsilon, its weight decay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..optimizers.registry import OPTIMIZERS
from ..plans import Plan
from ..tables import TABLES, table
from .watching import Tensors

__all__ = ["Owned", "decays", "owned", "sizes_of_gradients", "sizes_of_steps", "sizes_of_weights"]


@dataclass(frozen=True)
class Owned:
    """A parameter's role, and the unit of its size: µP's own initial size there, relative to the base model's.

    The unit is None for constants and structured weights, and for the finite ones, whose size is not scaled. ``step`` is the
    unit of its first step, µP's own learning rate relative to the base model's; None where a step's size says nothing of
    the rate: under optimizers that follow the gradient's size or look at whole matrices, and where the fan-in does not grow.
    """

    role: str
    unit: float | None
    step: float | None = None


def owned(planned: Plan) -> dict[str, Owned]:
    """Return every planned parameter's role and unit, folded multipliers counted in (TP-V 2203.03466, Table 3)."""
    rules, healthy, optimizer = table(planned.parametrization).rows, TABLES["mup"].rows, OPTIMIZERS[planned.optimizer]
    found = {}
    for row in planned.rows:
        m = row.m_in, row.m_out
        unit = healthy[row.role].init(*m) * row.gauge / rules[row.role].gauge(*m)
        random = row.role != "finite" and row.init_factor is not None and row.init.std > 0
        step = healthy[row.role].adam(*m) * row.gauge / rules[row.role].gauge(*m)
        moves = optimizer.column == "adam" and optimizer.entrywise and row.role in ("hidden", "bottleneck")
        found[row.name] = Owned(row.role, unit if random else None, step if moves else None)
    return found


def sizes_of_weights(
    parameters: Tensors, known: Mapping[str, Owned], stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, root mean square ``[seeds]``) in the parameter's unit, of those that have one."""
    for name, owner in known.items():
        if owner.unit is not None and name in parameters:
            yield name, _per_seed(parameters[name].detach().square(), stacked).sqrt() / owner.unit


def sizes_of_steps(
    parameters: Tensors, first: Tensors, known: Mapping[str, Owned], stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, largest |ΔW| ``[seeds]``) in the unit of the parameter's step, of those that have one.

    The largest, as entries without a gradient do not move, and how many these are depends on seed and width.
    """
    for name, start in first.items():
        if name in known and name in parameters and (unit := known[name].step) is not None:
            now = parameters[name].detach()
            moved = (now - start.to(now.device)).abs()
            largest = moved.flatten(1).amax(1) if stacked else moved.amax()
            largest = largest.full_tensor() if hasattr(largest, "full_tensor") else largest  # of all shards
            yield name, (largest if stacked else largest[None]) / unit


def sizes_of_gradients(
    parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer, stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, mean |gradient| / epsilon ``[seeds]``) of the parameters whose group has an epsilon."""
    groups = _groups(optimizer)
    for name, parameter in parameters.items():
        eps = groups.get(id(parameter), {}).get("eps")
        if name in known and parameter.grad is not None and isinstance(eps, float) and eps > 0:
            yield name, _per_seed(parameter.grad.abs(), stacked) / eps


def decays(
    parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, float]]:
    """Yield (name, lr · weight decay) of the parameters that decay, as their group has it in force."""
    groups = _groups(optimizer)
    for name, parameter in parameters.items():
        group = groups.get(id(parameter), {})
        taken = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0) or group.get("lambd", 0.0))
        if name in known and taken > 0:
            yield name, taken


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def _per_seed(values: torch.Tensor, stacked: bool) -> torch.Tensor:
    if stacked:
        return values.flatten(1).mean(1) if values.dim() > 1 else values
    mean = values.mean()
    return (mean.full_tensor() if hasattr(mean, "full_tensor") else mean)[None]  # of all shards
