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

__all__ = [
    "Owned",
    "decays",
    "owned",
    "shrink",
    "sizes_of_gradients",
    "sizes_of_pulls",
    "sizes_of_steps",
    "sizes_of_weights",
]

COARSE = 0.01  # of a step: where the parameter's last digit is greater, rounding takes part
ROUNDING = 1e-5  # of the median gradient: below, a gradient is none (a key's bias, a bias before a norm)


@dataclass(frozen=True)
class Owned:
    """A parameter's role, and the unit of its size: µP's own initial size there, relative to the base model's.

    The unit is None for constants and structured weights, and for the finite ones, whose size is not scaled. ``step`` is the
    unit of its first step, µP's own learning rate relative to the base model's; None where it is not needed: under optimizers
    that look at whole matrices, and where Adam's step is the update itself, as only the fan-out grows. ``pulled`` says that a
    step is the rate times the gradient (SGD), and not the rate itself (Adam); ``decoupled`` that weight decay is no part of the
    gradient.
    """

    role: str
    unit: float | None
    step: float | None = None
    pulled: bool = False
    decoupled: bool = False


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
        decoupled = not pulled and not optimizer.l2
        moves = optimizer.entrywise and (pulled or row.role in ("hidden", "bottleneck", "output", "finite"))
        found[row.name] = Owned(row.role, unit if random else None, step if moves else None, pulled, decoupled)
    return found


def sizes_of_weights(
    parameters: Tensors, known: Mapping[str, Owned], stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, root mean square ``[seeds]``) in the parameter's unit, of those that have one."""
    for name, owner in known.items():
        if owner.unit is not None and name in parameters:
            yield name, _per_seed(parameters[name].detach().square(), stacked).sqrt() / owner.unit


def sizes_of_pulls(
    parameters: Tensors, first: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer, stacked: bool
) -> Tensors:
    """Return name → what the optimizer multiplied with the rate in its first step, of the entry that moved most ``[seeds]``.

    For SGD it is the largest |gradient + weight decay · W|; for Adam and its like |g| / (|g| + epsilon) of the largest gradient,
    or 1 where there is no epsilon; 0 where there is no gradient. Left out are parameters whose step is not looked at.

    Args:
        parameters: with the gradients of the first step.
        first: the parameters before that step.
        known: what they are.
        optimizer: that took it, whose groups hold the settings.
        stacked: whether a first axis runs over seeds.
    """
    groups, found = _groups(optimizer), {}
    for name, start in first.items():
        parameter = parameters.get(name)
        if parameter is None or name not in known or known[name].step is None or parameter.grad is None:
            continue
        # Rows of an embedding that no token chose have no entry.
        gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        group = groups.get(id(parameter), {})
        eps = group.get("eps")
        if known[name].pulled:
            decay = float(group.get("weight_decay", 0.0) or group.get("lambd", 0.0))
            found[name] = _largest(gradient.add(start.to(gradient.device), alpha=decay) if decay else gradient, stacked)
        elif isinstance(eps, float) and eps > 0:
            # RMSprop's average begins at (1 - alpha) g², and is not corrected for it.
            largest = _largest(gradient, stacked) * math.sqrt(1 - float(group.get("alpha", 0.0)))
            found[name] = largest / (largest + eps)
        else:
            found[name] = (_largest(gradient, stacked) > 0).to(gradient.dtype)
    return found


def sizes_of_steps(
    parameters: Tensors,
    first: Tensors,
    pulls: Tensors,
    shrunk: Mapping[str, float],
    known: Mapping[str, Owned],
    stacked: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, learning rate that ΔW shows ``[seeds]``) in the unit of the parameter's step, of those that have one.

    It is the largest |ΔW| over the pull on that entry, as `sizes_of_pulls` returns it. The largest, as entries without a gradient
    do not move, and how many these are depends on seed and width. Where a step is hardly more than the last digit of the
    parameter's largest entry (bfloat16, tiny steps of a gain of 1), it shows no rate and is left out.

    Args:
        parameters: as they are now.
        first: as they were at the start.
        pulls: of the first step; empty after later ones.
        shrunk: name → what decoupled weight decay has left of the start (`shrink`), which is no part of ΔW here.
        known: what they are.
        stacked: whether a first axis runs over seeds.
    """
    followed = [pull.cpu() for name, pull in pulls.items() if known[name].pulled]
    typical = torch.stack(followed).median(0).values if followed else None
    for name, start in first.items():
        if name not in known or name not in parameters or (unit := known[name].step) is None:
            continue
        now = parameters[name].detach()
        if known[name].pulled and (
            typical is None or name not in pulls or not (pulls[name].cpu() > ROUNDING * typical).any()
        ):
            continue
        start = start.to(now.device)
        largest = _largest(now - shrunk.get(name, 1.0) * start, stacked)
        rounded = torch.finfo(now.dtype).eps * _largest(start, stacked) > COARSE * largest
        if (rounded & (pulls[name] > 0 if name in pulls else largest > 0)).any():
            continue
        if name in pulls:
            # Without a gradient there is no step, and no rate to be seen.
            pull = pulls[name]
            largest = torch.where(pull > 0, largest / pull, torch.zeros_like(pull))
        yield name, largest / unit


def shrink(
    shrunk: dict[str, float], parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer
) -> None:
    """Note what the decoupled weight decay of the step to come leaves of every parameter: 1 - lr · weight decay."""
    groups = _groups(optimizer)
    for name, owner in known.items():
        if name in parameters and owner.decoupled:
            group = groups.get(id(parameters[name]), {})
            taken = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0))
            shrunk[name] = shrunk.get(name, 1.0) * (1 - taken)


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
    if not values.numel():
        return values.new_zeros(len(values) if stacked else 1)
    return values.abs().reshape(len(values) if stacked else 1, -1).amax(1)
