"""The learning rate that a first step shows: exact, whatever the model, its wrappers and the optimizer do beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.coord_check import judge_coordinates, record, verdict
from mutransfer.coord_check.diagnosis import plant_in
from mutransfer.coord_check.measure import module_roles

from ..helpers import families
from ..helpers.sets import extended_but
from .test_updates import SharedElsewhere

RATE = 2**-8


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, without an epsilon: a step is the sign's, or weight decay's alone where there is no gradient."""

    def __init__(self, groups: Any, lr: float = 1e-3, weight_decay: float = 0.0, betas: Any = (0.9, 0.99)) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    each.mul_(1 - group["lr"] * group["weight_decay"]).add_(each.grad.sign(), alpha=-group["lr"])


def recorded(
    family: mt.Family,
    width: int,
    seed: int = 0,
    *,
    optimizer: str = "adamw",
    recipe: mt.Recipe | None = None,
    planner: Callable[..., mt.Plan] = mt.plan,
    make: Callable[[Any], torch.optim.Optimizer] | None = None,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    closure: bool = False,
    steps: int = 1,
) -> pd.DataFrame:
    """A loop of one's own under a recorder."""
    scale, recipe = family.base.with_(width=width), recipe or mt.Recipe(lr=RATE)
    plan = planner(family, scale, "mup", optimizer, recipe)
    model = family.build(scale)
    plan.initialize(model, seed)
    model = prepare(model)
    inner: Any = model
    chosen = make(plan.param_groups(model)) if make else plan.make_optimizer(model)

    def gradients() -> torch.Tensor:
        chosen.zero_grad()
        loss = family.loss(inner, family.batch)
        loss.backward()
        return loss

    with mt.Recorder(inner, chosen, lambda m: m(family.batch[0]), plan=plan, seed=seed) as recorder:
        for _ in range(steps):
            if closure:
                chosen.step(gradients)
            else:
                gradients()
                chosen.step()
    return recorder.frame()


def rates(frame: pd.DataFrame) -> pd.Series:
    rows = frame[frame["statistic"].eq("step") & frame["step"].eq(1)]
    return rows.set_index("module")["value"]


class Scaled(nn.Module):
    """ReZero's way: a branch under one number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.branch, self.readout = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x.flatten(1)))
        return self.readout(h + self.scale * torch.relu(self.branch(h)))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_parameter_of_one_number_has_a_rate(optimizer: str, seeds: int) -> None:
    made = mt.Family(lambda s: Scaled(s.width), families.image_batch(), families.loss, mt.Scale(32), "scaled")
    found = record(made, [32, 64], "mup", optimizer, lr=RATE, seeds=range(seeds), steps=1)
    assert rates(found)["scale"].to_numpy() == pytest.approx([RATE] * 2 * seeds, rel=2e-3)  # 1 + a little
    assert verdict(record(made, [32, 64, 128], "mup", optimizer, seeds=range(4), steps=2)).status != "fail"


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("power", [0.0, -0.5])
def test_a_wrapper_around_wide_models_hides_no_rate(power: float) -> None:
    """Theirs alone are wrong, and the narrow ones spoke for all."""
    made = families.mlp(width=32)
    frames = [
        recorded(made, width, seed, planner=plant_in("hidden.1.weight", power, mt.plan), prepare=Wrapped, steps=2)
        if width > 64
        else recorded(made, width, seed, steps=2)
        for width in (32, 64, 128, 256, 512)
        for seed in range(3)
    ]
    frame = pd.concat(frames)
    assert frame[frame["statistic"].eq("step")].groupby("module")["width"].nunique().eq(5).all()
    found = verdict(frame)
    assert found.status == "fail" if power else found.status != "fail", found.cause


def test_a_rate_that_some_runs_do_not_show_does_not_count() -> None:
    """What its module makes of the update is then all there is, and has to hold by itself."""
    planner = plant_in("hidden.1.weight", -0.5, mt.plan)
    made = families.mlp(width=32)
    frame = record(made, [32, 64, 128, 256], seeds=range(8), steps=2, planner=planner)
    narrow = frame[~(frame["statistic"].eq("step") & frame["width"].gt(64) & frame["module"].eq("hidden.1.weight"))]
    found = verdict(narrow).slopes
    own = found[found["module"].eq("hidden.1.weight")]
    assert set(own["statistic"]) == {"weight", "decay", "update", "gradient"} - ({"gradient"} - {*own["statistic"]})
    assert not own[own["statistic"].eq("update")]["ok"].fillna(False).any()


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "adam", "sgd"], "adamw"))
@pytest.mark.parametrize("power", [-0.5, 0.5])
@pytest.mark.parametrize("parameter", ["readout.weight", "hidden.0.weight", "input.weight"])
def test_a_wrong_rate_is_not_given_away_by_its_decay(parameter: str, power: float, optimizer: str) -> None:
    """A readout that learnt √m too slowly passed under Adam, as its logits may fade as much."""
    made = families.mlp(width=32)
    planner = plant_in(parameter, power, mt.plan)
    found = judge_coordinates(made, [32, 64, 128, 256], "mup", optimizer, seeds=5, steps=2, planner=planner).verdict
    assert found.slopes[found.slopes["statistic"].eq("decay")]["ok"].fillna(False).all()
    assert found.status == "fail"
    assert parameter in str(found.cause)


def test_half_precision_shows_no_rate() -> None:
    """bfloat16's largest step is one unit in the last place of the largest weight: a healthy model read +0.25."""
    made = families.mlp(width=32)
    half = mt.Family(made.build, (made.batch[0].bfloat16(), made.batch[1]), made.loss, made.base, "mlp")
    frames = [
        recorded(half, width, seed, recipe=mt.Recipe(lr=2**-9), prepare=lambda model: model.bfloat16())
        for width in (32, 64, 128, 256)
        for seed in range(2)
    ]
    found = verdict(pd.concat(frames))
    assert found.slopes["statistic"].ne("step").all()
    assert found.status != "fail", found.cause


def test_a_step_below_the_last_digit_shows_no_rate() -> None:
    """A gain of 1 that moves by 1e-7 moves by 0 or by one digit, at any rate."""
    made = mt.Family(lambda s: Scaled(s.width), families.image_batch(), families.loss, mt.Scale(32), "scaled")
    found = record(made, [32, 64], "mup", "sgd", lr=1e-6, seeds=range(2), steps=1)
    assert "scale" not in set(rates(found).index)


def with_zero_readout(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.readout.weight.zero_()  # type: ignore[union-attr, operator]
    return model


def test_weight_decay_alone_is_no_step() -> None:
    """Behind a readout of zeros nothing has a gradient at first; Lion's decay moved it all the same, by its initial size."""
    for width in (32, 128):
        found = recorded(
            families.mlp(width=32), width, optimizer="lion", recipe=mt.Recipe(lr=RATE, weight_decay=0.1), make=Lion,
            prepare=with_zero_readout,
        )  # fmt: skip
        assert rates(found)["hidden.1.weight"] == 0
        assert rates(found)["readout.weight"] == pytest.approx(RATE, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "nadam"])
def test_decoupled_weight_decay_is_no_part_of_the_step(optimizer: str) -> None:
    """Under a weight decay that grows as the rates fall the widest hidden layer read 24% more than the narrowest."""
    found = [
        rates(recorded(families.mlp(width=32), width, optimizer=optimizer, recipe=mt.Recipe(lr=RATE, weight_decay=0.5)))
        for width in (32, 512)
    ]
    assert found[1]["hidden.1.weight"] == pytest.approx(found[0]["hidden.1.weight"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_closure_shows_the_same_rates(optimizer: str) -> None:
    """Lightning steps so: the gradients come inside of the step."""
    made = families.mlp(width=32)
    plain, within = (recorded(made, 64, optimizer=optimizer, closure=closure, steps=2) for closure in (False, True))
    pd.testing.assert_frame_equal(plain, within)
    assert rates(within).to_numpy() == pytest.approx(RATE, rel=1e-3)


def test_an_embedding_with_sparse_gradients_is_recorded() -> None:
    class Sparse(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.tokens, self.readout = nn.Embedding(50, width, sparse=True), nn.Linear(width, 50)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.readout(self.tokens(x))

    batch = torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    made = mt.Family(lambda s: Sparse(s.width), batch, families.loss, mt.Scale(32), "sparse")
    found = recorded(made, 64, optimizer="sgd", make=torch.optim.SGD)
    assert rates(found)["tokens.weight"] == pytest.approx(RATE, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_tied_parameters_rate_stands_beside_its_update(optimizer: str) -> None:
    tokens = torch.randint(11, (4, 5))
    made = mt.Family(lambda s: SharedElsewhere(s.width), (tokens, tokens), families.loss, mt.Scale(32), "tied")
    found = record(made, [32, 64], "mup", optimizer, seeds=[0], steps=1)
    updates, steps = (set(found[found["statistic"].eq(each)]["module"]) for each in ("update", "step"))
    assert "tokens.weight" in updates
    assert "shared.weight" not in updates | steps
    assert steps == (updates if optimizer == "sgd" else {"readout.weight"})


class Timewise(nn.Module):
    """Keeps what it wraps under the name ``module``, as DataParallel does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.module = nn.Linear(64, width)
        self.body = Wrapped(nn.Linear(width, width))
        self.readout = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.relu(self.body(torch.relu(self.module(x.flatten(1))))))


def test_a_submodule_that_is_called_module_is_no_wrapper() -> None:
    """Its layers were taken for readouts, whose outputs may fade."""
    made = mt.Family(lambda s: Timewise(s.width), families.image_batch(), families.loss, mt.Scale(32), "timewise")
    assert module_roles(made.build(made.base), mt.plan(made, made.base)) == {
        "module": "input", "body.module": "hidden", "readout": "output"
    }  # fmt: skip
    found = record(made, [32, 64, 128], seeds=range(2), steps=1)
    assert {"module", "body.module", "readout", "module.weight", "body.module.weight"} <= set(found["module"])
    wrapped = pd.concat([recorded(made, width, prepare=Wrapped) for width in (32, 64)])
    assert set(found[found["statistic"].eq("update")]["module"]) == set(
        wrapped[wrapped["statistic"].eq("update")]["module"]
    )
