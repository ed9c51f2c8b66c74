"""A model as a user of mup writes it, and how its first training step ends."""

from __future__ import annotations

from typing import Any

import mup
import torch
from torch import nn

from . import families

WIDTH, BASE, LR = 64, 32, 2**-6


def build(width: int = WIDTH) -> nn.Module:
    model: Any = families.mlp().build(families.mlp().base.with_(width=width))
    model.readout = mup.MuReadout(width, 10)
    return model


def model() -> nn.Module:
    return mup.set_base_shapes(build(), build(BASE), delta=build(2 * BASE))


def outcome(model: nn.Module, **options: Any) -> str:
    """First line of what the first step of MuAdamW raises, or "trains"."""
    x, y = families.image_batch()
    try:
        optimizer = mup.MuAdamW(model.parameters(), **{"lr": LR, **options})
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "trains"


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """Learning rate in force by parameter name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
