"""Models that leave parts out at random, whoever draws the numbers: the same answer each time, of all parts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt

X, Y = torch.randn(16, 20), torch.randint(0, 5, (16,))

DRAWS: dict[str, Callable[[], bool]] = {
    "random": lambda: random.random() < 0.5,
    "numpy": lambda: np.random.rand() < 0.5,
    "default_rng": lambda: np.random.default_rng().random() < 0.5,
    "own Random": lambda: random.Random().random() < 0.5,
    "torch": lambda: bool(torch.rand(()) < 0.5),
    "own Generator": lambda: bool(torch.rand((), generator=GENERATOR) < 0.5),
    "never seeded": lambda: UNSEEDED.random() < 0.5,
}
GENERATOR, UNSEEDED = torch.Generator(), np.random.default_rng()


class Drop(nn.Module):
    """Leaves out its second layer, or takes another one in its place."""

    def __init__(self, width: int, draw: Callable[[], bool], instead: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, width), nn.Linear(width, width), nn.Linear(width, 5)
        self.other = nn.Linear(width, width) if instead else nn.Identity()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        return self.c(F.relu(self.b(x)) if self.draw() else self.other(x))


def planned(draw: Callable[[], bool], instead: bool = False) -> mt.Plan:
    of = mt.Family(
        lambda s: Drop(s.width, draw, instead), (X, Y), lambda m, b: F.cross_entropy(m(b[0]), b[1]), mt.Scale(64)
    )
    return mt.plan(of, mt.Scale(256))


@pytest.mark.parametrize("instead", [False, True])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_what_is_left_out_at_random_is_planned(draw: Callable[[], bool], instead: bool) -> None:
    always = planned(lambda: True)
    found = planned(draw, instead)
    assert [row for row in found.rows if not row.name.startswith("other")] == list(always.rows)
    assert {row.role for row in found.rows if row.name == "other.weight"} <= {"hidden"}


def test_what_eight_passes_left_out_is_waited_for() -> None:
    count = itertools.count()
    found = planned(lambda: next(count) >= 20)
    assert list(found.rows) == list(planned(lambda: True).rows)
    (note,) = found.notes
    assert "skipped at random, used in " in note


@pytest.mark.parametrize("name", [name for name in DRAWS if name not in ("never seeded", "own Generator")])
def test_same_answer_each_time(name: str) -> None:
    answers = set()
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        answers.add(str(planned(DRAWS[name])))
    assert len(answers) == 1


def test_what_is_random_is_said_to_be() -> None:
    (note,) = planned(DRAWS["random"]).notes
    assert note.startswith("b.weight, b.bias: skipped at random, used in ")
    assert not planned(lambda: True).notes


class Stochastic(nn.Module):
    """Residual branches that are skipped at random (stochastic depth, Huang et al. 1603.09382)."""

    def __init__(self, width: int, depth: int, skips: bool) -> None:
        super().__init__()
        self.embedding, self.readout = nn.Embedding(11, width), nn.Linear(width, 11)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            if not self.skips or random.random() < 0.7:
                h = h + block(h)
        return self.readout(h)


def test_stochastic_depth() -> None:
    def of(skips: bool) -> tuple[object, ...]:
        tokens = torch.randint(11, (2, 7))
        family = mt.Family(
            lambda s: Stochastic(s.width, s.depth, skips), tokens, lambda m, x: m(x).square().mean(), mt.Scale(16, 2)
        )
        return mt.plan(family, mt.Scale(32, 8), "completep").rows

    assert of(True) == of(False)
