"""Every optimizer's rule: the class it makes, what stays constant, what is refused; Muon beside AdamW as one object."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.optimizers import muon
from mutransfer.optimizers.muon import MuonWithAdamW
from mutransfer.optimizers.rules import OPTIMIZERS, REFUSED
from mutransfer.planning.audit import audit, live

from ..helpers import families
from ..helpers.planned import plan_of

L2_INSIDE = ("adam", "adamax", "rmsprop", "adagrad")
BROUGHT = ("lion", "signum")
MUONS = ("muon", "muon-match-rms-adamw")
RULES = ["mup", "completep", "depth-mup", "ntk", "spectral", "umup", "sp"]


def planned(optimizer: str, parametrization: str = "mup", **values: Any) -> tuple[mt.Family, mt.Plan]:
    """Keys and values of one fixed head, so that every role is there; four times the width, twice the depth."""
    family = families.transformer(width=16, head_dim=8, kv_heads=1)
    decay = {} if optimizer in L2_INSIDE else {"weight_decay": 0.1, "decay": "all"}
    recipe = mt.Recipe.read({"lr": 2**-6, **decay, **values}, "recipe")
    return family, plan_of(family, mt.Scale(64, 4), parametrization, optimizer, recipe)


@pytest.mark.parametrize("parametrization", RULES)
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in L2_INSIDE])
def test_lr_times_decay_is_constant(optimizer: str, parametrization: str) -> None:
    """Whatever shrinks a weight in one step is that of the base, for every role, with folds and without."""
    family, plan = planned(optimizer, parametrization, alpha_residual=2)
    base = plan_of(family, family.base, parametrization, optimizer, plan.recipe)
    shrinks = {row.name: row for row in base.rows}
    assert {row.role for row in plan.rows} >= {"input", "hidden", "bottleneck", "output", "vector"}
    for row in plan.rows:
        like = shrinks[row.name.replace("blocks.2", "blocks.0").replace("blocks.3", "blocks.1")]
        found, expected = row.lr * row.weight_decay, like.lr * like.weight_decay
        if optimizer == "adafactor-hf":  # decays relative to the weights' own size, which its epsilon follows
            found, expected = found * (row.eps or 0), expected * (like.eps or 0)
        if parametrization == "sp" and optimizer == "adafactor-hf":
            continue  # one setting for all, whatever the sizes
        assert found == pytest.approx(expected, rel=1e-9), row


class Sign(torch.optim.Optimizer):
    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign() * group["lr"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_runs_and_is_as_planned(optimizer: str) -> None:
    family, plan = planned(optimizer)
    model = family.build(plan.scale)
    plan.initialize(model)
    made = plan.make_optimizer(model, Sign if optimizer in BROUGHT else None)
    assert len(audit(plan, live(made))) == 0
    before = family.loss(model, family.batch)
    for _ in range(4):
        made.zero_grad()
        family.loss(model, family.batch).backward()
        made.step()
    assert family.loss(model, family.batch) < before
    made.param_groups[0]["lr"] *= 1.01
    assert len(audit(plan, live(made))) > 0
    assert mt.Plan.from_dict(plan.as_dict()) == plan


@pytest.mark.parametrize("optimizer", BROUGHT)
def test_a_class_that_torch_lacks_is_asked_for(optimizer: str) -> None:
    family, plan = planned(optimizer)
    with pytest.raises(RequestError, match=r"pass yours to plan\.make_optimizer\(model, cls=\.\.\.\)"):
        plan.make_optimizer(family.build(plan.scale))


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [
        ("adagrad", {"initial_accumulator_value": 0.1}),
        ("adamw", {"lr": 1.0}),
        ("adafactor-hf", {"relative_step": True}),
    ],
)
def test_what_the_plan_sets_is_no_option(optimizer: str, option: dict[str, Any]) -> None:
    family, plan = planned(optimizer)
    with pytest.raises(RequestError, match=f"{next(iter(option))} is set by the plan"):
        plan.make_optimizer(family.build(plan.scale), **option)


@pytest.mark.parametrize("optimizer", L2_INSIDE)
def test_l2_inside_an_adaptive_step_is_refused(optimizer: str) -> None:
    with pytest.raises(RequestError, match=r"with weight_decay 0\.1 is L2 regularization.*use adamw"):
        planned(optimizer, weight_decay=0.1)


@pytest.mark.parametrize("name", [*REFUSED, "RAdam", "SparseAdam", "Adadelta", "LBFGS", "Rprop"])
def test_the_refused_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(
        RequestError, match=rf"{name} has no rule that transfers \(.+\): use adamw, or one of .*nadam.*sgd"
    ):
        planned(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adamww", "did you mean 'adamw'"),
        ("AdamW", "did you mean 'adamw'"),
        ("SGD", "did you mean 'sgd'"),
        ("shampoo", "known names are"),
    ],
)
def test_an_unknown_optimizer_is_refused_with_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"no scaling rule is known for the optimizer '{name}': {hint}"):
        planned(name)


@pytest.mark.parametrize(
    ("optimizer", "read"),
    [
        ("adamw", {"betas", "eps"}),
        ("sgd", {"momentum"}),
        ("asgd", set()),
        ("rmsprop", {"betas", "momentum", "eps"}),
        ("adagrad", {"eps"}),
        ("lion", {"betas"}),
        ("adafactor", {"eps2"}),
        ("adafactor-unscaled", set()),
        ("muon", {"betas", "momentum", "eps", "adamw_lr_ratio"}),
    ],
)
def test_what_an_optimizer_reads_of_the_recipe(optimizer: str, read: set[str]) -> None:
    recipe, rule = mt.Recipe(), OPTIMIZERS[optimizer]
    others = {"momentum": 0.5, "betas": (0.5, 0.5), "eps": 0.5, "eps2": 0.5, "adamw_lr_ratio": 0.5}
    assert {
        name for name, value in others.items() if rule.reads(recipe.with_(**{name: value})) != rule.reads(recipe)
    } == read


def test_adafactor_says_where_torch_caps_it() -> None:
    assert any("caps every lr at 1/√step" in note for note in planned("adafactor")[1].notes)
    assert not any("caps" in note for note in planned("adafactor-hf")[1].notes)


class Mlp(nn.Module):
    """Two hidden matrices, one stored as [out, in] and one as [in, out], whose sides grow differently."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.input, self.readout = nn.Linear(8, width), nn.Linear(width, 10)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Parameter(torch.randn(inner, width) / inner**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(F.relu(F.relu(self.up(F.relu(self.input(x)))) @ self.down))


@pytest.mark.parametrize(
    ("optimizer", "up", "down"),
    [
        # up: [out, in] = [32, 16] → [512, 64], m_in 4, m_out 16; the class's own √2 → √8, or 0.2·√(32 → 512)
        # down: [in, out], the sides the other way round: the class reads √(512/64) where √(64/512) is meant
        ("muon", 2 / (8 / 2) ** 0.5, 0.5 / (8 / 2) ** 0.5),
        ("muon-match-rms-adamw", 2 / 4, 0.5 / 4),
    ],
)
def test_muons_rate_undoes_the_classes_own_factor(optimizer: str, up: float, down: float) -> None:
    batch = torch.randn(4, 8), torch.arange(4)
    family = mt.Family(lambda s: Mlp(s.width, s.width**2 // 8), batch, families.loss, mt.Scale(16, 1))
    plan = plan_of(family, mt.Scale(64, 1), "mup", optimizer)
    lrs = {row.name: row.lr_factor for row in plan.rows}
    assert (lrs["up.weight"], lrs["down"]) == pytest.approx((up, down), rel=1e-12)
    assert lrs["readout.weight"] == 1 / 4


def test_what_muon_leaves_to_adamw_has_a_rate_of_its_own() -> None:
    _, plan = planned("muon", adamw_lr_ratio=0.25)
    _, adamw = planned("adamw")
    for row, other in zip(plan.rows, adamw.rows, strict=True):
        if row.role != "hidden":
            assert (row.lr, row.eps) == (other.lr / 4, other.eps)


def muon_run(made: torch.optim.Optimizer, model: nn.Module, family: mt.Family, steps: int) -> list[float]:
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
    seen = []
    for _ in range(steps):

        def closure() -> torch.Tensor:
            made.zero_grad()
            loss = family.loss(model, family.batch)
            loss.backward()
            return loss

        seen.append(made.step(closure).item())  # type: ignore[arg-type, union-attr]
        schedule.step()
    return seen


def iterating_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon iterates in ``dtype`` whatever the processor."""
    monkeypatch.setattr(muon, "bfloat16_is_slow", lambda device: dtype is torch.float32)


@pytest.mark.parametrize("optimizer", MUONS)
def test_muon_beside_adamw_equals_the_two_apart(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    iterating_in(torch.bfloat16, monkeypatch)
    family, plan = planned(optimizer)
    model = family.build(plan.scale)
    plan.initialize(model)
    twin = copy.deepcopy(model)
    made = plan.make_optimizer(model)
    together = muon_run(made, model, family, 5)
    groups = plan.param_groups(twin)
    parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in groups:
        parts[group.pop("muon")].append(group)
    two = torch.optim.Muon(parts[True]), torch.optim.AdamW(parts[False])
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in two]
    apart = []
    for _ in range(5):
        twin.zero_grad()
        loss = family.loss(twin, family.batch)
        loss.backward()
        for each, schedule in zip(two, schedules, strict=True):
            each.step()
            schedule.step()
        apart.append(loss.item())
    assert together == apart
    assert isinstance(made, torch.optim.Optimizer)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_float32_steps_as_torchs_within_bfloat16s_rounding(
    shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, whose steps float32 follows to the rounding of the parameters, and torch's to bfloat16's 8 bits."""
    iterating_in(torch.float32, monkeypatch)
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    made: list[tuple[nn.Parameter, torch.optim.Optimizer]] = [
        (ours, MuonWithAdamW([{"params": [ours], "muon": True, **settings}])),
        (theirs, torch.optim.Muon([theirs], **settings)),
    ]
    for gradient in gradients:
        for parameter, optimizer in made:
            parameter.grad = gradient.clone()
            optimizer.step()
    exact, buffer = start.double(), torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        buffer = buffer.lerp(gradient.double(), 0.1)
        direction = gradient.double().lerp(buffer, 0.9) if nesterov else buffer
        a, b, c = muon.Muon([theirs]).defaults["ns_coefficients"]
        x = direction / direction.norm()
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        exact = exact * (1 - 0.02 * 0.1) - 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * x
    moved = (exact - start).norm()
    assert (ours - exact).norm() < 5e-5 * moved
    assert 5e-4 * moved < (theirs - exact).norm() < 2e-2 * moved
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_muon_beside_adamw_resumes(how: str) -> None:
    family, plan = planned("muon")
    model = family.build(plan.scale)
    plan.initialize(model)
    made = plan.make_optimizer(model, nesterov=False)
    muon_run(made, model, family, 3)
    if how == "state_dict":
        file = io.BytesIO()
        torch.save([model.state_dict(), made.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        again = family.build(plan.scale)
        again.load_state_dict(weights)
        resumed = plan.make_optimizer(again, nesterov=False)
        resumed.load_state_dict(state)
    else:
        again, resumed = copy.deepcopy((model, made))
    assert muon_run(resumed, again, family, 3) == muon_run(made, model, family, 3)


def test_muon_takes_only_matrices_and_known_options() -> None:
    vector = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        MuonWithAdamW([{"params": [vector], "muon": True}])
    with pytest.raises(ValueError, match="'fuzed'"):
        MuonWithAdamW([{"params": [vector]}], fuzed=True)
    made = MuonWithAdamW([{"params": [vector]}], betas=(0.5, 0.6))
    made.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "muon": True, "lr": 0.1})
    assert [group["muon"] for group in made.param_groups] == [False, True]
    assert made.param_groups[0]["betas"] == (0.5, 0.6)
    assert "betas" not in made.param_groups[1]


@pytest.mark.parametrize(
    ("optimizer", "lr", "eps"),
    [("adamw", 4, 1), ("adafactor", 2, 2), ("adafactor-unscaled", 4, None), ("sgd", 4, None)],
)
def test_sparse_hidden_layers_follow_supar(optimizer: str, lr: float, eps: float | None) -> None:
    """Density 1/4: initial variance and Adam's rate ∝ 1/(m_in·m_ρ), SGD's ∝ 1/m_ρ on top (SµPar 2405.15743)."""
    family, dense = planned(optimizer)
    sparse = mt.plan(family, dense.scale, "mup", optimizer, dense.recipe, densities={"*.ffn.*.weight": 1 / 4})
    changed = 0
    for before, after in zip(dense.rows, sparse.rows, strict=True):
        if ".ffn." not in before.name:
            assert after == before
            continue
        changed += 1
        assert after.init.std == pytest.approx(2 * before.init.std)
        assert after.lr == pytest.approx(lr * before.lr)
        assert after.lr * after.weight_decay == pytest.approx(before.lr * before.weight_decay)
        assert after.eps == (None if eps is None else pytest.approx(eps * (before.eps or 0)))
    assert changed == 12
    assert any("SµPar" in note and "(12 parameters)" in note for note in sparse.notes)


@pytest.mark.parametrize(
    ("densities", "parametrization", "optimizer", "message"),
    [
        ({"readout.weight": 0.5}, "mup", "adamw", "readout.weight has the role output: leave it dense"),
        ({"*.ffn.*": 0.5}, "sp", "adamw", "sp with adamw has no such rule"),
        ({"*.ffn.*": 0.5}, "mup", "muon", "mup with muon has no such rule"),
        ({"nothing.*": 0.5}, "mup", "adamw", r"no parameter matches 'nothing\.\*'"),
        ({"*.ffn.*": 0.0}, "mup", "adamw", "give a number greater than 0"),
    ],
)
def test_sparsity_without_a_rule_is_refused(
    densities: dict[str, float], parametrization: str, optimizer: str, message: str
) -> None:
    family, plan = planned("adamw")
    with pytest.raises(RequestError, match=message):
        mt.plan(family, plan.scale, parametrization, optimizer, densities=densities)


def test_spectral_caps_the_initial_std_by_the_shape() -> None:
    """min(1, √(out/in))/√in with 10 logits: 1/√in while the width is below them, √10/in beyond."""
    batch = torch.randn(4, 8), torch.arange(4)
    family = mt.Family(lambda s: Mlp(s.width, 4 * s.width), batch, families.loss, mt.Scale(4, 1))
    for width, capped in ((8, 1.0), (40, (10 / 40) ** 0.5)):
        rows = {row.name: row for row in plan_of(family, mt.Scale(width, 1), "spectral").rows}
        m = width / 4
        assert rows["readout.weight"].init_factor == pytest.approx(m**-0.5 * capped)
        assert rows["up.weight"].init_factor == rows["down"].init_factor == pytest.approx(m**-0.5)
        assert rows["input.weight"].init_factor == pytest.approx((min(1, width / 8) / min(1, 4 / 8)) ** 0.5)
