"""The model's parameters by the plan's names, or a sentence about the first that does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .errors import RequestError
from .family import is_lazy
from .gauges import refuse_other_gauge
from .names import planned_names

if TYPE_CHECKING:
    from .plans import Plan

__all__ = ["matched"]


def matched(plan: Plan, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters of ``model``, under whatever wrapper, by the names in ``plan``.

    Raises:
        RequestError: a parameter on one side only, another shape, or other forward multipliers than the plan's.
    """
    planned = {row.name: row.shape for row in plan.rows}
    found = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if (name := is_lazy(model)) is not None:
        raise RequestError(f"{name} is lazy and has no shape yet: run one batch through the model first.")
    owners = planned_names(found, planned)
    parameters = {owners[name]: parameter for name, parameter in found.items()}
    refuse_other_gauge(plan, model)
    _refuse_difference(parameters.keys() - planned.keys(), "the model has", "the plan does not")
    _refuse_difference(planned.keys() - parameters.keys(), "the plan has", "the model does not")
    for name, shape in planned.items():
        if tuple(parameters[name].shape) != shape:
            raise RequestError(
                f"{name} has shape {list(parameters[name].shape)} in the model and {list(shape)} in the plan for width "
                f"{plan.scale.width}: build the model at the plan's scale."
            )
    return parameters


def _refuse_difference(names: Iterable[str], here: str, there: str) -> None:
    for name in sorted(names):
        raise RequestError(f"{here} a parameter {name!r} that {there}: plan and build the same family, tied alike.")
