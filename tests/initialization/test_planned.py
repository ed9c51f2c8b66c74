"""Recorded initializations in a plan: at the target, from a file, in parts, and refused by the parameter's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.initialization.init import Program

from ..helpers import families
from ..helpers.watched import N, seen


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: torch.empty(N), "torch.empty, never filled"),
        (lambda: torch.empty(N, 2).t()[0].normal_()._base, "torch.empty, only partly filled"),
        (
            lambda: torch.from_numpy(np.random.default_rng(0).normal(size=100_000)),
            "a table of 100000 numbers from outside",
        ),
    ],
)
def test_what_cannot_be_drawn_again_is_named(build: Callable[[], torch.Tensor], said: str) -> None:
    found = seen(build)
    assert found == said


def test_a_refusal_names_the_parameter() -> None:
    class Unfilled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.empty(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    family = mt.Family(lambda s: Unfilled(s.width), torch.zeros(1), lambda m, x: m(x).sum(), mt.Scale(width=16))
    with pytest.raises(RequestError, match=r"how gain \[16\] is initialized \(torch.empty, never filled\)"):
        mt.plan(family, family.base)


@pytest.mark.parametrize(
    "steps",
    [
        [{"op": "os.system.default", "args": ["true"], "kwargs": {}, "results": []}],
        [{"op": "aten.from_file.default", "args": ["/etc/passwd"], "kwargs": {}, "results": []}],
        [{"op": "aten.randn.default", "args": 3, "kwargs": {}, "results": []}],
        [{"op": "aten.randn.no_such", "args": [], "kwargs": {}, "results": []}],
        [{"op": "aten.randn"}],
        3,
    ],
)
def test_a_plan_from_a_file_runs_aten_operations_only(steps: Any) -> None:
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        Program.from_dict({"sizes": [4], "steps": steps, "result": [0, "float32", [1], [1], 0]})


class Special(nn.Module):
    """An embedding with a padding row, orthogonal matrices, a table and a bias of a state space, a truncated readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width, padding_idx=2)
        self.hidden = nn.Linear(width, width)
        self.readout = nn.Linear(width, 3, bias=False)
        self.table = nn.Parameter(torch.log(torch.arange(1, width + 1).float()))
        self.mix = nn.Linear(width, width, bias=False)
        self.marks = nn.Parameter(torch.zeros(width))
        nn.init.eye_(self.mix.weight)
        with torch.no_grad():
            for i in range(0, width, 8):
                self.marks[i] = 1
        nn.init.orthogonal_(self.hidden.weight, gain=2)
        nn.init.orthogonal_(self.readout.weight)
        self.hidden.bias.data.copy_(torch.exp(torch.rand(width)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.readout(self.mix(self.hidden(self.embedding(tokens)).relu() * self.table) + self.marks)


SPECIAL = mt.Family(
    lambda s: Special(s.width),
    torch.zeros(2, 3, dtype=torch.long),
    lambda m, x: m(x).square().mean(),
    mt.Scale(width=16),
)


def test_special_initializations_at_the_target(tmp_path: Path) -> None:
    """Matrices have the base's measured std times the factor; tables, padding rows and odd biases are the target's own."""
    plan = mt.Plan.load(mt.plan(SPECIAL, mt.Scale(width=N)).save(tmp_path / "plan.json"))
    model = SPECIAL.build(plan.scale)
    plan.initialize(model, seed=1)
    weights, rows = dict(model.named_parameters()), {row.name: row for row in plan.rows}
    own = 2 / math.sqrt(16)  # an orthogonal matrix: every column has length 2
    assert rows["hidden.weight"].init.std == pytest.approx(own / 2, rel=0.02)
    assert weights["hidden.weight"].std().item() == pytest.approx(own / 2, rel=0.02)
    gram = weights["hidden.weight"] @ weights["hidden.weight"].T
    assert torch.allclose(gram / gram[0, 0], torch.eye(N), atol=1e-5)
    # The readout's own std at the target is 1/√64; µP wants the base's 1/√16 over 4.
    assert weights["readout.weight"].std(correction=0).item() == pytest.approx(1 / 4 / 4, rel=0.02)
    assert torch.equal(weights["table"], torch.log(torch.arange(1, N + 1).float()))
    assert torch.equal(weights["mix.weight"], torch.eye(N))
    assert torch.equal(weights["marks"], (torch.arange(N) % 8 == 0).float())
    assert rows["table"].init_factor is None
    assert (weights["embedding.weight"] == 0).all(1).tolist() == [False, False, True, False, False, False, False]
    assert 1 <= weights["hidden.bias"].min() < 1.2 < 2.5 < weights["hidden.bias"].max() < math.e


class Outside(nn.Module):
    """Draws that torch's distributions do not have: a norm taken out, orthogonal rows, numbers that numpy drew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        numbers = np.random.default_rng(0)
        self.embedding = nn.Embedding.from_pretrained(F.normalize(torch.rand(40, width), dim=1), freeze=False)
        self.first = nn.Linear(16, width, bias=False)
        self.start = nn.Parameter(F.normalize(torch.randn(width), dim=0))
        self.hidden, self.mix = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.readout = nn.Linear(width, 3, bias=False)
        self.slopes = nn.Parameter(torch.from_numpy(np.linspace(1, 2, width)).float())
        nn.init.orthogonal_(self.first.weight, 2**0.5)
        self.mix.weight.data.copy_(torch.from_numpy(np.eye(width)))
        for linear in (self.hidden, self.readout):
            linear.weight.data.copy_(torch.from_numpy(numbers.normal(scale=0.02, size=linear.weight.shape)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.start + self.first(F.one_hot(tokens % 16, 16).float())
        return self.readout(self.mix(self.hidden(x).relu()) * self.slopes)


@pytest.mark.parametrize("width", [32, 128])
def test_every_matrix_has_the_base_models_own_std_times_the_factor(width: int) -> None:
    """Whatever drew it, and however the draw itself follows the width: only what is drawn can be, a table stays."""
    family = mt.Family(
        lambda s: Outside(s.width), torch.zeros(2, 3, dtype=torch.long), lambda m, x: m(x).square().mean(), mt.Scale(32)
    )
    torch.manual_seed(0)
    base, plan = family.build(family.base), mt.plan(family, mt.Scale(width))
    model = family.build(plan.scale)
    plan.initialize(model)
    weights, rows, m = dict(model.named_parameters()), {row.name: row for row in plan.rows}, width / 32
    factors = {"embedding.weight": 1, "first.weight": 1, "start": 1, "hidden.weight": m**-0.5, "readout.weight": 1 / m}
    for name, factor in factors.items():
        expected = base.get_parameter(name).std(correction=0).item() * factor
        assert weights[name].std(correction=0).item() == pytest.approx(expected, rel=0.03), name
        assert rows[name].init.std == pytest.approx(expected, rel=0.03), name
        assert rows[name].init_factor == pytest.approx(factor), name
    torch.testing.assert_close(weights["mix.weight"], torch.eye(width), rtol=1e-6, atol=0)
    assert torch.equal(weights["slopes"], torch.linspace(1, 2, width, dtype=torch.float64).float())
    assert rows["slopes"].init_factor is None


def test_pieces_that_come_and_go_with_the_width_are_refused() -> None:
    class Pieces(nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            with torch.no_grad():
                for i in range(0, self.out_features, 8):
                    self.weight[i] = 0

    family = families.mlp()

    def build(scale: mt.Scale) -> nn.Module:
        width = scale.width
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), Pieces(width, width), nn.Linear(width, 10))

    family = mt.Family(build, family.batch, family.loss, mt.Scale(width=16))
    assert mt.plan(family, family.base).rows[2].init.parts[1].box[0] == (8, 1, 1)
    with pytest.raises(
        RequestError, match=r"2.weight \[32, 32\] is initialized in 3 pieces in the base and 5 in the target"
    ):
        mt.plan(family, mt.Scale(width=32))


def test_a_model_without_memory_is_refused() -> None:
    plan = mt.plan(SPECIAL, SPECIAL.base)
    with torch.device("meta"):
        model = SPECIAL.build(plan.scale)
    with pytest.raises(RequestError, match=r"table is on the meta device: call model.to_empty"):
        plan.initialize(model)
    plan.initialize(model.to_empty(device="cpu"))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_type_of_the_parameters_does_not_change_the_draw() -> None:
    plan = mt.plan(SPECIAL, SPECIAL.base)
    single, half = SPECIAL.build(plan.scale), SPECIAL.build(plan.scale).bfloat16()
    plan.initialize(single)
    plan.initialize(half)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, single.get_parameter(name).bfloat16()), name
