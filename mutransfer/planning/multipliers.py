"""Forward multipliers that a plan registers on a model: of whole weights, and of single columns of a layer's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import Number, Whole, exact

__all__ = ["ColumnBlock", "ColumnMultiplier", "Multiplier", "as_entered", "columns_of"]


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
