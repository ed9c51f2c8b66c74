"""Optimizer updates of K stacked models, each with its own settings.

Updates repeat torch's arithmetic operation by operation, so a vectorized step equals a separate one. Written in place on a CPU, a
large group is updated piece by piece, so that a piece stays in the cache from the first operation to the last.

Shapes: groups of n parameters, their gradients and states are [K, n, ...]; numbers of the optimizer are computed in float64,
[K, P] for the P parameters of all groups with the same kind of update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mutransfer._torch_internals import NEWTON_SCHULZ, muon_lr
from mutransfer.optimizers.muon import iteration_dtype, orthogonalized
from mutransfer.planning.multipliers import ColumnBlock
from mutransfer.planning.plan import ParameterPlan, Plan

__all__ = [
    "FUSED", "Kind", "OptimSettings", "State", "blank_state", "is_in_pieces", "kind_of", "numbers_at", "settings_of",
    "stepped", "updated",
]  # fmt: skip

FUSED = ("adamw", "adam", "sgd", "muon", "muon-match-rms-adamw")
OptimSettings = dict[str, Tensor]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kind:
    """Optimizer update of a parameter.

    Attributes:
        name: "adam", "sgd" or "muon".
        iteration: dtype of Muon's iteration.
        columns: column blocks with separate gauges, which count in clipping.
    """

    name: str
    iteration: torch.dtype = torch.bfloat16
    columns: tuple[ColumnBlock, ...] = ()


def kind_of(plan: Plan, row: ParameterPlan, device: str) -> Kind:
    """Return the update of one parameter on ``device``."""
    settings = plan.settings_of(row)
    if settings.get("muon"):
        return Kind("muon", iteration_dtype(device))
    return Kind("adam" if "betas" in settings else "sgd", columns=row.columns)


def settings_of(plan: Plan, row: ParameterPlan) -> dict[str, float]:
    """Return the optimizer settings of one parameter as numbers, including its gauge, which counts in clipping."""
    settings = plan.settings_of(row)
    betas = settings.get("betas", (0.0, 0.0))
    return {
        "lr": settings["lr"],
        "adjusted": muon_lr(1.0, settings["adjust_lr_fn"], torch.Size(row.shape)) if settings.get("muon") else 1.0,
        "weight_decay": settings["weight_decay"],
        "eps": settings.get("eps", 0.0),
        "beta1": betas[0],
        "beta2": betas[1],
        "momentum": settings.get("momentum", 0.0),
        "gauge": row.gauge,
    }


def numbers_at(kind: str, settings: OptimSettings, multiplier: Tensor, step: Tensor) -> Tensor:
    """Return all numbers that the updates of one kind need at some steps, in the order in which the update unpacks them.

    They are computed in float64, as torch's optimizers compute them in Python, once for all parameters.

    Args:
        kind: name of the kind.
        settings: settings of its parameters, each [K, P].
        multiplier: the factor on every learning rate, [steps, K].
        step: number of the step, from 1, [steps, K].

    Returns:
        [steps, N, K, P] in float64.
    """
    lr, t = settings["lr"] * multiplier.unsqueeze(-1), step.unsqueeze(-1)
    keep = 1 - lr * settings["weight_decay"]
    rows: tuple[Tensor, ...]
    match kind:
        case "adam":
            beta1, beta2 = settings["beta1"], settings["beta2"]
            size, root = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
            rows = (keep, size, root, 1 - beta1, 1 - beta2, settings["eps"])
        case "muon":
            momentum = settings["momentum"]
            rows = (keep, lr * settings["adjusted"], momentum, 1 - momentum)
        case _:
            rows = (lr, settings["weight_decay"], settings["momentum"])
    return torch.stack([each.expand_as(lr) for each in rows], dim=1)


def blank_state(kind: Kind, parameter: Tensor) -> State:
    """Return the optimizer's state before the first step."""
    return tuple(torch.zeros_like(parameter) for _ in range(2 if kind.name == "adam" else 1))


def stepped(
    kind: Kind, p: Tensor, g: Tensor, state: State, numbers: Tensor, in_place: bool = False
) -> tuple[Tensor, State]:
    """Return a group's parameters ``[K, n, ...]`` and their optimizer state after one step.

    Args:
        kind: their update.
        p: parameters before the step.
        g: their gradients.
        state: optimizer state before the step.
        numbers: [N, K, n], from `numbers_at`.
        in_place: write the results to ``p`` and ``state``.
    """
    into = (p, *state) if in_place else (None, None, None)
    each = numbers.to(p.dtype).view(*numbers.shape, *[1] * (p.dim() - 2)).unbind()
    match kind.name:
        case "adam":
            return _adam(p, g, state, into, *each)
        case "muon":
            return _muon(p, g, state, into, *each, dtype=kind.iteration)
        case _:
            return _sgd(p, g, state, into, *each)


Into = tuple[Tensor | None, ...]


def _adam(
    p: Tensor, g: Tensor, state: State, into: Into, keep: Tensor, size: Tensor, root: Tensor, rest1: Tensor,
    rest2: Tensor, eps: Tensor,
) -> tuple[Tensor, State]:  # fmt: skip
    """AdamW; `Adam` is the same here, since its rule has no weight decay (`torch.optim.adam._single_tensor_adam`)."""
    first = torch.lerp(state[0], g, rest1, out=into[1])
    second = torch.lerp(state[1], g * g, rest2, out=into[2])
    root_mean = torch.addcdiv(eps, second.sqrt(), root)  # bias-corrected, plus eps
    return torch.addcdiv(p * keep, size * first, root_mean, value=-1, out=into[0]), (first, second)


def _sgd(
    p: Tensor, g: Tensor, state: State, into: Into, lr: Tensor, weight_decay: Tensor, momentum: Tensor
) -> tuple[Tensor, State]:
    """SGD with momentum; a zero buffer gives the same first step as torch (`torch.optim.sgd._single_tensor_sgd`)."""
    g = g + weight_decay * p
    buffer = torch.add(state[0] * momentum, g, out=into[1])
    return torch.sub(p, lr * buffer, out=into[0]), (buffer,)


def _muon(
    p: Tensor, g: Tensor, state: State, into: Into, keep: Tensor, size: Tensor, momentum: Tensor, rest: Tensor, *,
    dtype: torch.dtype,
) -> tuple[Tensor, State]:  # fmt: skip
    """Muon with Nesterov momentum (`torch.optim._muon._single_tensor_muon`)."""
    buffer = torch.lerp(state[0], g, rest, out=into[1])
    aim = torch.lerp(g, buffer, momentum).flatten(0, 1)
    direction = orthogonalized(aim, dtype, *NEWTON_SCHULZ).view_as(p)
    return torch.sub(p * keep, size * direction.to(p.dtype), out=into[0]), (buffer,)


PIECE = 2**18  # numbers of a piece: with its gradients, states and temporary tensors, it fits into most shared caches


def is_in_pieces(kind: Kind, group: Tensor, in_place: bool) -> bool:
    """Return whether `updated` writes to a group piece by piece, and takes the gradients of its parameters one by one."""
    large = group.numel() > PIECE and group.dim() > 3
    return in_place and large and group.device.type == "cpu" and kind.name != "muon"


def updated(
    kind: Kind, p: Tensor, gradients: Sequence[Tensor], state: State, numbers: Tensor, scale: Tensor | None, in_place: bool
) -> tuple[Tensor, State]:  # fmt: skip
    """Return a group's parameters and optimizer state after one step.

    Args:
        kind: their update.
        p: parameters, ``[K, n, ...]``.
        gradients: their gradient, ``[K, n, ...]``; where `is_in_pieces`, the n gradients ``[K, 1, ...]``.
        state: optimizer state.
        numbers: [N, K, n], from `numbers_at`.
        scale: factor on the gradients of each model, [K]; None for none.
        in_place: write the results to ``p`` and ``state``.
    """
    if is_in_pieces(kind, p, in_place):
        _in_pieces(kind, p, gradients, state, numbers, scale)
        return p, state
    # Use the memory layout of the weights: a layer's gradient is transposed, and tensors computed from it would be too.
    gradient = gradients[0].contiguous()
    if scale is not None:
        gradient = gradient * _each_model(scale, gradient)
    return stepped(kind, p, gradient, state, numbers, in_place)


def _in_pieces(
    kind: Kind, p: Tensor, gradients: Sequence[Tensor], state: State, numbers: Tensor, scale: Tensor | None
) -> None:
    """Update a group in place; the temporary tensors are small, so memory that sufficed for the gradients suffices."""
    models = max(1, PIECE // p[0, 0].numel())
    rows = max(1, PIECE // p[0, 0, 0].numel())
    for index, gradient in enumerate(gradients):
        one = slice(index, index + 1)
        for model in range(0, p.shape[0], models):
            some = slice(model, model + models)
            for row in range(0, p.shape[2], rows):
                place = (some, one, slice(row, row + rows))
                g = gradient[some, :, place[2]].contiguous()
                if scale is not None:
                    g = g * _each_model(scale[some], g)  # not in place: two parameters may share their gradient
                stepped(kind, p[place], g, tuple(each[place] for each in state), numbers[:, some, one], in_place=True)


def _each_model(values: Tensor, stack: Tensor) -> Tensor:
    """Return one value for each model, [K], in a shape that broadcasts over ``stack``, [K, ...]."""
    return values.to(stack.dtype).view(-1, *[1] * (stack.dim() - 1))
