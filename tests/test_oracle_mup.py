"""Training under a plan equals training with mup itself, step by step.

mup keeps the readout's factor in the forward pass (TP-V, Table 8) and we fold it (Table 3), so weights differ by that
factor and losses do not. mup does not scale Adam's epsilon: it is made too small to matter.
"""

from __future__ import annotations

import copy
from typing import Any

import mup
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.recipe import Scale

from .helpers import families
from .helpers.planned import plan_of
from .helpers.sets import extended_but

STEPS = 20
RECIPES = {
    "adamw": mt.Recipe(lr=2**-7, weight_decay=0.1, decay="all", eps=1e-30),
    "adam": mt.Recipe(lr=2**-7, eps=1e-30),
    "sgd": mt.Recipe(lr=2**-3, weight_decay=1e-3, decay="all", momentum=0.9),
}


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, family: mt.Family) -> list[float]:
    x, y = family.batch
    batch = (x.double() if x.is_floating_point() else x, y)
    seen = []
    for _ in range(STEPS):
        loss = family.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def with_mup_readout(model: nn.Module, tied: bool) -> nn.Module:
    """The same model as a user of mup would write it."""
    model = copy.deepcopy(model)
    old: Any = model.readout
    if tied:
        readout: Any = mup.MuSharedReadout(model.embedding.weight, bias=False)
    else:
        readout = mup.MuReadout(old.in_features, old.out_features, bias=old.bias is not None)
    model.readout = readout
    return model.double()


def mup_twin(family: mt.Family, plan: mt.Plan, model: nn.Module, tied: bool) -> nn.Module:
    """mup's model at the plan's scale, holding the same function as ``model``."""
    base, delta, twin = (
        with_mup_readout(family.build(s), tied)
        for s in (family.base, family.base.with_(width=2 * family.base.width), plan.scale)
    )
    mup.set_base_shapes(twin, base, delta=delta, rescale_params=False)
    ratio = plan.scale.width / family.base.width
    gauges = {row.name: row.gauge for row in plan.rows}
    with torch.no_grad():
        for (name, theirs), (_, ours) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
            theirs.copy_(ours / gauges[name] if not name.endswith(("q.weight", "q_norm.weight")) else ours)
    assert ratio == 1 or any(gauge != 1 for gauge in gauges.values())
    return twin


def mup_optimizer(name: str, twin: nn.Module, recipe: mt.Recipe) -> torch.optim.Optimizer:
    adam = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    match name:
        case "adamw":
            return mup.MuAdamW(twin.parameters(), **adam, weight_decay=recipe.weight_decay)
        case "adam":
            return mup.MuAdam(twin.parameters(), **adam)
        case _:
            return mup.MuSGD(
                twin.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
            )


@pytest.mark.parametrize("ratio", extended_but([2, 4, 8], 4))
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("kind", ["mlp", "transformer", "gqa-gelu", "tied"])
def test_losses_equal_mups(kind: str, optimizer: str, ratio: int) -> None:
    family = {
        "mlp": families.mlp,
        "transformer": families.transformer,
        "gqa-gelu": lambda: families.transformer(kv_share=2, ffn="gelu", head_dim=8),
        "tied": lambda: families.transformer(tied=True),
    }[kind]()
    recipe = RECIPES[optimizer]
    plan = plan_of(family, Scale(ratio * family.base.width, family.base.depth), "mup", optimizer, recipe)
    model = family.build(plan.scale).double()
    plan.initialize(model, seed=3)
    twin = mup_twin(family, plan, model, tied=kind == "tied")
    ours = losses(model, plan.make_optimizer(model), family)
    theirs = losses(twin, mup_optimizer(optimizer, twin, recipe), family)
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_oracle_would_notice_a_wrong_rule() -> None:
    """SP's plan, same weights: far from mup's losses."""
    family, recipe = families.mlp(), RECIPES["adamw"]
    scale = Scale(4 * family.base.width, family.base.depth)
    plan, wrong = plan_of(family, scale, "mup", recipe=recipe), plan_of(family, scale, "sp", recipe=recipe)
    model = family.build(scale).double()
    plan.initialize(model)
    other = copy.deepcopy(model)
    right, off = (losses(m, p.make_optimizer(m), family) for m, p in ((model, plan), (other, wrong)))
    assert right[1:] != pytest.approx(off[1:], rel=1e-3)
