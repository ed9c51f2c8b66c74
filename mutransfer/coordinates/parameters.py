"""What is measured of a parameter itself: its size, how far it moves, its gradient against epsilon, its weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..fold import FOLDS
from ..optimizers.registry import OPTIMIZERS
from ..plans import Plan
from ..tables import TABLES, table
from .watching import Tensors

__all__ = ["Owned", "decays", "owned", "sizes_of_gradients", "sizes_of_pulls", "sizes_of_steps", "sizes_of_weights"]

ROUNDING = 1e-5  # of the median gradient: below, a gradient is none (a key's bias, a bias before a norm)


@dataclass(frozen=True)
class Owned:
    """A parameter's role, and the unit of its size: µP's own initial size there, relative to the base model's.

    The unit is None for constants and structured weights, and for the finite ones, whose size is not scaled. ``step`` is the
    unit of its first step, µP's own learning rate relative to the base model's; None where it is not needed: under optimizers
    that look at whole matrices, and where Adam's step is the update itself, as only the fan-out grows. ``pulled`` says that a
    step is the rate times the gradient (SGD), and not the rate itself (Adam).
    """

    role: str
    unit: float | None
    step: float | None = None
    pulled: bool = False


def owned(planned: Plan) -> dict[str, Owned]:
    """Return every planned parameter's role and unit, folded multipliers counted in (TP-V 2203.03466, Table 3)."""
    rules, healthy, optimizer = table(planned.parametrization).rows, TABLES["mup"].rows, OPTIMIZERS[planned.optimizer]
    found = {}
    for row in planned.rows:
        m = row.m_in, row.m_out
        unit = healthy[row.role].init(*m) * row.gauge / rules[row.role].gauge(*m)
        random = row.role != "finite" and row.init_factor is not None and row.init.std > 0
        folded = (row.gauge / rules[row.role].gauge(*m)) ** float(FOLDS[optimizer.column][0])
        step = healthy[row.role].lr(optimizer.column)(*m) * folded
        pulled = optimizer.column == "sgd"
        moves = optimizer.entrywise and (pulled or row.role in ("hidden", "bottleneck", "finite"))
        found[row.name] = Owned(row.role, unit if random else None, step if moves else None, pulled)
    return found


def sizes_of_weights(
    parameters: Tensors, known: Mapping[str, Owned], stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, root mean square ``[seeds]``) in the parameter's unit, of those that have one."""
    for name, owner in known.items():
        if owner.unit is not None and name in parameters:
            yield name, _per_seed(parameters[name].detach().square(), stacked).sqrt() / owner.unit


def sizes_of_pulls(
    parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer, stacked: bool
) -> Tensors:
    """Return name → what the optimizer multiplies with the rate in its first step, of the entry that moves most ``[seeds]``.

    For SGD it is the largest |gradient + weight decay · W|, for Adam and its like |g| / (|g| + epsilon) of the largest gradient.
    Left out are parameters whose step is not looked at, or needs no more than the rate.
    """
    groups, found = _groups(optimizer), {}
    for name, parameter in parameters.items():
        if name not in known or known[name].step is None or parameter.grad is None:
            continue
        group = groups.get(id(parameter), {})
        eps = group.get("eps")
        if known[name].pulled:
            decay = float(group.get("weight_decay", 0.0) or group.get("lambd", 0.0))
            pull = parameter.grad.add(parameter.detach(), alpha=decay) if decay else parameter.grad
            found[name] = _largest(pull, stacked)
        elif isinstance(eps, float) and eps > 0:
            # RMSprop's average begins at (1 - alpha) g², and is not corrected for it.
            largest = _largest(parameter.grad, stacked) * math.sqrt(1 - float(group.get("alpha", 0.0)))
            found[name] = largest / (largest + eps)
    return found


def sizes_of_steps(
    parameters: Tensors, first: Tensors, pulls: Tensors, known: Mapping[str, Owned], stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, learning rate that ΔW shows ``[seeds]``) in the unit of the parameter's step, of those that have one.

    It is the largest |ΔW| over the pull on that entry, as `sizes_of_pulls` returns it. The largest, as entries without a gradient
    do not move, and how many these are depends on seed and width.
    """
    followed = [pull for name, pull in pulls.items() if known[name].pulled]
    typical = torch.stack(followed).median(0).values if followed else None
    for name, start in first.items():
        if name in known and name in parameters and (unit := known[name].step) is not None:
            if known[name].pulled and (
                typical is None or name not in pulls or not (pulls[name] > ROUNDING * typical).any()
            ):
                continue
            now = parameters[name].detach()
            largest = _largest(now - start.to(now.device), stacked)
            if name in pulls:
                # Without a gradient there is no step, and no rate to be seen.
                pull = pulls[name]
                largest = torch.where(pull > 0, largest / pull, torch.zeros_like(pull))
            yield name, largest / unit


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


def _largest(values: torch.Tensor, stacked: bool) -> torch.Tensor:
    largest = values.abs().flatten(1).amax(1) if stacked else values.abs().amax()
    largest = largest.full_tensor() if hasattr(largest, "full_tensor") else largest  # of all shards
    return largest if stacked else largest[None]
