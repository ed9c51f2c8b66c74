"""Which sums are residual: not a modulation by pieces of one value, and each of two streams that add to each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

import mutransfer as mt
from mutransfer.planning.plan import ParameterPlan
from mutransfer.tracing.dataflow import ValueGraph, meet
from mutransfer.tracing.observe import observe
from mutransfer.tracing.ops import Value


def ffn(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Modulated(nn.Module):
    """DiT's block: scale, shift and gate of both branches are chunks of one layer's result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = nn.MultiheadAttention(width, 4, batch_first=True), ffn(width)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def pieces(self, c: torch.Tensor) -> Any:
        return self.ada(c)[:, None].chunk(6, -1)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.pieces(c)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Tabled(Modulated):
    """PixArt's block: what the whole model makes of the condition, and a table of the block's own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.ada
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def pieces(self, c: torch.Tensor) -> Any:
        return (self.table + c.unsqueeze(1).repeat(1, 6, 1)).chunk(6, 1)


class Diffusion(nn.Module):
    def __init__(self, scale: mt.Scale, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.enter, self.time, self.leave = (
            nn.Linear(6, scale.width),
            nn.Linear(5, scale.width),
            nn.Linear(scale.width, 6),
        )
        self.norm = nn.LayerNorm(scale.width)
        self.blocks = nn.ModuleList(block(scale.width) for _ in range(scale.depth))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h, c = self.enter(x), self.time(time)
        for block in self.blocks:
            h = block(h, c)
        return self.leave(self.norm(h))


def diffusion(block: Callable[[int], nn.Module]) -> mt.Family:
    torch.manual_seed(0)
    batch = torch.randn(4, 7, 6), torch.randn(4, 5)
    loss = lambda m, b: (m(*b) - b[0]).square().mean()  # noqa: E731
    return mt.Family(lambda s: Diffusion(s, block), batch, loss, mt.Scale(32, 2))


@pytest.mark.parametrize("block", [Modulated, Tabled])
def test_branches_under_a_modulation(block: Callable[[int], nn.Module]) -> None:
    planned = {row.name: row for row in mt.plan(diffusion(block), mt.Scale(32, 8), "completep").rows}

    def factors(row: ParameterPlan) -> tuple[float, float, float | None]:
        return row.gauge, row.lr_factor, row.eps_factor

    for i in range(8):
        for end in ("attn.out_proj.weight", "attn.out_proj.bias", "mlp.2.weight", "mlp.2.bias"):
            assert factors(planned[f"blocks.{i}.{end}"]) == (0.25, 0.25, 1.0)
        for name in ("attn.in_proj_weight", "mlp.0.weight", "ada.1.weight" if block is Modulated else "table"):
            assert factors(planned[f"blocks.{i}.{name}"]) == (1.0, 1.0, 0.25)
    for name in ("enter.weight", "time.weight", "norm.weight", "leave.weight"):
        assert factors(planned[name]) == (1.0, 1.0, 1.0)


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.g = ffn(width), ffn(width)


class Reversible(nn.Module):
    """Two streams, of which each is added what a branch made of the other."""

    def __init__(self, scale: mt.Scale, enter: str, leave: str) -> None:
        super().__init__()
        self.first, self.second, self.readout = (nn.Linear(n, scale.width) for n in (5, 5, 5))
        self.readout = nn.Linear((2 if leave == "cat" else 1) * scale.width, 3)
        self.blocks = nn.ModuleList(Two(scale.width) for _ in range(scale.depth))
        self.enter, self.leave = enter, leave
        if enter != "two":
            del self.second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = b = self.first(x)
        if self.enter == "two":
            b = self.second(x)
        if self.enter == "halves":
            a, b = b.chunk(2, 0)
        for block in self.blocks:
            a = a + block.f(b)
            b = b + block.g(a)
            if self.enter == "halves":
                a, b = torch.cat([a, b], 0).chunk(2, 0)
        return self.readout(torch.cat([a, b], -1) if self.leave == "cat" else a + b)


@pytest.mark.parametrize(("enter", "leave"), [*itertools.product(["one", "two", "halves"], ["cat", "sum"])])
def test_two_streams(enter: str, leave: str) -> None:
    family = mt.Family(
        lambda s: Reversible(s, enter, leave), torch.randn(4, 7, 5), lambda m, x: m(x).square().mean(), mt.Scale(16, 3)
    )
    found = observe(family).specs
    blocks = {name for name in found if name.startswith("blocks.")}
    assert {name for name, spec in found.items() if spec.inside} == blocks
    assert {name for name, spec in found.items() if spec.ends_branch} == {
        name for name in blocks if name.split(".")[3] == "2"
    }


def test_a_branch_added_to_a_part_of_its_stream() -> None:
    """A causal convolution without padding, as in WaveNet."""

    class Net(nn.Module):
        def __init__(self, scale: mt.Scale) -> None:
            super().__init__()
            self.first, self.readout = nn.Conv1d(5, scale.width, 1), nn.Conv1d(scale.width, 3, 1)
            self.layers = nn.ModuleList(nn.Conv1d(scale.width, scale.width, 2) for _ in range(scale.depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = x[..., 1:] + layer(x.relu())
            return self.readout(x)

    found = observe(mt.Family(Net, torch.randn(4, 5, 9), lambda m, x: m(x).square().mean(), mt.Scale(16, 2))).specs
    assert {name for name, spec in found.items() if spec.ends_branch} == {n for n in found if n.startswith("layers.")}
    assert {name for name, spec in found.items() if spec.inside} == {n for n in found if n.startswith("layers.")}


@given(some.data())
def test_pieces_meet_where_they_have_an_entry_in_common(data: some.DataObject) -> None:
    whole = torch.arange(60).reshape(3, 4, 5)

    def piece() -> torch.Tensor:
        found = whole
        for dim in range(3):
            start = data.draw(some.integers(0, found.shape[dim] - 1))
            stop = data.draw(some.integers(start + 1, found.shape[dim]))
            index = [slice(None)] * 3
            index[dim] = slice(start, stop, data.draw(some.integers(1, 2)))
            found = found[tuple(index)]
        return found.permute(data.draw(some.permutations(range(3))))

    a, b = piece(), piece()
    graph = ValueGraph()
    whole_node = graph.add([])
    nodes = [graph.piece(Value.of(each), whole_node) for each in (a, b)]
    if whole_node not in nodes:
        regions = [graph.pieces[node][1] for node in nodes]
        assert meet(*regions) == bool({*a.flatten().tolist()} & {*b.flatten().tolist()})
