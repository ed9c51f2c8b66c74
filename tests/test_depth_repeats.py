"""Each stack of residual branches has its own ratio over depth, and one that is there once keeps 1; the check sees if not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.coord_check import record
from mutransfer.coord_check.verdicts import verdict
from mutransfer.tracing.specs import Observation

T = torch.randint(11, (2, 7))


class Block(nn.Module):
    """A residual branch with the sum, or the branch alone."""

    def __init__(self, width: int, adds: bool = True) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.adds = adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.down(F.gelu(self.up(self.norm(x))))
        return x + made if self.adds else made


class Adapter(nn.Module):
    """Another residual branch, of a fixed rank."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 5), nn.Linear(5, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(torch.tanh(self.into(x)))


def stack(width: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(number)))


class Around(nn.Module):
    """Embedding, parts by name, final norm, readout."""

    def __init__(self, width: int, **parts: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.parts = nn.ModuleDict(parts)
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for part in self.parts.values():
            x = part(x)
        return self.readout(self.norm(x))


class Shared(nn.Module):
    """One layer, used as often as the model is deep (ALBERT)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.block, self.depth = Block(width), depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.depth):
            x = self.block(x)
        return x


class Stacked(nn.Module):
    """Layers as an axis of one parameter."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(depth, width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weight:
            x = x + torch.tanh(x) @ weight
        return x


def family(build: Callable[[int, int], nn.Module], depth: int = 2) -> mt.Family:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return mt.Family(lambda s: build(s.width, s.depth), T, loss, mt.Scale(16, depth))


def in_one_list(width: int, depth: int) -> nn.Module:
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(
        nn.Embedding(11, width), Adapter(width), *blocks, nn.LayerNorm(width), Adapter(width), nn.Linear(width, 11)
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[int, int], nn.Module], dict[str, float]]] = {
    "behind": (
        lambda n, d: Around(n, blocks=stack(n, d), last=Adapter(n)),
        {"parts.blocks.1.down": 4, "parts.last.out": 1},
    ),
    "in front": (
        lambda n, d: Around(n, first=Adapter(n), blocks=stack(n, d)),
        {"parts.first.out": 1, "parts.blocks.0.down": 4},
    ),
    "of the layers' own kind": (
        lambda n, d: Around(n, blocks=stack(n, d), last=Block(n)),
        {"parts.blocks.0.down": 4, "parts.last.down": 1},
    ),
    "fixed encoder": (
        lambda n, d: Around(n, encoder=stack(n, 3), decoder=stack(n, d)),
        {"parts.encoder.2.down": 1, "parts.decoder.0.down": 4},
    ),
    "two stacks": (
        lambda n, d: Around(n, encoder=stack(n, d + 2), decoder=stack(n, d)),
        {"parts.encoder.0.down": 2.5, "parts.decoder.1.down": 4},
    ),
    "stages": (
        lambda n, d: Around(n, stages=nn.Sequential(stack(n, 2), stack(n, d), stack(n, d // 2))),
        {"parts.stages.0.1.down": 1, "parts.stages.1.0.down": 4, "parts.stages.2.0.down": 4},
    ),
    "one list": (in_one_list, {"1.out": 1, "2.down": 4}),
    "shared": (
        lambda n, d: Around(n, shared=Shared(n, d), last=Adapter(n)),
        {"parts.shared.block.down": 4, "parts.last.out": 1},
    ),
    "stacked": (
        lambda n, d: Around(n, stacked=Stacked(n, d), last=Adapter(n)),
        {"parts.stacked": 4, "parts.last.out": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "ratios"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("name", "power"), [("completep", 1.0), ("depth-mup", 0.5)])
def test_every_stack_has_its_own_ratio(
    build: Callable[[int, int], nn.Module], ratios: dict[str, float], name: str, power: float
) -> None:
    rows = {row.name: row for row in mt.plan(family(build), mt.Scale(16, 8), name).rows}
    for module, ratio in ratios.items():
        row = rows[f"{module}.weight"]
        assert row.init_factor == pytest.approx(ratio**-power)
        assert row.lr_factor == pytest.approx(1 / ratio)


def test_deep_base_is_watched_in_part_only() -> None:
    build = CASES["fixed encoder"][0]
    rows = {row.name: row for row in mt.plan(family(build, 12), mt.Scale(16, 24), "completep").rows}
    assert [rows[f"parts.{each}.down.weight"].init_factor for each in ("encoder.2", "decoder.20")] == [1, 0.5]


def test_layers_of_another_kind_count_with_their_stack() -> None:
    """Every fifth layer is an adapter, of which 5 and 10 layers have one and two: both kinds are twice as many."""
    kinds = lambda n, d: [Adapter(n) if i % 5 == 4 else Block(n) for i in range(d)]  # noqa: E731
    build = lambda n, d: Around(n, layers=nn.Sequential(*kinds(n, d)))  # noqa: E731
    rows = {row.name: row for row in mt.plan(family(build, 5), mt.Scale(16, 9), "completep").rows}
    assert {rows[f"parts.layers.{each}.weight"].init_factor for each in ("0.down", "4.out")} == {5 / 9}


def test_recipe_reaches_branches_that_are_not_repeated() -> None:
    recipe = mt.Recipe(alpha_residual=0.5)
    rows = mt.plan(family(CASES["behind"][0]), mt.Scale(16, 8), "completep", recipe=recipe).rows
    gauge = {row.name: row.gauge for row in rows}
    assert (gauge["parts.last.out.weight"], gauge["parts.blocks.0.down.weight"]) == (0.5, 0.125)


def as_before(seen: Observation) -> Observation:
    """Take every branch for one that depth repeats."""
    return replace(seen, specs={name: replace(each, layer=(), rounds=(0.0, 1.0)) for name, each in seen.specs.items()})


@pytest.mark.parametrize("wrong", [False, True])
def test_check_over_depths_sees_a_branch_that_shrinks(wrong: bool) -> None:
    def planner(*args: Any, observation: Observation, **options: Any) -> mt.Plan:
        return mt.plan(*args, observation=as_before(observation) if wrong else observation, **options)

    of = family(CASES["behind"][0])
    frame = record(of, [32], "completep", depths=[2, 4, 8, 16], seeds=range(3), steps=2, planner=planner)
    slopes = verdict(frame).slopes
    mine = slopes[slopes["module"].eq("parts.last.out") & slopes["statistic"].eq("activation")]
    assert mine["slope"].iloc[0] == pytest.approx(-1 if wrong else 0, abs=0.15)
    assert mine["ok"].eq(not wrong).all()
    assert (verdict(frame).status == "fail") == wrong
