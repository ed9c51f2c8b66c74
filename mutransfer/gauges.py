"""The gauge of unit weights: forward multipliers that stay in the forward pass, for formats with few digits.

Every other plan folds its multipliers away. u-µP (2407.17465) keeps them, so that weights, and with them activations and
gradients, have a size of about 1 whatever the width: what low precision needs. Both train alike (`fold`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .errors import RequestError
from .names import plain_name
from .optimizers.rules import OPTIMIZERS
from .parametrizations.spec import Factors

if TYPE_CHECKING:
    from .plans import ParameterPlan, Plan

__all__ = ["ColumnMultiplier", "Columns", "Multiplier", "as_entered", "attach", "refuse_other_gauge", "unit"]


@dataclass(frozen=True)
class Columns:
    """Entries ``begin`` to ``end`` of the axis that a layer sums over, which its input enters ``multiplier`` times as large.

    ``gauge`` is how much larger they are, against the layer's other columns, than in the source's own gauge.
    """

    axis: int
    begin: int
    end: int
    multiplier: float
    gauge: float


class ColumnMultiplier:
    """A forward pre-hook of a linear layer or convolution that multiplies some of its input's features."""

    def __init__(self, columns: tuple[Columns, ...], axes: int) -> None:
        self.columns, self.dim = columns, 1 - axes  # of a convolution with k spatial axes, the channels are dim −k−1
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
    """``weight`` is c times what is trained; assigning to it divides. It has no state of its own."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        """Return the weight that the model uses."""
        return original * self.c

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what is trained, for a weight that the model should use."""
        return weight / self.c


def unit(plan: Plan) -> Plan:
    """Return the same training in the gauge where random weights start with standard deviation 1.

    Constants (gains, biases) stay as they are, with what is folded into them.
    """
    return replace(plan, rows=tuple(_unit(row, OPTIMIZERS[plan.optimizer].of(row).fold) for row in plan.rows))


def _unit(row: ParameterPlan, kind: str) -> ParameterPlan:
    c = row.init.std
    if c == 0:
        return row
    change = Factors().folded(1 / c, kind)
    factor = Factors().folded(1 / (row.init_factor or 1.0), kind)  # the base's own multiplier is another
    scaled = row.init.scaled(1 / c)
    return replace(row.times(change, factor), init=scaled, multiplier=row.multiplier * c, init_factor=1.0)


@torch.no_grad()
def attach(plan: Plan, model: nn.Module) -> None:
    """Register the plan's multipliers on ``model``, in place, without changing what it computes.

    Raises:
        RequestError: the model has multipliers already, or lacks a parameter of the plan.
    """
    owners = list(_owners(model))
    named = {f"{prefix}.{key}".lstrip("."): getattr(module, key) for module, prefix, key in owners}
    for row in plan.rows:
        if row.columns:
            _attach_columns(row, model)
        if row.multiplier == 1:
            continue
        if row.name not in named:
            raise RequestError(
                f"{row.name} is not a plain parameter of the model: attach the plan once, to a fresh build."
            )
        parameter = named[row.name]
        value = parameter / row.multiplier
        for module, _, key in owners:
            if getattr(module, key, None) is parameter:  # a tied matrix is multiplied wherever it is used
                parametrize.register_parametrization(module, key, Multiplier(row.multiplier))
        parameter.copy_(value)


def _attach_columns(row: ParameterPlan, model: nn.Module) -> None:
    """Multiply the columns of a layer, and of copies of it that are not trained, as a target network's."""
    owner, _, key = row.name.rpartition(".")
    layer = dict(model.named_modules()).get(owner)
    weight = getattr(layer, key, None)
    if layer is None or weight is None or _columns_of(layer):
        raise RequestError(f"{row.name} is not a plain parameter of the model: attach the plan once, to a fresh build.")
    copies = [
        each for each in model.modules() if type(each) is type(layer) and _copies(getattr(each, key, None), weight)
    ]
    hook = ColumnMultiplier(row.columns, weight.dim())
    for each in (layer, *copies):
        each.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        own = getattr(each, key)
        own.copy_(hook.multiplied(own, row.columns[0].axis, divide=True))


def _copies(other: torch.Tensor | None, weight: torch.Tensor) -> bool:
    if other is None or other is weight or other.requires_grad or other.shape != weight.shape or weight.is_meta:
        return False
    return bool(torch.equal(other, weight))


@contextmanager
def as_entered(module: nn.Module) -> Iterator[None]:
    """Let ``module`` be called with what entered its forward once, which its multiplier is in already."""
    hooks = [each for each in module._forward_pre_hooks.values() if isinstance(each, ColumnMultiplier)]
    for each in hooks:
        each.paused = True
    try:
        yield
    finally:
        for each in hooks:
            each.paused = False


def _columns_of(module: nn.Module) -> tuple[Columns, ...]:
    hooks = (each for each in module._forward_pre_hooks.values() if isinstance(each, ColumnMultiplier))
    return next((each.columns for each in hooks), ())


def refuse_other_gauge(plan: Plan, model: nn.Module) -> None:
    """Refuse a model whose multipliers are not the plan's."""
    found = {
        f"{prefix}.{key}".lstrip("."): list_[0].c
        for prefix, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for key, list_ in module.parametrizations.items()
        if isinstance(list_[0], Multiplier)
    }
    columns = {
        plain_name(f"{prefix}.weight".lstrip(".")): each
        for prefix, module in model.named_modules()
        if (each := _columns_of(module))
    }
    for row in plan.rows:
        has = found.get(row.name, 1.0)
        if row.columns != columns.get(plain_name(row.name), ()):
            raise RequestError(
                f"{row.name} has columns with a forward multiplier in the plan and others, or none, in the model: call "
                "plan.attach(model) once, on a fresh build, before plan.initialize(model)."
            )
        if has != row.multiplier:
            raise RequestError(
                f"{row.name} has the forward multiplier {has:g} in the model and {row.multiplier:g} in the plan: call "
                "plan.attach(model) once, with the plan that you train under."
            )


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for prefix, module in model.named_modules():
        for key in list(module._parameters):
            if module._parameters[key] is not None:
                yield module, prefix, key
