"""Optimizer steps of K models at once, each with its own settings, as functions that return new tensors.

The arithmetic is that of torch's own classes, operation by operation, so that a fused step equals a separate one. Nothing is
changed in place: Inductor's fusion for CPUs failed on programs that do (docs/log.md).

Shapes: parameters, gradients and states are [K, ...], settings [K, 1, ...] in float64, clocks [K].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mutransfer._torch_internals import NEWTON_SCHULZ, muon_lr, register_dataclass
from mutransfer.optimizers.muon import iteration_dtype, orthogonalized
from mutransfer.planning.plan import Columns, ParameterPlan, Plan

__all__ = ["FUSED", "Clock", "Kind", "OptimSettings", "blank_state", "kind_of", "numbers_of", "stepped"]

FUSED = ("adamw", "adam", "sgd", "muon", "muon-match-rms-adamw")
OptimSettings = dict[str, Tensor]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kind:
    """Which update a parameter follows; ``adjust`` is Muon's factor, by the name that torch gives it, ``iteration`` its dtype.

    ``columns`` are those with a gauge of their own, which counts in clipping.
    """

    name: str
    adjust: str = ""
    iteration: torch.dtype = torch.bfloat16
    columns: tuple[Columns, ...] = ()


@dataclass(frozen=True)
class Clock:
    """Where each model is: what multiplies its learning rates in this step, and the step's number from 1; [K] in float64."""

    multiplier: Tensor
    step: Tensor


register_dataclass(Clock)


def kind_of(plan: Plan, row: ParameterPlan, device: str) -> Kind:
    """Return the update of one parameter on ``device``."""
    settings = plan.settings_of(row)
    if settings.get("muon"):
        return Kind("muon", settings["adjust_lr_fn"], iteration_dtype(device))
    return Kind("adam" if "betas" in settings else "sgd", columns=row.columns)


def numbers_of(plan: Plan, row: ParameterPlan) -> dict[str, float]:
    """Return the settings of one parameter as numbers, with its gauge, which counts in clipping."""
    settings = plan.settings_of(row)
    betas = settings.get("betas", (0.0, 0.0))
    return {
        "lr": settings["lr"],
        "weight_decay": settings["weight_decay"],
        "eps": settings.get("eps", 0.0),
        "beta1": betas[0],
        "beta2": betas[1],
        "momentum": settings.get("momentum", 0.0),
        "gauge": row.gauge,
    }


def blank_state(kind: Kind, parameter: Tensor) -> State:
    """Return the optimizer's state before the first step."""
    return tuple(torch.zeros_like(parameter) for _ in range(2 if kind.name == "adam" else 1))


def stepped(
    kind: Kind, parameter: Tensor, gradient: Tensor, state: State, settings: OptimSettings, clock: Clock
) -> tuple[Tensor, State]:
    """Return parameters and state after one step."""
    multiplier, step = (each.view(-1, *[1] * (parameter.dim() - 1)) for each in (clock.multiplier, clock.step))
    lr = settings["lr"] * multiplier
    match kind.name:
        case "adam":
            return _adam(parameter, gradient, state, settings, lr, step)
        case "muon":
            return _muon(parameter, gradient, state, settings, lr, kind)
        case _:
            return _sgd(parameter, gradient, state, settings, lr)


def _adam(p: Tensor, g: Tensor, state: State, settings: OptimSettings, lr: Tensor, t: Tensor) -> tuple[Tensor, State]:
    """AdamW; `Adam` is the same here, as its rule takes no weight decay (`torch.optim.adam._single_tensor_adam`)."""
    beta1, beta2 = settings["beta1"], settings["beta2"]
    keep = (1 - lr * settings["weight_decay"]).to(p.dtype)
    size = (lr / (1 - beta1**t)).to(p.dtype)
    root = (1 - beta2**t).sqrt().to(p.dtype)
    first = torch.lerp(state[0], g, (1 - beta1).to(p.dtype))
    second = state[1] * beta2.to(p.dtype) + (1 - beta2).to(p.dtype) * g * g
    return p * keep - size * first / (second.sqrt() / root + settings["eps"].to(p.dtype)), (first, second)


def _sgd(p: Tensor, g: Tensor, state: State, settings: OptimSettings, lr: Tensor) -> tuple[Tensor, State]:
    """SGD with momentum; a buffer of zeros makes the first step that of torch (`torch.optim.sgd._single_tensor_sgd`)."""
    g = g + settings["weight_decay"].to(p.dtype) * p
    buffer = state[0] * settings["momentum"].to(p.dtype) + g
    return p - lr.to(p.dtype) * buffer, (buffer,)


def _muon(p: Tensor, g: Tensor, state: State, settings: OptimSettings, lr: Tensor, kind: Kind) -> tuple[Tensor, State]:
    """Muon with Nesterov momentum (`torch.optim._muon._single_tensor_muon`)."""
    momentum = settings["momentum"]
    buffer = torch.lerp(state[0], g, (1 - momentum).to(p.dtype))
    direction = orthogonalized(torch.lerp(g, buffer, momentum.to(p.dtype)), kind.iteration, *NEWTON_SCHULZ)
    size = lr * muon_lr(1.0, kind.adjust, p.shape[1:])
    return p * (1 - lr * settings["weight_decay"]).to(p.dtype) - size.to(p.dtype) * direction.to(p.dtype), (buffer,)
