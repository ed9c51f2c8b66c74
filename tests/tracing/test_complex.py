"""Values that pass through complex numbers: rotations of queries and keys, and filters in the frequency domain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.tracing.observe import observe


def angles(x: torch.Tensor) -> torch.Tensor:
    each = 1e4 ** (-torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])
    return torch.outer(torch.arange(x.shape[1]).float(), each)[:, None]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Meta's own."""
    turns = torch.polar(torch.ones_like(angles(x)), angles(x))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def rotated_in_reals(x: torch.Tensor) -> torch.Tensor:
    cos, sin = angles(x).cos(), angles(x).sin()
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, shared: int, rotate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.head, self.rotate = width // heads, rotate
        self.norm = nn.RMSNorm(width)
        self.wq = nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, shared * self.head, bias=False) for _ in range(2))
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (each(h).unflatten(-1, (-1, self.head)) for each in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], 2) for each in (k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        weights = (q @ k.mT / self.head**0.5).softmax(-1)
        return x + self.wo((weights @ v).transpose(1, 2).flatten(2))


class Filtered(nn.Module):
    """A long convolution whose filter is made from positions, multiplied in the frequency domain (Hyena)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = nn.RMSNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.make = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, time = 2 * x.shape[1], torch.linspace(0, 1, x.shape[1])[:, None]
        filters = torch.fft.rfft(self.make(torch.cat([time, time.sin(), time.cos()], -1)), n=n, dim=0)
        mixed = torch.fft.irfft(torch.fft.rfft(self.enter(self.norm(x)), n=n, dim=1) * filters, n=n, dim=1)
        return x + self.leave(mixed[:, : x.shape[1]])


class Spectral(nn.Module):
    """A filter that is a parameter itself, as pairs of numbers, behind which nothing comes (GFNet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.filters = nn.Parameter(torch.randn(5, width, 2) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.fft.rfft(self.norm(x), dim=1, norm="ortho") * torch.view_as_complex(self.filters)
        return x + torch.fft.irfft(mixed, n=x.shape[1], dim=1, norm="ortho")


class Net(nn.Module):
    def __init__(self, scale: mt.Scale, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, scale.width)
        self.blocks = nn.ModuleList(block(scale.width) for _ in range(scale.depth))
        self.readout = nn.Linear(scale.width, 17, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def family(block: Callable[[int], nn.Module]) -> mt.Family:
    tokens = torch.arange(16).reshape(2, 8)
    loss = lambda m, b: F.cross_entropy(m(b).flatten(0, 1), b.flatten())  # noqa: E731
    return mt.Family(lambda s: Net(s, block), tokens, loss, mt.Scale(32, 2))


def attention(heads: Callable[[int], int], shared: Callable[[int], int], rotate: Any) -> mt.Family:
    return family(lambda n: Attention(n, heads(n), shared(n), rotate))


CASES: dict[str, Any] = {
    "fixed heads": (lambda n: 4, lambda n: 4, mt.Scale(128, 2), "mup"),
    "fixed key-value heads": (lambda n: n // 8, lambda n: 2, mt.Scale(128, 2), "mup"),
    "depth": (lambda n: n // 8, lambda n: n // 8, mt.Scale(32, 8), "depth-mup"),
    "both": (lambda n: 4, lambda n: 2, mt.Scale(64, 8), "completep"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rotation_of_complex_numbers_is_planned_as_the_real_one(case: str) -> None:
    heads, shared, scale, table = CASES[case]
    a, b = (mt.plan(attention(heads, shared, each), scale, table) for each in (rotated, rotated_in_reals))
    assert a == b


def test_what_the_plan_of_a_rotation_says() -> None:
    @functools.cache
    def planned(case: str) -> mt.Plan:
        heads, shared, scale, table = CASES[case]
        return mt.plan(attention(heads, shared, rotated), scale, table)

    def row(case: str, name: str) -> Any:
        return next(each for each in planned(case).rows if each.name == f"blocks.0.{name}.weight")

    assert [row("fixed heads", name).gauge for name in ("wq", "wk")] == [0.5, 1.0]
    assert [row("fixed key-value heads", name).role for name in ("wk", "wv")] == ["bottleneck", "bottleneck"]
    assert [row("depth", name).lr_factor for name in ("wq", "wk", "wv")] == [0.5, 0.5, 0.5]


def test_filters_in_the_frequency_domain() -> None:
    found = observe(family(Filtered)).specs
    inside = {name.removeprefix("blocks.0.") for name, spec in found.items() if spec.inside and "blocks.0." in name}
    assert inside == {name.removeprefix("blocks.0.") for name in found if "blocks.0." in name}
    assert {name for name, spec in found.items() if spec.ends_branch and "blocks.0." in name} == {
        "blocks.0.leave.weight",
        "blocks.0.leave.bias",
    }


def test_a_filter_of_complex_numbers_ends_its_branch() -> None:
    spec = observe(family(Spectral)).specs["blocks.1.filters"]
    assert (spec.role, spec.axes[:2], spec.inside, spec.ends_branch) == ("input", ("each", "each"), True, True)
