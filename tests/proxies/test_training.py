"""The one training loop: resumed runs are uninterrupted runs, schedules keep the groups' ratios, divergence is told."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mutransfer as mt
from mutransfer.proxies.data.base import Batch
from mutransfer.proxies.training import Outcome, Training, multiplier, scheduler, train
from mutransfer.recipe import Scale

from ..helpers import families
from ..helpers.blobs import Blobs, blobs
from ..helpers.planned import plan_of

SCHEDULES = ["constant", "cosine", "linear", "wsd"]


def training(family: mt.Family | None = None, steps: int = 20, optimizer: str = "adamw", **recipe: Any) -> Training:
    family = family or families.mlp(width=16)
    settings_ = mt.Recipe.read({"lr": 0.01, "weight_decay": 0.1 if optimizer != "adam" else 0.0} | recipe, "recipe")
    plan = plan_of(family, family.base.with_(width=2 * family.base.width), "mup", optimizer, settings_)
    kind = "tokens" if family.name == "transformer" else "images"
    return Training(family, plan, blobs(kind), steps=steps, batch_size=8, seed=3)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one: Training, other: Training) -> bool:
    a, b = one.state_dict(), other.state_dict()
    flat_a, flat_b = (torch.utils._pytree.tree_leaves(state) for state in (a, b))
    return len(flat_a) == len(flat_b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(flat_a, flat_b, strict=True)
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("model", ["mlp", "resnet", "transformer"])
def test_a_resumed_run_is_the_uninterrupted_one(model: str, optimizer: str) -> None:
    def fresh() -> Training:
        return training(getattr(families, model)(), steps=12, optimizer=optimizer, clip=0.5, schedule="wsd")

    whole = fresh()
    whole.advance(12)
    before = fresh()
    before.advance(5)
    resumed = fresh()
    resumed.advance(2)  # something else than what is loaded
    resumed.load_state_dict(through_a_file(before.state_dict()))
    assert resumed.step == 5
    resumed.advance(12)
    assert same(resumed, whole)
    assert resumed.validate() == whole.validate()
    assert not same(before, whole)


def test_validation_and_rungs_do_not_disturb_the_run() -> None:
    plain, watched = training(), training()
    train(plain)
    train(watched, rungs=(3, 4, 11), report=lambda step, loss: False)
    assert same(plain, watched)


def test_the_seed_is_that_of_weights_and_data() -> None:
    one, same_seed, other = training(), training(), training()
    other = Training(other.family, other.plan, other.data, steps=20, batch_size=8, seed=4)
    for run in (one, same_seed, other):
        run.advance(3)
    assert same(one, same_seed)
    assert not same(one, other)


def test_training_learns() -> None:
    run = training(steps=60)
    outcome = train(run)
    assert outcome.steps == run.step == 60
    assert outcome.loss < 0.5 * outcome.start
    assert not outcome.diverged
    assert not outcome.stopped
    assert outcome.start == training(steps=60).validate()
    assert outcome.loss == run.validate()
    assert outcome.seconds > 0


def test_validation_weights_batches_by_their_size() -> None:
    class Uneven(Blobs):
        def validation(self) -> list[Batch]:
            return [self.batch(1, 30, 0), self.batch(2, 2, 0)]

    run = training()
    run.data = Uneven(name="uneven", sha256="0", facts={}, inputs=1, classes=10, kind="images")
    (x1, y1), (x2, y2) = run.data.validation()
    whole = families.loss(run.model, (torch.cat((x1, x2)), torch.cat((y1, y2)))).item()
    assert run.validate() == pytest.approx(whole, rel=1e-6)


def test_rungs_are_reported_in_order_and_can_stop_the_run() -> None:
    seen: list[tuple[int, float]] = []

    def report(step: int, loss: float) -> bool:
        seen.append((step, loss))
        return step == 11

    run = training()
    outcome = train(run, rungs=(11, 4, 4, 0, 15, 20, 25), report=report)
    assert [step for step, _ in seen] == [4, 11]
    assert outcome.stopped
    assert outcome.steps == run.step == 11
    assert outcome.loss == seen[-1][1] == run.validate()
    seen.clear()
    finished = train(training(), rungs=(5,), report=report)
    assert (finished.stopped, finished.steps, len(seen)) == (False, 20, 1)


def test_a_loss_that_is_not_finite_is_divergence() -> None:
    run = training(lr=1e30, optimizer="sgd", steps=40)
    outcome = train(run, rungs=(30,), report=lambda step, loss: False)
    assert outcome.diverged
    assert not math.isfinite(outcome.loss)
    assert run.step < 40  # no time spent on a dead run
    assert math.isnan(run.validate())


def test_worse_than_the_start_is_divergence() -> None:
    outcome = Outcome(loss=1.0, start=2.0, steps=1, stopped=False, seconds=0.0)
    assert not outcome.diverged
    assert not replace(outcome, loss=2.0).diverged
    for loss in (2.01, math.nan, math.inf):
        assert replace(outcome, loss=loss).diverged
    worse = train(training(lr=2.0, schedule="constant", warmup=0.0, steps=5))
    assert math.isfinite(worse.loss)
    assert worse.diverged


def test_clipping_is_the_plans() -> None:
    clipped, free = (training(clip=clip, optimizer="sgd", weight_decay=0.0) for clip in (1e-3, None))
    start = {name: parameter.clone() for name, parameter in free.model.named_parameters()}
    clipped.advance(1)
    free.advance(1)

    def moved(run: Training) -> float:
        return sum((p - start[name]).norm().item() for name, p in run.model.named_parameters())

    assert moved(clipped) < 0.1 * moved(free)


RECIPES = st.builds(
    mt.Recipe,
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 0.5),
    cooldown=st.floats(0.01, 0.5),
    final=st.floats(0, 1),
)


@given(RECIPES, st.integers(1, 300))
def test_every_schedule_warms_up_then_never_rises(recipe: mt.Recipe, steps: int) -> None:
    values = [multiplier(recipe, step, steps) for step in range(steps + 1)]
    warm = round(recipe.warmup * steps)
    assert values[:warm] == pytest.approx([(i + 1) / (warm + 1) for i in range(warm)])
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    assert all(a >= b - 1e-12 for a, b in zip(values[warm:], values[warm + 1 :], strict=False))
    assert all(value > 0 for value in values[:-1])  # no step is wasted
    assert values[-1] == pytest.approx(1.0 if recipe.schedule == "constant" else recipe.final, abs=1e-12)


def test_shapes_by_hand() -> None:
    def values(**recipe: Any) -> list[float]:
        return [multiplier(mt.Recipe(**recipe), step, 10) for step in range(11)]

    assert values(schedule="constant", warmup=0.3) == [0.25, 0.5, 0.75] + 8 * [1]
    assert values(schedule="linear", warmup=0, final=0) == pytest.approx([1 - i / 10 for i in range(11)])
    assert values(schedule="linear", warmup=0, final=0.5)[5] == 0.75
    cosine = values(schedule="cosine", warmup=0.2)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert cosine[6] == pytest.approx(0.5)
    stable = values(schedule="wsd", warmup=0.2, cooldown=0.4, final=0.1)
    assert stable[2:7] == 5 * [1]
    assert stable[7:] == pytest.approx([0.775, 0.55, 0.325, 0.1])


@settings(max_examples=20, deadline=None)
@given(RECIPES)
def test_the_ratios_between_groups_never_change(recipe: mt.Recipe) -> None:
    peaks = [0.5, 0.01, 3e-5]
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in peaks]
    optimizer = torch.optim.SGD(groups)
    schedule = scheduler(optimizer, recipe, 30)
    for step in range(30):
        shares = [group["lr"] / peak for group, peak in zip(optimizer.param_groups, peaks, strict=True)]
        assert shares == pytest.approx(3 * [multiplier(recipe, step, 30)], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_a_run_follows_its_schedule() -> None:
    run = training(steps=10, schedule="wsd", warmup=0.2, cooldown=0.3)
    peaks = {row.name: row.lr for row in run.plan.rows}
    for step in range(10):
        for group in run.optimizer.param_groups:
            for name in group["param_names"]:
                assert group["lr"] == pytest.approx(peaks[name] * multiplier(run.plan.recipe, step, 10), rel=1e-12)
        run.advance(step + 1)
    run.advance(12)  # beyond its length a run stays at the last learning rate
    assert run.optimizer.param_groups[0]["lr"] > 0


def test_training_is_in_train_mode_and_validation_is_not() -> None:
    class Noisy(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.modes: list[bool] = []
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.modes.append(self.training)
            return self.layers(x)

    family = mt.Family(lambda s: Noisy(s.width), families.image_batch(), families.loss, Scale(16))
    run = training(family)
    run.advance(2)
    run.validate()
    run.advance(3)
    assert run.model.modes == [True, True, False, False, True]  # type: ignore[comparison-overlap]
