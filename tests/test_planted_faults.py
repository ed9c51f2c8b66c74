"""Every planted fault is caught, by the detector that would meet it in practice, and its healthy twin is not.

A fault is planted for real: in the rows of a healthy plan, in a table, in one fold, or in what was observed. Slopes show what
changes a size (`record` with a faulty planner); what leaves the slopes alone (weight decay, folds, clipping) is compared
with an explicit model in float64, with mup, or with the plan's own invariant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.coord_check import record
from mutransfer.coord_check.verdicts import Verdict, verdict
from mutransfer.planning import builder
from mutransfer.planning.audit import audit, live
from mutransfer.planning.builder import PlanBuilder
from mutransfer.planning.plan import ParameterPlan, Plan
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import Observation

from . import test_oracle_mup
from .helpers import families, folds
from .helpers.sets import extended_but

Fault = Callable[[Plan], Plan]
Wrong = Callable[[ParameterPlan], dict[str, Any]]


def rows(which: Callable[[ParameterPlan], bool], wrong: Wrong) -> Fault:
    """Return what changes some rows of a plan and leaves the others."""

    def plant(plan: Plan) -> Plan:
        return replace(plan, rows=tuple(replace(row, **wrong(row)) if which(row) else row for row in plan.rows))

    return plant


def role(*names: str) -> Callable[[ParameterPlan], bool]:
    return lambda row: row.role in names


def matrix(name: str) -> Callable[[ParameterPlan], bool]:
    return lambda row: row.name.endswith(name)


def planner(fault: Fault, recipe: dict[str, Any] | None = None) -> Callable[..., Plan]:
    def faulty(family: mt.Family, scale: Scale, table: str, optimizer: str, given: mt.Recipe, **options: Any) -> Plan:
        return fault(mt.plan(family, scale, table, optimizer, given.with_(**(recipe or {})), **options))

    return faulty


def healthy(plan: Plan) -> Plan:
    return plan


def checked(family: mt.Family, fault: Fault = healthy, **recipe: Any) -> Verdict:
    """The coordinate check of ``family`` over 1 to 8 times its base width, under a plan with the fault in it."""
    widths = [family.base.width * 2**i for i in range(4)]
    return verdict(record(family, widths, seeds=range(4), steps=3, planner=planner(fault, recipe)))


def failing(found: Verdict) -> pd.DataFrame:
    slopes = found.slopes
    return slopes[slopes["ok"] == False]  # noqa: E712 - missing is not False


def names_and_cause(found: Verdict, module: str, cause: str) -> None:
    """The check fails, its verdict lists the faulty module, and the sentence says the right kind of thing."""
    assert found.status == "fail", found.cause
    assert module in set(failing(found)["module"]), found.cause
    assert cause in str(found.cause)


# --- slopes: faults that change how large something becomes ---


@functools.cache
def _healthy_mlp() -> Verdict:
    return checked(families.mlp(width=32))


@pytest.mark.parametrize(
    ("fault", "module", "cause"),
    [
        pytest.param(
            rows(role("hidden"), lambda row: {"lr": row.lr * row.m_in}), "hidden.0", "hidden lr not divided by the width",
            id="hidden lr not scaled",
        ),
        pytest.param(
            rows(matrix("input.weight"), lambda row: {"lr": row.lr / row.m_out}), "input", "input lr divided by the width",
            id="first layer's lr scaled",
        ),
        pytest.param(
            rows(role("output"), lambda row: {"init": row.init.scaled(row.m_in**0.5)}), "readout",
            "readout's initial weights shrink as width^-1/2", id="readout std as SP has it",
        ),
        pytest.param(
            rows(role("output"), lambda row: {"lr": row.lr * row.m_in}), "readout", "readout lr not divided by the width",
            id="readout lr not scaled",
        ),
        pytest.param(
            rows(role("hidden"), lambda row: {"init": row.init.scaled(row.m_in**0.5)}), "hidden.0",
            "hidden initial weights do not shrink",
            id="hidden std not scaled",
        ),
    ],
)  # fmt: skip
def test_the_check_names(fault: Fault, module: str, cause: str) -> None:
    assert _healthy_mlp().status == "pass", _healthy_mlp().cause
    names_and_cause(checked(families.mlp(width=32), fault), module, cause)


@pytest.mark.extended
def test_the_check_names_an_embedding_lr_that_is_scaled() -> None:
    family = families.transformer(width=32, depth=1, head_dim=8)
    assert checked(family).status == "pass"
    found = checked(family, rows(matrix("embedding.weight"), lambda row: {"lr": row.lr / row.m_out}))
    names_and_cause(found, "embedding", "input lr divided by the width")


def test_the_check_names_an_epsilon_that_is_not_scaled() -> None:
    """With an epsilon that is felt: at 1e-8 nothing here would be."""
    assert checked(families.mlp(width=32), eps=1e-2).status == "pass"
    found = checked(families.mlp(width=32), rows(lambda row: True, lambda row: {"eps": 1e-2}), eps=1e-2)
    names_and_cause(found, "hidden.0", "epsilon is not scaled")


@pytest.mark.extended
def test_the_check_names_a_bottleneck_taken_for_an_output() -> None:
    """Keys and values of one fixed head are features: with the logits' 1/m they would vanish."""
    family = families.transformer(width=32, depth=1, kv_heads=1, head_dim=8)
    assert checked(family).status == "pass"
    found = checked(family, rows(role("bottleneck"), lambda row: {"init": row.init.scaled(row.m_in**-0.5)}))
    names_and_cause(found, "blocks.0.attention.v", "shrink too fast")
    assert {"blocks.0.attention.k", "blocks.0.attention.v"} <= set(failing(found)["module"])


class Rooted(nn.Module):
    """An embedding times √width, as Gemma's, a hidden layer and a readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(families.VOCABULARY, width)
        self.hidden = nn.Linear(width, width, bias=False)
        self.readout = nn.Linear(width, families.VOCABULARY, bias=False)
        self.scale = math.sqrt(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.relu(self.hidden(self.embedding(x) * self.scale)))


def test_the_check_names_a_forward_constant_left_in(monkeypatch: pytest.MonkeyPatch) -> None:
    family = mt.Family(lambda s: Rooted(s.width), families.token_batch(), families.loss, Scale(128, 1), "rooted")
    assert checked(family).status == "pass"
    monkeypatch.setattr(builder, "_fold_constants", lambda builder: None)
    found = checked(family)
    assert found.status == "fail"
    slopes = found.slopes.set_index(["module", "statistic", "step"])["slope"]
    assert slopes["hidden", "activation", 0] == pytest.approx(0.5, abs=0.1)
    assert "a number in the forward pass grows with the width" in str(found.cause)
    assert {"embedding"}.isdisjoint(failing(found)["module"])  # what stands before the constant is as it should be


@pytest.mark.extended
def test_the_check_over_depths_names_a_missing_residual_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.transformer(width=32, depth=2, head_dim=8)

    def over_depths() -> Verdict:
        return verdict(record(family, [], "completep", depths=[2, 4, 8, 16], seeds=range(6), steps=2))

    assert over_depths().status == "pass"
    monkeypatch.setattr(builder, "_fold_branches", lambda builder: None)
    names_and_cause(over_depths(), "blocks.last", "residual branches are not scaled with the depth")


# --- mup as the oracle: what each axis grew by ---


class Uneven(nn.Module):
    """A feed-forward layer that grows faster than the width: 8x at 4x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = round(width**1.5 / 4)
        self.input, self.up = nn.Linear(64, width), nn.Linear(width, inner)
        self.down, self.readout = nn.Linear(inner, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.input(x.flatten(1)))
        return self.readout(x + self.down(torch.tanh(self.up(x))))


def uneven() -> mt.Family:
    return mt.Family(lambda s: Uneven(s.width), families.image_batch(), families.loss, Scale(16, 1), "uneven")


def grouped() -> mt.Family:
    """Grouped queries whose key heads double once while the width doubles twice."""

    def build(scale: Scale) -> nn.Module:
        heads = {16: 1, 32: 2, 64: 2}[scale.width]
        return families.transformer(head_dim=8, kv_heads=heads).build(scale)

    return replace(families.transformer(width=16), build=build)


def against_mup(family: mt.Family, optimizer: str, fault: Callable[[Observation], Observation]) -> tuple[Any, Any]:
    """Losses under a plan from a faulty observation and of mup's own optimizer, from the same weights."""
    recipe = test_oracle_mup.RECIPES[optimizer]
    scale = family.base.with_(width=4 * family.base.width)
    right = mt.plan(family, scale, "mup", optimizer, recipe)
    wrong = mt.plan(family, scale, "mup", optimizer, recipe, observation=fault(observe(family)))
    model = family.build(scale).double()
    right.initialize(model, seed=3)
    twin = test_oracle_mup.mup_twin(family, right, model, tied=False)
    ours = test_oracle_mup.losses(model, wrong.make_optimizer(model), family)
    return ours, test_oracle_mup.losses(twin, test_oracle_mup.mup_optimizer(optimizer, twin, recipe), family)


def swapped(seen: Observation) -> Observation:
    """A fan-in read where the fan-out is, as with transformers' transposed Conv1D."""
    specs = {
        name: replace(spec, axes=spec.axes[::-1]) if spec.role == "hidden" else spec
        for name, spec in seen.specs.items()
    }
    return replace(seen, specs=specs)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_mup_tells_that_fan_in_and_fan_out_are_swapped(optimizer: str) -> None:
    ours, theirs = against_mup(uneven(), optimizer, lambda seen: seen)
    assert ours == pytest.approx(theirs, rel=1e-9)
    ours, theirs = against_mup(uneven(), optimizer, swapped)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    assert ours != pytest.approx(theirs, rel=1e-4)


@pytest.mark.extended
def test_mup_tells_one_global_width_ratio_under_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = against_mup(grouped(), "sgd", lambda seen: seen)
    assert ours == pytest.approx(theirs, rel=1e-9)
    right = PlanBuilder.multipliers

    def one_ratio(self: PlanBuilder, name: str) -> tuple[float, float]:
        return tuple(self.wider if m != 1 else 1.0 for m in right(self, name))  # type: ignore[return-value]

    monkeypatch.setattr(PlanBuilder, "multipliers", one_ratio)
    ours, theirs = against_mup(grouped(), "sgd", lambda seen: seen)
    assert ours != pytest.approx(theirs, rel=1e-4)


# --- a fold against the multiplier it stands for ---


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "sgd"], "adamw"))
def test_the_explicit_model_tells_an_attention_left_at_one_over_root_d(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = folds.CASES["head dim"]
    family, plan, model, twin = folds.both(case, optimizer)
    explicit = folds.losses(twin, folds.explicit_optimizer(optimizer, case, plan, twin), family)
    assert folds.losses(model, plan.make_optimizer(model), family) == pytest.approx(explicit, rel=1e-10)
    monkeypatch.setattr(builder, "_fold_attention", lambda builder: None)
    family, plan, model, _ = folds.both(case, optimizer)
    assert folds.losses(model, plan.make_optimizer(model), family) != pytest.approx(explicit, rel=1e-4)


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "sgd"], "adamw"))
def test_the_explicit_model_tells_clipping_on_folded_gradients(optimizer: str) -> None:
    case = folds.CASES["tied"]
    clipped = {}
    for kind in ("plan's", "torch's"):
        family, plan, model, twin = folds.both(case, optimizer)

        def clip(folded: nn.Module, plan: Plan = plan, kind: str = kind) -> Any:
            plain = nn.utils.clip_grad_norm_
            return plan.clip_grad_norm_(folded, 0.1) if kind == "plan's" else plain(folded.parameters(), 0.1)

        clipped[kind] = folds.losses(model, plan.make_optimizer(model), family, clip)
    optimizer_of_twin = folds.explicit_optimizer(optimizer, case, plan, twin)
    explicit = folds.losses(
        twin, optimizer_of_twin, family, lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    )
    assert clipped["plan's"] == pytest.approx(explicit, rel=1e-10)
    assert clipped["torch's"] != pytest.approx(explicit, rel=1e-4)


class Branches(nn.Module):
    """Residual branches whose last layer has a bias, behind an explicit multiplier."""

    def __init__(self, width: int, depth: int, multiplier: float = 1.0) -> None:
        super().__init__()
        self.input, self.readout, self.multiplier = nn.Linear(64, width), nn.Linear(width, 10), multiplier
        block = lambda: nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input(x.flatten(1))
        for block in self.blocks:
            x = x + self.multiplier * block(x)
        return self.readout(x)


def branch_losses() -> tuple[list[float], list[float]]:
    """Losses of the folded model under CompleteP at 4 times the base's depth, and of the explicit one set up by hand."""
    build = lambda s: Branches(s.width, s.depth)  # noqa: E731
    family = mt.Family(build, families.image_batch(), families.loss, Scale(16, 2), "branches")
    recipe = mt.Recipe.read(folds.RECIPES["adamw"], "recipe")
    plan = mt.plan(family, Scale(16, 8), "completep", recipe=recipe)
    model, twin = build(plan.scale).double(), Branches(16, 8, 1 / 4).double()
    plan.initialize(model)
    groups = []
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        ends = name.startswith("blocks") and name.split(".")[2] == "2"
        theirs.data.copy_(ours.data * 4 if ends else ours.data)
        eps = recipe.eps / 4 if name.startswith("blocks") else recipe.eps
        groups.append({"params": [theirs], "eps": eps, "lr": recipe.lr, "weight_decay": recipe.weight_decay})
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas)
    folded = folds.losses(model, plan.make_optimizer(model), family)
    return folded, folds.losses(twin, optimizer, family)


def test_the_explicit_model_tells_a_fold_without_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    folded, explicit = branch_losses()
    assert folded == pytest.approx(explicit, rel=1e-10)
    right = PlanBuilder.fold

    def weights_only(self: PlanBuilder, names: Any, size: float = 1.0, alpha: float = 1.0) -> None:
        right(self, [name for name in names if not name.endswith("bias")], size, alpha)

    monkeypatch.setattr(PlanBuilder, "fold", weights_only)
    folded, explicit = branch_losses()
    assert folded != pytest.approx(explicit, rel=1e-4)


# --- the plan's own invariants, and the auditor ---


def products(plan: Plan) -> set[float]:
    """lr·wd of all parameters that decay: what one step takes off a weight, one number under `independent`."""
    return {float(f"{row.lr * row.weight_decay:.9e}") for row in plan.rows if row.weight_decay}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", [families.mlp, families.transformer, lambda: families.transformer(tied=True)])
def test_lr_times_wd_is_one_number_at_every_width(kind: Callable[[], mt.Family], optimizer: str) -> None:
    family = kind()
    recipe = mt.Recipe(lr=2**-7, weight_decay=0.1)
    plans = [
        mt.plan(family, family.base.with_(width=w * family.base.width), "mup", optimizer, recipe) for w in (1, 4, 16)
    ]
    assert len(set().union(*map(products, plans))) == 1
    fault = rows(
        lambda row: row.weight_decay > 0, lambda row: {"weight_decay": 0.1}
    )  # as most training scripts have it
    assert [len(products(fault(plan))) > 1 for plan in plans] == [False, True, True]
    target = family.build(plans[1].scale)
    assert audit(plans[1], live(plans[1].make_optimizer(target))).empty
    wrong = audit(plans[1], live(fault(plans[1]).make_optimizer(target)))
    assert set(wrong["setting"]) == {"weight_decay"}
    assert set(wrong["name"]) == {row.name for row in plans[1].rows if row.weight_decay and row.wd_factor != 1}
