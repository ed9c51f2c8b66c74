"""What a plan registers on a model: forward multipliers, of whole weights and of single columns, and masks of pruned weights.

Masks are parametrizations: they are saved in the state dict, and what they remove gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..config import Number, Whole, exact
from ..errors import RequestError
from ..initialization.init import Init, draw_

__all__ = [
    "ColumnBlock", "ColumnMultiplier", "Mask", "Multiplier", "as_entered", "columns_of", "drawn_mask", "masks_of",
    "register_mask",
]  # fmt: skip


@exact
@dataclass(frozen=True)
class ColumnBlock:
    """Entries ``begin`` to ``end`` of the axis that a layer sums over, whose inputs are multiplied by ``multiplier``.

    ``gauge`` is how much larger these entries are, relative to the layer's other columns, than in the table's source.
    """

    axis: Whole
    begin: Whole
    end: Whole
    multiplier: Number
    gauge: Number


class ColumnMultiplier:
    """Forward pre-hook of a linear layer or convolution that multiplies some features of its input."""

    def __init__(self, columns: tuple[ColumnBlock, ...], axes: int) -> None:
        self.columns, self.dim = columns, 1 - axes  # in a convolution with k spatial axes, channels are dim −k−1
        self.paused = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the layer's arguments with the input multiplied."""
        if self.paused:
            return args, kwargs
        if args:
            return (self.multiplied(args[0], self.dim), *args[1:]), kwargs
        return args, {**kwargs, "input": self.multiplied(kwargs["input"], self.dim)}

    def multiplied(self, tensor: torch.Tensor, dim: int, *, divide: bool = False) -> torch.Tensor:
        """Return ``tensor`` with its entries along ``dim`` multiplied, or divided."""
        end, pieces = 0, []
        for each in self.columns:
            pieces.append(tensor.narrow(dim, end, each.begin - end))
            by = 1 / each.multiplier if divide else each.multiplier
            pieces.append(tensor.narrow(dim, each.begin, each.end - each.begin) * by)
            end = each.end
        return torch.cat([*pieces, tensor.narrow(dim, end, tensor.shape[dim] - end)], dim)


class Multiplier(nn.Module):
    """Parametrization with weight = c · original; assigning to ``weight`` divides by c. It has no state."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        """Return the weight that the model uses."""
        return original * self.c

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the trained tensor for a weight that the model should use."""
        return weight / self.c


@contextmanager
def as_entered(module: nn.Module) -> Iterator[None]:
    """Pause the column multipliers of ``module``, to call it with inputs that they have already multiplied."""
    hooks = [each for each in module._forward_pre_hooks.values() if isinstance(each, ColumnMultiplier)]
    for each in hooks:
        each.paused = True
    try:
        yield
    finally:
        for each in hooks:
            each.paused = False


def columns_of(module: nn.Module) -> tuple[ColumnBlock, ...]:
    """Return the columns of a layer whose input is multiplied; none for other modules."""
    hooks = (each for each in module._forward_pre_hooks.values() if isinstance(each, ColumnMultiplier))
    return next((each.columns for each in hooks), ())


class Mask(nn.Module):
    """Parametrization with weight = mask · original.

    Where the mask is 0, `set` makes the original 0, and no optimizer step changes it: its gradient is 0, and so are the momentum
    and the decay of a weight that is 0. (Muon's update mixes all entries; `planning.build.plan` refuses it.)

    Attributes:
        mask: a buffer of the weight's shape and type, of zeros and ones.
    """

    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False))

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        """Return the weight that the model uses."""
        return original * self.mask

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the trained tensor for a weight that the model should use."""
        return weight

    @torch.no_grad()
    def set(self, mask: torch.Tensor, original: torch.Tensor) -> None:
        """Use another mask, and set the entries of ``original`` that it removes to 0."""
        self.mask.copy_(mask)
        original.mul_(self.mask)


def register_mask(module: nn.Module, key: str, name: str) -> None:
    """Register a mask of ones on the parameter ``key`` of ``module``, which `masks_of` then finds.

    Raises:
        RequestError: the parameter is sharded; ``name`` is its name in the message.
    """
    weight = getattr(module, key)
    if hasattr(weight, "placements"):
        raise RequestError(
            f"{name} is sharded, but pruned models are trained on one device: attach the plan before sharding."
        )
    parametrize.register_parametrization(module, key, Mask(weight))


def masks_of(model: nn.Module) -> dict[int, list[Mask]]:
    """Return the masks of ``model`` by the id of the parameter that they apply to, several if modules share it."""
    found: dict[int, list[Mask]] = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for each in module:
                if isinstance(each, Mask):
                    found.setdefault(id(module.original), []).append(each)
    return found


@torch.no_grad()
def drawn_mask(shape: tuple[int, ...], density: float, seed: int, name: str) -> torch.Tensor:
    """Return a random mask with round(density · size) ones, which depends only on seed and name (float32, on the CPU)."""
    uniform = torch.empty(shape)
    draw_(uniform, Init("uniform", 0.0, 1.0), seed, f"{name}/mask")
    kept = uniform.flatten().argsort(stable=True)[: round(density * uniform.numel())]
    return torch.zeros(uniform.numel()).index_fill_(0, kept, 1.0).view(shape)
