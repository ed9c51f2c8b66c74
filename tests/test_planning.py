"""The numbers of a plan: the identity at base width, RULES' factors elsewhere, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.planning.build import observed_model, plan
from mutransfer.recipe import Recipe, Scale

from .helpers import families
from .helpers.planned import FAMILIES, OPTIMIZERS, plan_of, rows, wider


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parametrization", ["mup", "sp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_at_base_width_every_factor_is_one(name: str, parametrization: str, optimizer: str) -> None:
    family, recipe = FAMILIES[name](), OPTIMIZERS[optimizer]
    plan = plan_of(family, family.base, parametrization, optimizer, recipe)
    for row in plan.rows:
        factors = row.m_in, row.m_out, row.lr_factor, row.wd_factor, row.init_factor, row.eps_factor, row.gauge
        assert all(factor in (1, None) for factor in factors), row
        assert (row.lr, row.weight_decay) == (recipe.lr, recipe.weight_decay)
        assert row.eps == (None if optimizer == "sgd" else recipe.eps)
    assert plan.notes == ()


#           init, lr and wd, eps, lr and wd of SGD, at 4x the width (RULES, canonical gauge)
AT_4X = {
    "input": (1, 1, 1, 1 / 4, 4, 1 / 4),
    "vector": (1, 1, 1, 1 / 4, 4, 1 / 4),
    "hidden": (1 / 2, 1 / 4, 4, 1 / 4, 1, 1),
    "output": (1 / 4, 1 / 4, 4, 1, 1 / 4, 4),
    "bottleneck": (1 / 2, 1 / 4, 4, 1, 1 / 4, 4),
    "finite": (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer", "gqa"])
def test_factors_at_four_times_the_width(name: str, optimizer: str) -> None:
    family, recipe = FAMILIES[name](), OPTIMIZERS[optimizer]
    plan = plan_of(family, wider(family, 4), "mup", optimizer, recipe)
    assert {row.role for row in plan.rows} >= {"input", "vector", "hidden", "output"}
    for row in plan.rows:
        init, lr, decay, eps, sgd_lr, sgd_decay = AT_4X[row.role]
        if optimizer == "sgd":
            lr, decay = sgd_lr, sgd_decay
        assert row.lr == pytest.approx(recipe.lr * lr, rel=1e-12), row
        assert row.weight_decay == pytest.approx(recipe.weight_decay * decay, rel=1e-12), row
        assert row.eps == (None if optimizer == "sgd" else pytest.approx(recipe.eps * eps, rel=1e-12)), row
        assert row.init_factor in (None, init), row
        assert (row.init_factor is None) == (row.init.kind == "constant")
        assert row.gauge == (1 / 4 if row.role == "output" else 1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_sp_changes_only_the_initialization(optimizer: str) -> None:
    family = families.transformer()
    plan = plan_of(family, wider(family, 4), "sp", optimizer, OPTIMIZERS[optimizer])
    for row in plan.rows:
        assert (row.lr_factor, row.wd_factor) == (1, 1)
        assert row.eps_factor in (1, None)
        assert row.init_factor in (None, 1 / 2 if row.role in ("hidden", "output") else 1)
        assert row.gauge == 1


def test_attention_factors_when_the_head_dim_grows() -> None:
    """α√d₀/d in place of 1/√d: c = m_h^-1/2 = 1/2 on W_q, or on the gain of the queries' norm."""
    family = families.transformer(head_dim=None, heads=2)
    plan = plan_of(family, wider(family, 4), "mup", "adamw", OPTIMIZERS["adamw"])
    row = rows(plan)["blocks.0.attention.q.weight"]
    assert (row.init_factor, row.lr_factor, row.wd_factor, row.eps_factor, row.gauge) == (1 / 4, 1 / 8, 8, 1 / 2, 1 / 2)
    assert rows(plan)["blocks.0.attention.k.weight"].lr_factor == 1 / 4
    assert any("head dim grows 4x" in note for note in plan.notes)
    sgd = rows(plan_of(family, plan.scale, "mup", "sgd"))["blocks.0.attention.q.weight"]
    assert (sgd.init_factor, sgd.lr_factor, sgd.wd_factor, sgd.gauge) == (1 / 4, 1 / 4, 4, 1 / 2)
    family = families.transformer(head_dim=None, heads=2, qk_norm=True)
    normed = rows(plan_of(family, wider(family, 4)))
    gain = normed["blocks.0.attention.q_norm.weight"]
    assert (gain.init.a, gain.lr_factor, gain.wd_factor, gain.eps_factor) == (1 / 2, 1 / 2, 2, 1 / 2)
    assert normed["blocks.0.attention.q.weight"].lr_factor == 1 / 4
    assert normed["blocks.0.attention.k_norm.weight"].init.a == 1
    assert rows(plan_of(family, wider(family, 4), "sp"))["blocks.0.attention.q_norm.weight"].init.a == 1


def test_a_tied_readouts_factor_is_in_the_final_norm() -> None:
    family = families.transformer(tied=True)
    plan = plan_of(family, wider(family, 4), "mup", "adamw", OPTIMIZERS["adamw"])
    gain, embedding = rows(plan)["norm.weight"], rows(plan)["embedding.weight"]
    assert (gain.init.a, gain.lr_factor, gain.wd_factor, gain.eps_factor, gain.gauge) == (1 / 4, 1 / 4, 4, 1, 1 / 4)
    assert (embedding.role, embedding.init_factor, embedding.lr_factor, embedding.gauge) == ("input", 1, 1, 1)
    assert any("folded into norm.weight" in note for note in plan.notes)
    sgd = rows(plan_of(family, plan.scale, "mup", "sgd"))["norm.weight"]
    assert (sgd.lr_factor, sgd.wd_factor) == (4 / 16, 16 / 4)


class Shared(nn.Module):
    """A tied readout with no norm before it that could carry its factor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(families.VOCABULARY, width)
        self.middle = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embedding(tokens)
        return torch.tanh(h + self.middle(h)) @ self.embedding.weight.T


def test_a_constant_that_carries_a_multiplier_is_named() -> None:
    """The table shows a standard deviation, which is 0 whatever the constant."""
    notes = plan_of(families.transformer(tied=True), Scale(128, 2)).notes
    assert "norm.weight: initially the constant 0.25 instead of 1, which init_std and init_factor do not show." in notes


def test_a_tied_readout_that_nothing_carries_is_refused() -> None:
    family = mt.Family(lambda s: Shared(s.width), families.token_batch(), families.loss, Scale(16))
    mt.plan(family, family.base)
    with pytest.raises(
        RequestError, match=r"tied to embedding\.weight, but no parameter before it can absorb its factor 0\.5"
    ):
        mt.plan(family, Scale(32))


def test_every_axis_has_its_own_ratio() -> None:
    """Width 4x with a feed-forward layer that grows 2x: by hand from RULES, no global width multiplier."""

    def build(scale: Scale) -> nn.Module:
        inner = {32: 64, 64: 96, 128: 128}[scale.width]
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, scale.width), nn.ReLU(), nn.Linear(scale.width, inner), nn.ReLU(),
            nn.Linear(inner, scale.width), nn.ReLU(), nn.Linear(scale.width, 10),
        )  # fmt: skip

    family = mt.Family(build, families.image_batch(), families.loss, Scale(32))
    adam, sgd = (rows(plan_of(family, Scale(128), optimizer=name)) for name in ("adamw", "sgd"))
    up, down = adam["3.weight"], adam["5.weight"]
    assert (up.m_in, up.m_out, up.init_factor, up.lr_factor, up.wd_factor, up.eps_factor) == (
        4,
        2,
        1 / 2,
        1 / 4,
        4,
        1 / 2,
    )
    assert (down.m_in, down.m_out, down.lr_factor, down.wd_factor, down.eps_factor) == (2, 4, 1 / 2, 2, 1 / 4)
    assert down.init_factor == pytest.approx(2**-0.5)
    assert (adam["3.bias"].m_out, adam["3.bias"].eps_factor, sgd["3.bias"].lr_factor) == (2, 1 / 2, 2)
    assert (sgd["3.weight"].lr_factor, sgd["5.weight"].lr_factor) == (1 / 2, 2)


@pytest.mark.parametrize(
    ("policy", "power"), [("independent", 0.0), ("coupled", 1.0), ("sqrt", 0.5)]
)  # of the lr factor in lr · wd
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_policies(optimizer: str, policy: str, power: float) -> None:
    family = families.mlp()
    recipe = mt.Recipe.read({"lr": 0.01, "weight_decay": 0.1, "decay": "all", "decay_policy": policy}, "recipe")
    for row in plan_of(family, wider(family, 4), "mup", optimizer, recipe).rows:
        assert row.lr * row.weight_decay == pytest.approx(0.01 * 0.1 * row.lr_factor**power, rel=1e-12), row


def test_which_parameters_decay() -> None:
    family = families.resnet()
    for decay in ("matrices", "all"):
        recipe = mt.Recipe.read({"weight_decay": 0.1, "decay": decay}, "recipe")
        for row in plan_of(family, wider(family, 2), recipe=recipe).rows:
            assert (row.weight_decay > 0) == (decay == "all" or len(row.shape) > 1), row


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1), ("sgd", 2)])
def test_the_alphas_of_the_recipe(optimizer: str, power: int) -> None:
    """α multiplies a forward value: std α, lr α (Adam) or α² (SGD), wd the reverse, eps 1/α; factors stay the table's."""
    family = families.transformer()
    tuned = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-6}
    plain = rows(plan_of(family, wider(family, 4), "mup", optimizer, mt.Recipe(**tuned)))
    alphas = {"alpha_input": 2.0, "alpha_attention": 3.0, "alpha_output": 5.0}
    found = rows(plan_of(family, wider(family, 4), "mup", optimizer, mt.Recipe(**tuned, **alphas)))
    expected = {"embedding.weight": 2, "readout.weight": 5} | {f"blocks.{i}.attention.q.weight": 3 for i in (0, 1)}
    for name, row in found.items():
        alpha = expected.get(name, 1)
        assert row.init.std == pytest.approx(plain[name].init.std * alpha)
        assert row.lr == pytest.approx(plain[name].lr * alpha**power)
        assert row.weight_decay == pytest.approx(plain[name].weight_decay / alpha**power)
        assert row.gauge == pytest.approx(plain[name].gauge * alpha)
        if optimizer == "adamw":
            assert row.eps == pytest.approx((plain[name].eps or 0) / alpha)
        assert (row.lr_factor, row.wd_factor, row.eps_factor, row.init_factor) == (
            plain[name].lr_factor, plain[name].wd_factor, plain[name].eps_factor, plain[name].init_factor,
        )  # fmt: skip


def test_the_input_alpha_is_for_what_meets_the_data() -> None:
    """The way up from a fixed rank scales as an input, yet the data does not enter there."""

    def build(scale: Scale) -> nn.Module:
        layers = nn.Linear(64, scale.width), nn.Linear(scale.width, 2), nn.Linear(2, scale.width)
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(scale.width, 10))

    family = mt.Family(build, families.image_batch(), families.loss, Scale(32))
    plain, found = (rows(plan_of(family, family.base, recipe=mt.Recipe(alpha_input=a))) for a in (1.0, 3.0))
    assert {name for name in found if found[name] != plain[name]} == {"1.weight"}
    assert found["3.weight"].role == "input"


def test_alphas_of_a_tied_model_meet_in_the_final_norm() -> None:
    recipe = mt.Recipe(alpha_input=2.0, alpha_output=5.0)
    family = families.transformer(tied=True)
    found = rows(plan_of(family, family.base, recipe=recipe))
    assert found["norm.weight"].init.a == 5 / 2
    assert found["embedding.weight"].init.std == 2 * rows(plan_of(family, family.base))["embedding.weight"].init.std


def test_notes_say_what_a_reader_should_know() -> None:
    family = families.mlp(width=64, depth=3)
    smaller = plan_of(family, Scale(16, 3))
    assert any("16 is smaller than the base's 64" in note for note in smaller.notes)
    assert rows(smaller)["hidden.0.weight"].lr_factor == 4
    assert any("from 3 to 5 layers" in note for note in plan_of(family, Scale(64, 5)).notes)
    assert plan_of(family, Scale(128, 3)).notes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parametrization": "mu"}, "unknown parametrization 'mu'"),
        ({"optimizer": "adamww"}, "no scaling rule is known for the optimizer 'adamww': did you mean 'adamw'"),
        ({"optimizer": "shampoo"}, "no scaling rule is known for the optimizer 'shampoo': known names are"),
        ({"optimizer": "radam"}, "radam has no rule that transfers"),
        ({"optimizer": "LBFGS"}, "LBFGS has no rule that transfers"),
        (
            {"optimizer": "adam", "recipe": mt.Recipe(weight_decay=0.1)},
            "Adam with weight_decay 0.1 is L2 regularization",
        ),
        ({"recipe": "nowhere.json"}, r"there is no nowhere\.json: expected a recipe"),
    ],
)
def test_wrong_requests_are_answered_in_a_sentence(arguments: dict[str, Any], message: str) -> None:
    family = families.mlp()
    with pytest.raises(RequestError, match=message):
        mt.plan(family, wider(family, 2), **arguments)


def test_a_model_of_other_parameters_at_the_target_is_refused() -> None:
    def build(scale: Scale) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, scale.width), nn.Linear(scale.width, 10, bias=scale.width < 100)
        )

    family = mt.Family(build, families.image_batch(), families.loss, Scale(32))
    with pytest.raises(RequestError, match=r"2\.bias exists at width 128 or in the base model, but not in both"):
        mt.plan(family, Scale(128))


def test_a_target_looked_at_once_gives_the_same_plans() -> None:
    family = families.mlp(width=16)
    scale = family.base.with_(width=64)
    there = observed_model(family, scale, "completep")
    for recipe in (Recipe(lr=0.1), Recipe(lr=0.01, init_scale=2.0, alpha_output=0.5, weight_decay=0.1)):
        assert plan(family, scale, "completep", recipe=recipe, target=there) == plan(
            family, scale, "completep", recipe=recipe
        )
    with pytest.raises(
        RequestError, match=r"the target was observed at .* for completep, but the plan is for .* under mup"
    ):
        plan(family, scale, "mup", target=there)
