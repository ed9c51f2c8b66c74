"""Unit weights under forward multipliers (u-µP's own gauge) train as the folded plan does, and nothing loses them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.planning.audit import audit, live

from .helpers import families
from .helpers.planned import plan_of
from .helpers.sets import extended_but
from .test_rescaling import RECIPES, losses

SCALE = mt.Scale(64, 4)


def planned(optimizer: str = "adamw", parametrization: str = "umup", **shape: Any) -> tuple[mt.Family, mt.Plan]:
    family = families.transformer(width=16, head_dim=8, **shape)
    alphas = {"alpha_residual": 2, "alpha_output": 0.5}
    # at test_rescaling's larger rate rounding has grown to 3e-9 by step 50 here
    lr = {"lr": 2**-7} if optimizer.startswith("adafactor") else {}
    recipe = mt.Recipe.read(RECIPES[optimizer] | alphas | lr, "recipe")
    return family, plan_of(family, SCALE, parametrization, optimizer, recipe)


def attached(plan: mt.Plan, family: mt.Family) -> nn.Module:
    model = family.build(plan.scale).double()
    plan.attach(model)
    return model


@pytest.mark.parametrize("tied", extended_but([False, True], False))
@pytest.mark.parametrize(
    "optimizer", extended_but(["adamw", "sgd", "nadam", "adafactor", "adafactor-hf"], "adamw", "sgd")
)
def test_the_explicit_gauge_trains_as_the_folded_one(optimizer: str, tied: bool) -> None:
    family, plan = planned(optimizer, tied=tied)
    folded = family.build(plan.scale).double()
    plan.initialize(folded, seed=1)
    unit = plan.unit()
    explicit = copy.deepcopy(folded)
    unit.attach(explicit)  # keeps what the model computes
    assert {row.multiplier for row in plan.rows} == {1.0}
    originals = {name: p for name, p in explicit.named_parameters() if name.endswith("original")}
    assert len(originals) == sum(row.multiplier != 1 for row in unit.rows) > 20
    for p in originals.values():
        assert p.std().item() == pytest.approx(1, abs=0.1)
    norms: dict[str, list[float]] = {"folded": [], "explicit": []}

    def clip(under: mt.Plan, key: str) -> Any:
        return lambda model: norms[key].append(under.clip_grad_norm_(model, 0.2).item())

    theirs = losses(explicit, unit.make_optimizer(explicit), family, clip(unit, "explicit"))
    ours = losses(folded, plan.make_optimizer(folded), family, clip(plan, "folded"))
    assert ours[-1] < 0.99 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-10)
    assert norms["folded"] == pytest.approx(norms["explicit"], rel=1e-9)
    assert max(norms["folded"]) > 0.2


def test_the_explicit_gauge_is_umups_table() -> None:
    """Relative to the base: Adam's lr falls as 1/√fan-in for hidden, 1/√fan-out for embeddings, not at all for the readout."""
    family, _ = planned()
    plan = plan_of(family, SCALE.with_(depth=2), "umup").unit()
    factors = {row.role: (row.init_factor, row.lr_factor) for row in plan.rows if row.init.std}
    assert factors == {
        "input": (1, pytest.approx(1 / 2)),
        "hidden": (1, pytest.approx(1 / 2)),
        "output": (1, pytest.approx(1)),
    }
    base = plan_of(family, family.base, "umup").unit()
    grown = {row.name: row.multiplier for row in plan.rows}
    for row in base.rows:
        power = {"hidden": 0.5, "output": 1}.get(row.role, 0)
        assert grown[row.name] / row.multiplier == pytest.approx(4**-power)
    assert {row.init.std for row in plan.rows} == {1.0, 0.0}


def test_attached_multipliers_survive_what_users_do() -> None:
    family, plan = planned()
    unit = plan.unit()
    model = attached(unit, family)
    unit.initialize(model, seed=2)
    names = {name for name, _ in model.named_parameters()}
    assert "readout.parametrizations.weight.original" in names
    optimizer = unit.make_optimizer(model)
    assert len(audit(unit, live(optimizer))) == 0
    losses(model, optimizer, family)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = attached(unit, family)
    again.load_state_dict(weights)
    resumed = unit.make_optimizer(again)
    resumed.load_state_dict(state)
    twin = copy.deepcopy(model)
    assert losses(again, resumed, family) == losses(model, optimizer, family)
    unit.initialize(twin, seed=2)
    plain = copy.deepcopy(model)
    before = family.loss(plain, family.batch)
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert family.loss(plain, family.batch) == before
    assert mt.Plan.from_dict(unit.as_dict()) == unit
    plain_twin = family.build(plan.scale)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in plain_twin.named_parameters()}


def test_the_wrong_gauge_is_refused() -> None:
    family, plan = planned()
    unit, model = plan.unit(), family.build(plan.scale)
    with pytest.raises(RequestError, match=r"has the forward multiplier 1 in the model.*plan\.attach\(model\)"):
        unit.initialize(model)
    unit.attach(model)
    with pytest.raises(RequestError, match="attach the plan once"):
        unit.attach(model)
    with pytest.raises(RequestError, match=r"and 1 in the plan"):
        plan.param_groups(model)
