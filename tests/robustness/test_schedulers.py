"""Schedulers that multiply keep the groups' ratios; absolute values are named, and per-group lists take their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import mutransfer as mt
from mutransfer.planning.audit import audit, live

from ..helpers import families
from ..helpers.planned import plan_of

STEPS = 100
LR = 2**-6

Optimizer = torch.optim.Optimizer
Make = Callable[[Optimizer], Any]


@pytest.fixture(scope="module")
def plan() -> mt.Plan:
    family = families.mlp(width=16)
    recipe = mt.Recipe(lr=LR, weight_decay=0.1, alpha_output=12.0)
    return plan_of(family, family.base.with_(width=64), recipe=recipe)


@pytest.fixture
def optimizer(plan: mt.Plan) -> Optimizer:
    model = families.mlp().build(plan.scale)
    plan.initialize(model)
    return plan.make_optimizer(model)


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def ratios(optimizer: Optimizer) -> list[float]:
    first, *rest = rates(optimizer)
    return [rate / first for rate in rest]


def run(optimizer: Optimizer, scheduler: Any, *metric: float) -> list[list[float]]:
    """The groups' rates over the real run, one list per step."""
    seen = [rates(optimizer)]
    for _ in range(STEPS):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        scheduler.step(*metric)
        seen.append(rates(optimizer))
    return seen


def transformers_schedule(name: str, **options: Any) -> Make:
    def make(optimizer: Optimizer) -> Any:
        from transformers import get_scheduler

        return get_scheduler(name, optimizer, 10, STEPS, scheduler_specific_kwargs=options)

    return make


MULTIPLY: dict[str, Make] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: max(0.1, min(step / 10, 1 - step / 100))),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.97),
    "StepLR": lambda o: lrs.StepLR(o, 30),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [20, 70]),
    "ConstantLR": lrs.ConstantLR,
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=50),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 100, power=2),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 100),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 20, 2),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=25),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.01, total_iters=10), lrs.CosineAnnealingLR(o, 90)], [10]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.99), lrs.StepLR(o, 40)]),
    "transformers linear": transformers_schedule("linear"),
    "transformers cosine": transformers_schedule("cosine"),
    "transformers cosine_with_min_lr": transformers_schedule("cosine_with_min_lr", min_lr=LR / 10),
    "transformers polynomial": transformers_schedule("polynomial"),
    "transformers inverse_sqrt": transformers_schedule("inverse_sqrt"),
    "transformers warmup_stable_decay": transformers_schedule("warmup_stable_decay", num_decay_steps=20),
}


@pytest.mark.parametrize("name", MULTIPLY)
def test_what_multiplies_keeps_the_ratios(name: str, plan: mt.Plan, optimizer: Optimizer) -> None:
    planned = ratios(optimizer)
    assert sum(not 0.5 < ratio < 1.5 for ratio in planned) >= 2
    scheduler = MULTIPLY[name](optimizer)
    before = copy.deepcopy(scheduler.state_dict()), rates(optimizer)
    plan.check_scheduler(scheduler)
    assert (scheduler.state_dict(), rates(optimizer)) == before, "checking steps a copy"
    seen = run(optimizer, scheduler, *([1.0] if name == "ReduceLROnPlateau" else []))
    assert len({now[0] for now in seen}) > 1
    for now in seen:
        if max(now) > 1e-12 * LR:  # a cosine ends at zero, and what rounding leaves there has no ratio
            assert [rate / now[0] for rate in now[1:]] == pytest.approx(planned, rel=1e-9)
    if name != "ReduceLROnPlateau":  # which notes no initial_lr, so that nobody can tell it from a smaller plan
        assert audit(plan, live(optimizer)).empty


def test_a_floor_given_as_a_rate_is_relative_to_the_recipes(optimizer: Optimizer) -> None:
    """transformers divides min_lr by the optimizer's default, which is therefore the recipe's and not torch's 1e-3."""
    planned = rates(optimizer)
    seen = run(optimizer, MULTIPLY["transformers cosine_with_min_lr"](optimizer))
    assert seen[-1] == pytest.approx([rate / 10 for rate in planned])


ABSOLUTE: dict[str, tuple[Make, str]] = {
    "OneCycleLR": (lambda o: lrs.OneCycleLR(o, LR, STEPS), r"OneCycleLR .*max_lr=plan\.per_group"),
    "CyclicLR": (lambda o: lrs.CyclicLR(o, LR / 10, LR), r"CyclicLR .*base_lr=plan\.per_group"),
    "CosineAnnealingLR": (lambda o: lrs.CosineAnnealingLR(o, 10**6, eta_min=LR / 100), r"CosineAnnealingLR .*eta_min"),
    "CosineAnnealingWarmRestarts": (
        lambda o: lrs.CosineAnnealingWarmRestarts(o, 10**6, eta_min=LR / 100),
        r"CosineAnnealingWarmRestarts .*eta_min=0\.0001562",
    ),
    "ReduceLROnPlateau": (lambda o: lrs.ReduceLROnPlateau(o, min_lr=LR / 10), r"ReduceLROnPlateau .*min_lr=plan"),
    "SWALR": (lambda o: SWALR(o, swa_lr=LR / 10), r"SWALR .*swa_lr=plan\.per_group"),
    "inside SequentialLR": (
        lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o), lrs.CosineAnnealingLR(o, 9**6, eta_min=1e-4)], [10]),
        r"CosineAnnealingLR .*eta_min",
    ),
    "inside ChainedScheduler": (
        lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 3), lrs.CosineAnnealingLR(o, 9**6, eta_min=1e-4)]),
        r"CosineAnnealingLR .*eta_min",
    ),
    "a lambda per group": (
        lambda o: lrs.LambdaLR(o, [lambda step, i=i: 0.9 ** (i * step) for i in range(len(o.param_groups))]),
        r"LambdaLR gives the groups .* after 1 steps",
    ),
}


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_values_are_named(name: str, plan: mt.Plan, optimizer: Optimizer) -> None:
    make, sentence = ABSOLUTE[name]
    with pytest.raises(mt.RequestError, match=sentence):
        plan.check_scheduler(make(optimizer))


class Warmup(lrs.LRScheduler):
    """Someone's own: up to an absolute peak, whatever the group's."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [base + min(self.last_epoch, 50) * 1e-5 for base in self.base_lrs]


def test_a_scheduler_nobody_knows_is_tried(plan: mt.Plan, optimizer: Optimizer) -> None:
    before = rates(optimizer)
    with pytest.raises(mt.RequestError, match=r"Warmup gives the groups .* after 1 steps"):
        plan.check_scheduler(Warmup(optimizer))
    assert rates(optimizer) == before


LISTED: dict[str, Callable[[Optimizer, Callable[[float], list[float]]], Any]] = {
    "OneCycleLR": lambda o, per: lrs.OneCycleLR(o, per(LR), total_steps=STEPS + 10, cycle_momentum=False),
    "CyclicLR": lambda o, per: lrs.CyclicLR(o, per(LR / 10), per(LR), 20, cycle_momentum=False),  # type: ignore[arg-type]
    "ReduceLROnPlateau": lambda o, per: lrs.ReduceLROnPlateau(o, patience=5, min_lr=per(LR / 500)),
    "SWALR": lambda o, per: SWALR(o, per(LR / 10), anneal_epochs=30),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", LISTED)
def test_lists_per_group_keep_the_ratios(name: str, plan: mt.Plan, optimizer: Optimizer) -> None:
    planned = ratios(optimizer)
    scheduler = LISTED[name](optimizer, lambda value: plan.per_group(optimizer, value))
    plan.check_scheduler(scheduler)
    seen = run(optimizer, scheduler, *([1.0] if name == "ReduceLROnPlateau" else []))
    for now in seen:
        assert [rate / now[0] for rate in now[1:]] == pytest.approx(planned, rel=1e-9)
    assert max(now[0] for now in seen) == pytest.approx(plan.per_group(optimizer, LR)[0])
    if name == "ReduceLROnPlateau":
        assert seen[-1] == pytest.approx(plan.per_group(optimizer, LR / 500)), "the floor was reached"
    if name in ("OneCycleLR", "SWALR"):  # the others keep no note of the rate that was planned
        assert audit(plan, live(optimizer)).empty


ENDING: dict[str, Make] = {
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [6 * group["lr"] for group in o.param_groups], total_steps=60),
    "LambdaLR over a list": lambda o: lrs.LambdaLR(o, lambda step: [1, 0.9, 0.8][step]),
    "LambdaLR over a dictionary": lambda o: lrs.LambdaLR(o, lambda step: {0: 1, 1: 0.9, 2: 0.8}[step]),
}


@pytest.mark.parametrize("name", ENDING)
def test_a_scheduler_that_ends_is_checked_to_its_end(name: str, plan: mt.Plan, optimizer: Optimizer) -> None:
    scheduler = ENDING[name](optimizer)
    plan.check_scheduler(scheduler)
    optimizer.step()
    scheduler.step()  # and from the middle of a run
    plan.check_scheduler(scheduler)


def test_what_drifts_before_its_end_or_cannot_be_stepped_is_refused(plan: mt.Plan, optimizer: Optimizer) -> None:
    apart = [[1, 1, 0.5], *[[1, 1, 1]] * (len(optimizer.param_groups) - 1)]
    with pytest.raises(mt.RequestError, match="after 2 steps"):
        plan.check_scheduler(lrs.LambdaLR(optimizer, [lambda step, each=each: each[step] for each in apart]))

    class Asking:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, loss: float) -> None:
            """Go on, by a loss that a copy cannot be given."""

    with pytest.raises(mt.RequestError, match=r"Asking cannot be tried on a copy \(TypeError"):
        plan.check_scheduler(Asking(optimizer))


def test_the_lists_are_the_planned_rates(plan: mt.Plan, optimizer: Optimizer) -> None:
    assert plan.per_group(optimizer, LR) == rates(optimizer)
    assert plan.per_group(families.mlp().build(plan.scale), LR) == rates(optimizer)


def test_at_the_base_one_number_is_right() -> None:
    family = families.mlp(width=16)
    plan = plan_of(family, family.base)
    optimizer = plan.make_optimizer(family.build(family.base))
    plan.check_scheduler(lrs.CosineAnnealingLR(optimizer, 100, eta_min=1e-4))
    plan.check_scheduler(lrs.OneCycleLR(optimizer, 1e-2, STEPS))


def test_groups_that_are_not_the_plans_are_refused(plan: mt.Plan) -> None:
    model = families.mlp().build(plan.scale)
    cases = {
        r"group 0 has no names for its": torch.optim.AdamW(model.parameters()),
        r"group 0 has parameters with \d planned": torch.optim.AdamW(model.named_parameters()),
        r"group 0 holds 'other'": torch.optim.AdamW([("other", torch.zeros(1))]),
    }
    for sentence, optimizer in cases.items():
        with pytest.raises(mt.RequestError, match=sentence):
            plan.check_scheduler(lrs.StepLR(optimizer, 3))
    with pytest.raises(mt.RequestError, match="float is not the scheduler"):
        plan.check_scheduler(0.1)


def test_tensor_rates_are_checked_alike(plan: mt.Plan) -> None:
    optimizer = plan.make_optimizer(families.mlp().build(plan.scale), tensor_lr=True, foreach=False)
    plan.check_scheduler(lrs.CosineAnnealingLR(optimizer, 100))
    with pytest.raises(mt.RequestError, match="eta_min"):
        plan.check_scheduler(lrs.CosineAnnealingLR(optimizer, 100, eta_min=1e-4))


class Heavy(torch.nn.Parameter):
    """Too large to be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Heavy:
        raise MemoryError


def test_the_copy_has_no_weights(plan: mt.Plan, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = [Heavy(parameter) for parameter in group["params"]]
    inner = [lrs.LinearLR(optimizer), lrs.CosineAnnealingLR(optimizer, 50)]
    plan.check_scheduler(lrs.SequentialLR(optimizer, inner, [10]))
    with pytest.raises(MemoryError):
        copy.deepcopy(inner[0])
