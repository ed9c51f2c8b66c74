"""What is done with a plan: initial weights, parameter groups, and the models that are not its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.errors import RequestError

from .helpers import families
from .helpers.planned import FAMILIES, OPTIMIZERS, model_of, plan_of, rows, wider


def test_the_same_seed_gives_the_same_weights() -> None:
    family = families.transformer()
    plan = plan_of(family, wider(family, 2))
    model = model_of(family, plan, seed=5)
    first = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.rand(17)
    plan.initialize(model, seed=5)
    assert all(torch.equal(parameter, first[name]) for name, parameter in model.named_parameters())
    other = dict(model_of(family, plan, seed=6).named_parameters())
    for row in plan.rows:
        assert torch.equal(other[row.name], first[row.name]) == (row.init.kind == "constant")
    # streams belong to names: no two matrices start alike
    assert not torch.equal(first["blocks.0.attention.q.weight"], first["blocks.0.attention.k.weight"])
    assert not torch.equal(first["blocks.0.attention.q.weight"], first["blocks.1.attention.q.weight"])


@pytest.mark.parametrize("name", FAMILIES)
def test_empirical_std(name: str) -> None:
    """Drawn weights have the planned std, and at base width the std of the model's own constructor."""
    family = FAMILIES[name]()
    family = family.with_base(family.base.with_(width=128))
    for ratio in (1, 4):
        plan = plan_of(family, wider(family, ratio))
        model, own = dict(model_of(family, plan).named_parameters()), dict(family.build(plan.scale).named_parameters())
        big = [row for row in plan.rows if own[row.name].numel() >= 10_000]
        assert big
        for row in big:
            assert model[row.name].std().item() == pytest.approx(row.init.std, rel=0.02), row
            if ratio == 1:
                assert model[row.name].std().item() == pytest.approx(own[row.name].std().item(), rel=0.02), row
        for row in plan.rows:
            if row.init.kind == "constant" and row.gauge == 1:
                assert torch.equal(model[row.name], own[row.name]), row


def test_init_scale_multiplies_the_matrices_only() -> None:
    family = families.mlp()
    plain, scaled = (rows(plan_of(family, family.base, recipe=mt.Recipe(init_scale=s))) for s in (1.0, 3.0))
    for name, row in scaled.items():
        assert row.init.std == pytest.approx(plain[name].init.std * (3 if name.endswith("weight") else 1))
        assert row.lr == plain[name].lr


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameter_groups(optimizer: str, options: dict[str, Any]) -> None:
    family = families.transformer(tied=True)
    plan = plan_of(family, wider(family, 4), "mup", optimizer, OPTIMIZERS[optimizer].with_(decay="matrices"))
    model = model_of(family, plan)
    groups = plan.param_groups(model)
    distinct = [(group["lr"], group["weight_decay"], group.get("eps")) for group in groups]
    assert len(set(distinct)) == len(distinct) < len(plan.rows)
    given = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in given) == sorted(row.name for row in plan.rows)
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in given)
    by_name = {name: group for group in groups for name, _ in group["params"]}
    for row in plan.rows:
        group = by_name[row.name]
        assert (group["lr"], group["weight_decay"], group.get("eps")) == (row.lr, row.weight_decay, row.eps)
    assert [group["count"] for group in plan.groups()] == [len(group["params"]) for group in groups]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch_optimizer = plan.make_optimizer(model, **options)
    assert type(torch_optimizer).__name__.lower() == optimizer
    named = [name for group in torch_optimizer.param_groups for name in group["param_names"]]
    assert sorted(named) == sorted(row.name for row in plan.rows)
    shared = {"momentum": 0.9} if optimizer == "sgd" else {"betas": (0.9, 0.95)}
    assert all(group[key] == value for group in torch_optimizer.param_groups for key, value in shared.items())
    families.loss(model, family.batch).backward()
    torch_optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("action", ["initialize", "param_groups", "make_optimizer"])
def test_a_model_of_another_width_is_refused(action: str) -> None:
    family = families.mlp()
    plan = plan_of(family, wider(family, 4))
    model = family.build(wider(family, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    message = r"input\.weight has shape \[64, 64\] in the model and \[128, 64\] in the plan for width 128"
    with pytest.raises(RequestError, match=message):
        getattr(plan, action)(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(RequestError, match=r"the plan has a parameter 'hidden\.1\.bias' that the model does not"):
        getattr(plan, action)(family.build(replace(plan.scale, depth=2)))
    with pytest.raises(RequestError, match=r"the model has a parameter 'hidden\.2\.bias' that the plan does not"):
        getattr(plan, action)(family.build(replace(plan.scale, depth=4)))


def test_wrapped_models_are_recognized() -> None:
    family = families.mlp()
    plan = plan_of(family, wider(family, 2))
    model = model_of(family, plan)
    wrapped = nn.Module()
    wrapped.module = model
    assert len(plan.param_groups(wrapped)) == len(plan.param_groups(model))
