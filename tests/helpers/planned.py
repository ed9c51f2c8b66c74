"""Families and recipes to plan, and the models under their plans."""

from __future__ import annotations

from torch import nn

import mutransfer as mt
from mutransfer.planning.plan import ParameterPlan
from mutransfer.scale import Scale

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


def rows(plan: mt.Plan) -> dict[str, ParameterPlan]:
    return {row.name: row for row in plan.rows}


def wider(family: mt.Family, ratio: int) -> Scale:
    return family.base.with_(width=ratio * family.base.width)


def model_of(family: mt.Family, plan: mt.Plan, seed: int = 0) -> nn.Module:
    model = family.build(plan.scale)
    plan.initialize(model, seed)
    return model
