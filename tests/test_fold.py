"""A forward multiplier and its fold train alike: the same losses in float64, step by step.

The explicit model is written here: its multipliers stand in the forward pass, its optimizer has the settings of TP-V
2203.03466, Table 8, by hand. The folded one is the plain model under its plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.fold import Factors

from . import families

STEPS = 30
M = 4  # target width / base width
RECIPES = {
    # an epsilon as large as the gradients, so that a wrong one shows
    "adamw": {"lr": 2**-8, "weight_decay": 0.5, "decay": "all", "eps": 1e-3, "betas": (0.8, 0.9)},
    "sgd": {"lr": 2**-4, "weight_decay": 0.02, "decay": "all", "momentum": 0.9},
}
# (lr, weight decay, eps) with the readout's 1/m in the forward pass
TABLE_8 = {
    "adamw": {
        "input": (1, 1, 1 / M),
        "vector": (1, 1, 1 / M),
        "hidden": (1 / M, M, 1 / M),
        "output": (1, 1, 1 / M),
        "finite": (1, 1, 1),
    },
    "sgd": {
        "input": (M, 1 / M, 1),
        "vector": (M, 1 / M, 1),
        "hidden": (1, 1, 1),
        "output": (M, 1 / M, 1),
        "finite": (1, 1, 1),
    },
}


@dataclass(frozen=True)
class Case:
    """A family with the multipliers that its explicit twin has in the forward pass."""

    family: Callable[[], mt.Family]
    readout: float = 1 / M
    first: float = 1.0
    attention: float = 1.0
    carries_readout: str = "readout.weight"
    carries_attention: str = "q.weight"
    recipe: dict[str, float] = field(default_factory=dict)


def attention(**shape: Any) -> Callable[[], mt.Family]:
    return lambda: families.transformer(width=16, head_dim=None, **shape)


def small(**shape: Any) -> Callable[[], mt.Family]:
    return lambda: families.transformer(width=16, head_dim=8, **shape)


CASES = {
    "readout, before its bias": Case(lambda: families.mlp(width=16)),
    "readout alpha": Case(lambda: families.mlp(width=16), readout=3 / M, recipe={"alpha_output": 3}),
    "input alpha, before its bias": Case(lambda: families.mlp(width=16), first=0.5, recipe={"alpha_input": 0.5}),
    "embedding alpha": Case(small(), first=5, recipe={"alpha_input": 5}),
    "attention alpha": Case(small(), attention=2, recipe={"alpha_attention": 2}),
    "head dim": Case(attention(heads=2), attention=M**-0.5),
    "head dim, grouped queries": Case(attention(heads=4, kv_heads=2), attention=M**-0.5),
    "head dim, normed queries": Case(
        attention(heads=2, qk_norm=True), attention=M**-0.5, carries_attention="q_norm.weight"
    ),
    "head dim and attention alpha": Case(
        attention(heads=2, qk_norm=True), attention=3 * M**-0.5, carries_attention="q_norm.weight",
        recipe={"alpha_attention": 3},
    ),
    "tied": Case(small(tied=True), carries_readout="norm.weight"),
    "tied, all alphas": Case(
        small(tied=True), readout=3 / M, first=0.5, attention=2, carries_readout="norm.weight",
        recipe={"alpha_output": 3, "alpha_input": 0.5, "alpha_attention": 2},
    ),
}  # fmt: skip


def multiplied(attention: Any, c: float) -> None:
    """Let the attention take c/√d for its softmax scale."""
    plain, original = type(attention).forward, F.scaled_dot_product_attention

    def scaled(q: torch.Tensor, *rest: torch.Tensor, **options: Any) -> torch.Tensor:
        return original(q, *rest, scale=c / math.sqrt(q.shape[-1]), **options)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(F, "scaled_dot_product_attention", scaled):
            return plain(attention, x)

    attention.forward = forward


def explicit_twin(case: Case, plan: mt.Plan, model: nn.Module) -> nn.Module:
    """The same function as ``model`` with every multiplier in the forward pass and none in the weights."""
    twin: Any = case.family().build(plan.scale).double()
    twin.readout.register_forward_pre_hook(lambda _, x: x[0] * case.readout)
    if hasattr(twin, "embedding"):
        # a hook would also meet nothing else: the tied readout calls no embedding
        twin.embedding.register_forward_hook(lambda _, __, out: out * case.first)
        for block in twin.blocks:
            multiplied(block.attention, case.attention)
    else:
        twin.input.register_forward_pre_hook(lambda _, x: x[0].flatten(1) * case.first)
    gauges = {case.carries_readout: case.readout, "embedding.weight": case.first, "input.weight": case.first}
    if case.carries_readout == "norm.weight":
        gauges["norm.weight"] /= case.first  # the tied matrix brings the input's multiplier with it
    with torch.no_grad():
        for (name, theirs), (_, ours) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
            queries = case.attention if name.endswith(f"attention.{case.carries_attention}") else 1
            theirs.copy_(ours / (gauges.get(name, 1) * queries))
    return twin


def explicit_optimizer(name: str, plan: mt.Plan, twin: nn.Module) -> torch.optim.Optimizer:
    recipe, roles, groups = plan.recipe, {row.name: row.role for row in plan.rows}, []
    for parameter_name, parameter in twin.named_parameters():
        lr, decay, eps = TABLE_8[name][roles[parameter_name]]
        groups.append({"params": [parameter], "lr": recipe.lr * lr, "weight_decay": recipe.weight_decay * decay})
        if name == "adamw":
            groups[-1] |= {"eps": recipe.eps * eps, "betas": recipe.betas}
    return torch.optim.AdamW(groups) if name == "adamw" else torch.optim.SGD(groups, momentum=recipe.momentum)


def losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    family: mt.Family,
    clip: Callable[[nn.Module], Any] = lambda model: None,
) -> list[float]:
    x, y = family.batch
    batch = (x.double() if x.is_floating_point() else x, y)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = family.loss(model, batch)
        loss.backward()
        clip(model)
        optimizer.step()
        seen.append(loss.item())
    return seen


def both(case: Case, optimizer: str) -> tuple[mt.Family, mt.Plan, nn.Module, nn.Module]:
    family = case.family()
    recipe = mt.Recipe.read(RECIPES[optimizer] | case.recipe, "recipe")
    plan = mt.plan(family, family.base.with_(width=M * family.base.width), "mup", optimizer, recipe)
    model = family.build(plan.scale).double()
    plan.initialize(model, seed=1)
    return family, plan, model, explicit_twin(case, plan, model)


@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_folded_and_explicit_multipliers_train_alike(name: str, optimizer: str) -> None:
    family, plan, model, twin = both(CASES[name], optimizer)
    folded = losses(model, plan.make_optimizer(model), family)
    explicit = losses(twin, explicit_optimizer(optimizer, plan, twin), family)
    assert folded[-1] < 0.99 * folded[0]
    assert folded == pytest.approx(explicit, rel=1e-10)


@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("name", ["readout alpha", "embedding alpha", "head dim, normed queries", "tied, all alphas"])
def test_clipping_is_that_of_the_explicit_model(name: str, optimizer: str) -> None:
    """The norm before clipping too, and clipping does change the run."""
    family, plan, model, twin = both(CASES[name], optimizer)
    norms: dict[str, list[float]] = {"folded": [], "explicit": []}

    def ours(folded: nn.Module) -> None:
        norms["folded"].append(plan.clip_grad_norm_(folded, 0.1).item())

    def torchs(explicit: nn.Module) -> None:
        norms["explicit"].append(nn.utils.clip_grad_norm_(explicit.parameters(), 0.1).item())

    folded = losses(model, plan.make_optimizer(model), family, ours)
    explicit = losses(twin, explicit_optimizer(optimizer, plan, twin), family, torchs)
    assert folded == pytest.approx(explicit, rel=1e-10)
    assert norms["folded"] == pytest.approx(norms["explicit"], rel=1e-9)
    assert max(norms["folded"]) > 0.1
    _, _, again, _ = both(CASES[name], optimizer)
    unclipped = losses(again, plan.make_optimizer(again), family)
    assert unclipped != pytest.approx(folded, rel=1e-4)


def test_a_small_gradient_is_not_clipped() -> None:
    _, plan, model, _ = both(CASES["readout alpha"], "sgd")
    assert plan.clip_grad_norm_(model, 1.0) == 0  # no gradient yet
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-9)
    plan.clip_grad_norm_(model, 1.0)
    assert all((parameter.grad == 1e-9).all() for parameter in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [Factors(lr=1.01), Factors(weight_decay=1.01), Factors(eps=1.01), Factors(init=1.01)])
def test_the_twin_would_notice_a_wrong_fold(wrong: Factors, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Factors.folded
    monkeypatch.setattr(Factors, "folded", lambda self, c, column: right(self, c, column) * wrong)
    family, plan, model, twin = both(CASES["tied"], "adamw")
    folded = losses(model, plan.make_optimizer(model), family)
    explicit = losses(twin, explicit_optimizer("adamw", plan, twin), family)
    # a constant's start follows the gauge, which `init` is not: only random weights feel it
    assert (folded == pytest.approx(explicit, rel=1e-10)) == (wrong.init != 1)


def test_factors_multiply() -> None:
    factors = Factors(2, 3, 5, 7, 11) * Factors(1 / 2, 1 / 3, 1 / 5, 1 / 7, 1 / 11)
    assert factors == Factors()
    twice, once = (Factors(3, 3, 3, 3, 3) for _ in range(2))
    assert twice.folded(2, "sgd").folded(0.5, "sgd") == once
    assert twice.folded(2, "adam").folded(3, "adam") == once.folded(6, "adam")
