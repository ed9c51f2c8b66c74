"""Families and recipes to plan, and the models under their plans."""

from __future__ import annotations

from typing import Any

from torch import nn

import mutransfer as mt
from mutransfer.planning.build import ObservedModel, observed_model
from mutransfer.planning.plan import ParameterPlan
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import Observation

from . import families

FAMILIES = {
    "mlp": families.mlp,
    "resnet": families.resnet,
    "transformer": families.transformer,
    "tied": lambda: families.transformer(tied=True),
    "heads": lambda: families.transformer(head_dim=None, heads=2, qk_norm=True),
    "gqa": lambda: families.transformer(kv_heads=1, ffn="gelu"),
}
TUNED = {"lr": 0.003, "eps": 1e-6, "decay": "all"}
OPTIMIZERS = {
    "adamw": mt.Recipe(**TUNED, weight_decay=0.1),
    "adam": mt.Recipe(**TUNED),
    "sgd": mt.Recipe(**TUNED, weight_decay=0.1),
}


_observations: dict[int, tuple[mt.Family, Observation]] = {}
_targets: dict[tuple[int, Scale, str], ObservedModel] = {}


def plan_of(
    family: mt.Family, scale: Scale, parametrization: str = "mup", optimizer: str = "adamw", recipe: Any = None
) -> mt.Plan:
    """Return `mutransfer.plan` of these, but observe each family only once in this process: most of the time goes there."""
    key = id(family), scale, parametrization  # an id is not used again while `_observations` keeps the family
    if id(family) not in _observations:
        _observations[id(family)] = family, observe(family)
    if key not in _targets:
        _targets[key] = observed_model(family, scale, parametrization, _observations[id(family)][1])
    return mt.plan(family, scale, parametrization, optimizer, recipe, target=_targets[key])


def rows(plan: mt.Plan) -> dict[str, ParameterPlan]:
    return {row.name: row for row in plan.rows}


def wider(family: mt.Family, ratio: int) -> Scale:
    return family.base.with_(width=ratio * family.base.width)


def model_of(family: mt.Family, plan: mt.Plan, seed: int = 0) -> nn.Module:
    model = family.build(plan.scale)
    plan.initialize(model, seed)
    return model
