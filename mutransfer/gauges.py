"""The gauge of unit weights: forward multipliers that stay in the forward pass, for formats with few digits.

Every other plan folds its multipliers away. u-µP (2407.17465) keeps them, so that weights, and with them activations and
gradients, have a size of about 1 whatever the width: what low precision needs. Both train alike (`fold`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from .errors import RequestError
from .fold import Factors
from .optimizers.registry import OPTIMIZERS

if TYPE_CHECKING:
    from .plans import ParameterPlan, Plan

__all__ = ["Multiplier", "attach", "refuse_other_gauge", "unit"]


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


def refuse_other_gauge(plan: Plan, model: nn.Module) -> None:
    """Refuse a model whose multipliers are not the plan's."""
    found = {
        f"{prefix}.{key}".lstrip("."): list_[0].c
        for prefix, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for key, list_ in module.parametrizations.items()
        if isinstance(list_[0], Multiplier)
    }
    for row in plan.rows:
        has = found.get(row.name, 1.0)
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
