"""Stacked seeds are separate seeds: the same sizes to the last digits of float64, whatever the neighbours do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import mutransfer as mt
from mutransfer.coord_check import record, stacked
from mutransfer.optimizers.rules import OPTIMIZERS

from ..helpers import families


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many seeds each lane holds."""
    found: list[int] = []
    init = stacked.StackedModels.__init__

    def noting(self: stacked.StackedModels, family: mt.Family, models: Any, *rest: Any) -> None:
        found.append(len(models))
        init(self, family, models, *rest)

    monkeypatch.setattr(stacked.StackedModels, "__init__", noting)
    return found


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def double(family: mt.Family) -> mt.Family:
    return replace(family, batch=tuple(each.double() if each.is_floating_point() else each for each in family.batch))


class Normed(nn.Module):
    """Batch norm, whose running averages move in every pass, and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.norm, self.drop = nn.Linear(64, width), nn.BatchNorm1d(width), nn.Dropout(0.0)
        self.readout = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.drop(torch.relu(self.norm(self.input(x.flatten(1))))))


def normed() -> mt.Family:
    return mt.Family(lambda s: Normed(s.width), families.image_batch(), families.loss, mt.Scale(16), "normed")


KINDS = {
    "mlp": lambda: families.mlp(width=16),
    "transformer": lambda: families.transformer(width=16, head_dim=8),
    "tied": lambda: families.transformer(width=16, head_dim=8, tied=True),
    "resnet": lambda: families.resnet(width=8),
    "normed": normed,
}


def separately(family: mt.Family, **options: Any) -> pd.DataFrame:
    most, stacked.MOST_STACKED = stacked.MOST_STACKED, 0
    try:
        return record(family, **options)
    finally:
        stacked.MOST_STACKED = most


ENTRYWISE = [name for name, rule in OPTIMIZERS.items() if rule.entrywise and rule.home == "torch.optim"]


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_seeds_are_separate_seeds(
    kind: str, monkeypatch: pytest.MonkeyPatch, sizes: list[int], float64: None
) -> None:
    family = double(KINDS[kind]())
    base = family.base.width
    options: dict[str, Any] = {"widths": [base, 2 * base], "seeds": range(3), "steps": 3, "lr": 0.05}
    sizes: list[int] = []
    init = stacked.StackedModels.__init__
    monkeypatch.setattr(
        stacked.StackedModels,
        "__init__",
        lambda self, f, models, *a: sizes.append(len(models)) or init(self, f, models, *a),
    )
    together = record(family, **options)
    assert sizes == [3, 3]  # one lane for all seeds of a width
    apart = separately(family, **options)
    assert sizes == [3, 3, 1, 1, 1, 1, 1, 1]
    key = ["module", "statistic", "step", "seed", "width"]
    together, apart = (each.sort_values(key).reset_index(drop=True) for each in (together, apart))
    pd.testing.assert_frame_equal(together, apart, rtol=1e-10)


@pytest.mark.parametrize("optimizer", ENTRYWISE)
def test_every_entrywise_optimizer_steps_stacks_as_it_does_models(optimizer: str, float64: None) -> None:
    family = double(families.mlp(width=8, depth=2))
    options: dict[str, Any] = {"widths": [8, 16], "optimizer": optimizer, "seeds": range(2), "steps": 3}
    together, apart = record(family, **options), separately(family, **options)
    key = ["module", "statistic", "step", "seed", "width"]
    together, apart = (each.sort_values(key).reset_index(drop=True) for each in (together, apart))
    pd.testing.assert_frame_equal(together, apart, rtol=1e-10)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_what_looks_at_whole_matrices_is_not_stacked(optimizer: str, sizes: list[int]) -> None:
    record(families.mlp(width=16), [16, 32], optimizer=optimizer, seeds=range(2), steps=1)
    assert sizes == [1, 1, 1, 1]


class Branching(nn.Module):
    """Control flow on values, which vmap cannot carry."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.readout = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.input(x.flatten(1)))
        if not isinstance(h, FakeTensor) and float(h.detach().sum()) < 0:
            h = -h
        return self.readout(h)


def test_a_model_that_cannot_be_stacked_runs_seed_by_seed(sizes: list[int]) -> None:
    family = mt.Family(lambda s: Branching(s.width), families.image_batch(), families.loss, mt.Scale(16), "branching")
    found = record(family, [16, 32], seeds=range(2), steps=1)
    assert set(found["seed"]) == {0, 1}
    assert sizes == [2, 1, 1, 2, 1, 1]  # tried, and given up


def test_a_seed_that_blows_up_leaves_its_neighbours_alone() -> None:
    family = families.mlp(width=16)

    def planner(*args: Any, **options: Any) -> mt.Plan:
        plan = mt.plan(*args, **options)
        initialize = mt.Plan.initialize

        class Spoiling(mt.Plan):
            def initialize(self, model: nn.Module, seed: int = 0) -> None:
                initialize(self, model, seed)
                if seed == 1:
                    model.readout.weight.data.fill_(float("nan"))

        return Spoiling(**vars(plan))

    spoiled = record(family, [16, 32], seeds=range(3), steps=2, planner=planner)
    healthy = record(family, [16, 32], seeds=range(3), steps=2)
    assert spoiled[spoiled["seed"] == 1]["value"].isna().any()
    for seed in (0, 2):
        ours, others = (each[each["seed"] == seed].reset_index(drop=True) for each in (spoiled, healthy))
        pd.testing.assert_frame_equal(ours, others)


def tied_in_a_class_of_its_own(scale: mt.Scale) -> nn.Module:
    class Tied(nn.Module):  # a builder may define it, so that no two models have the same class
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(17, scale.width), nn.LayerNorm(scale.width)
            self.mixed = nn.Linear(scale.width, scale.width).requires_grad_(False)
            self.readout = nn.Linear(scale.width, 17, bias=False)
            self.readout.weight = self.embed.weight
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.readout(self.norm(self.mixed(self.embed(x))))

    return Tied()


def test_a_stack_holds_what_its_models_hold() -> None:
    """Tied matrices once, frozen ones without a gradient, and models whose builder defines their class each time."""
    models = [tied_in_a_class_of_its_own(mt.Scale(8)) for _ in range(3)]
    family = mt.Family(tied_in_a_class_of_its_own, families.token_batch(), families.loss, mt.Scale(8))
    stack = stacked.StackedModels(
        family,
        models,
        lambda model: torch.optim.SGD(each for each in model.parameters() if each.requires_grad),
        family.batch,
    )
    names = [name for name, _ in models[0].named_parameters()]
    assert list(stack.parameters) == names
    assert "readout.weight" not in names
    for name in names:
        assert stack.parameters[name].is_leaf
        assert stack.parameters[name].requires_grad == models[0].get_parameter(name).requires_grad
        for i, model in enumerate(models):
            assert torch.equal(stack.parameters[name][i], model.get_parameter(name))
    assert {name: (each.dtype, tuple(each.shape)) for name, each in stack.buffers.items()} == {
        "count": (torch.long, (3,))
    }
    losses, _ = stack.forward(stacked.Watched({}, {}), None, None)
    alone = torch.stack([families.loss(each, family.batch) for each in models])
    torch.testing.assert_close(losses, alone)
    stack.backward(losses)
    for i, (model, loss) in enumerate(zip(models, alone, strict=True)):
        (grad,) = torch.autograd.grad(loss, model.embed.weight, retain_graph=True)
        torch.testing.assert_close(stack.parameters["embed.weight"].grad[i], grad)
