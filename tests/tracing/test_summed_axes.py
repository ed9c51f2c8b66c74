"""What is summed decides the role: also where it is a product that is summed, or only a part of an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import ParamSpec


class Ending(nn.Module):
    """Two layers, then one ``weight`` used by ``apply``; with ``readout`` also that, otherwise what comes is the output."""

    def __init__(self, width: int, weight: torch.Tensor, apply: Callable[..., torch.Tensor], readout: bool) -> None:
        super().__init__()
        self.first = nn.Linear(5, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.weight = nn.Parameter(weight)
        self.readout = nn.Linear(width, 3, bias=False) if readout else nn.Identity()
        self.apply_weight = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.apply_weight(self.second(self.first(x)), self.weight))


def family(shape: Callable[[int], tuple[int, ...]], apply: Callable[..., torch.Tensor], readout: bool) -> Family:
    return Family(
        lambda s: Ending(s.width, torch.randn(shape(s.width)), apply, readout), torch.zeros(2, 7, 5),
        lambda model, x: model(x).square().mean(), Scale(16),
    )  # fmt: skip


def spec(
    shape: Callable[[int], tuple[int, ...]], apply: Callable[..., torch.Tensor], readout: bool = False
) -> ParamSpec:
    return observe(family(shape, apply, readout)).specs["weight"]


def vector(n: int) -> tuple[int, ...]:
    return (n,)


def matrix(n: int) -> tuple[int, ...]:
    return (3, n)


READOUTS: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[..., torch.Tensor]]] = {
    "one output": (vector, lambda x, w: (x * w).sum(-1)),
    "three": (matrix, lambda x, w: (x[..., None, :] * w).sum(-1)),
    "vecdot": (vector, torch.linalg.vecdot),
    "dropped out, masked, cooled": (
        vector, lambda x, w: (F.dropout(x * w, 0.1).masked_fill(x > 9, 0) * (x < 9) / 8).float().sum(-1, keepdim=True),
    ),
    "times another activation": (vector, lambda x, w: (x * w * x.relu()).sum(-1)),
    "axes turned": (lambda n: (n, 3), lambda x, w: (x[..., None] * w).sum(-2)),
}  # fmt: skip


@pytest.mark.parametrize("way", READOUTS)
def test_multiply_and_sum_is_a_readout(way: str) -> None:
    shape, apply = READOUTS[way]
    found = spec(shape, apply)
    assert found.role == "output"
    assert found.multipliers(tuple(4 * n if n == 16 else n for n in found.shape)) == (4, 1)


def test_an_attention_vector_per_head() -> None:
    """As in a graph attention network: its entries are summed, its heads are not."""

    def apply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x.unflatten(-1, (w.shape[1], -1))
        scores = F.leaky_relu((h * w).sum(-1))
        return (h * scores.softmax(1)[..., None]).flatten(-2)

    assert spec(lambda n: (1, 4, n // 4), apply, readout=True).multipliers((1, 4, 16)) == (4, 1)
    assert spec(lambda n: (1, 4, n // 4), apply, readout=True).role == "output"
    assert spec(lambda n: (1, n // 4, 4), apply, readout=True).multipliers((1, 16, 4)) == (1, 4)
    assert spec(lambda n: (1, n // 4, 4), apply, readout=True).role == "input"


def test_multiply_and_sum_between_layers() -> None:
    found = spec(lambda n: (n, n), lambda x, w: (x[..., None, :] * w).sum(-1), readout=True)
    assert (found.role, found.axes) == ("hidden", ("each", "in"))
    assert spec(vector, lambda x, w: x * (x * w).sum(-1, keepdim=True), readout=True).role == "bottleneck"


@pytest.mark.parametrize(
    "apply",
    [
        lambda x, w: (x * w).mean(-1),  # divided by the width: an entry's share is as small as a gain's
        lambda x, w: (x * w).square().sum(-1),
        lambda x, w: x * w - (x * w).sum(1, keepdim=True),
        lambda x, w: (lambda h: h - h.sum(-1, keepdim=True) / 16)(x * w),
    ],
    ids=["mean", "squares", "over positions", "centred"],
)
def test_a_gain_whose_sum_is_a_statistic_stays_a_gain(apply: Callable[..., torch.Tensor]) -> None:
    assert spec(vector, apply).role == "vector"


def test_the_last_factor_before_the_sum_is_the_readout() -> None:
    class Gained(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Linear(5, width, bias=False)
            self.gain, self.readout = (nn.Parameter(torch.randn(width)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.first(x) * self.gain * self.readout).sum(-1)

    of = Family(lambda s: Gained(s.width), torch.zeros(2, 5), lambda m, x: m(x).square().mean(), Scale(16))
    found = {name: spec.role for name, spec in observe(of).specs.items()}
    assert found == {"first.weight": "input", "gain": "vector", "readout": "output"}


class Transposed(nn.Module):
    def __init__(self, width: int, **groups: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(5, width, 3)
        self.up = nn.ConvTranspose1d(width, width, 2, **groups)
        self.head = nn.Conv1d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.first(x)))


@pytest.mark.parametrize(
    ("groups", "role", "m"),
    [
        (lambda n: n, "input", (1, 4)),
        (lambda n: n // 4, "input", (1, 4)),
        (lambda n: 16, "hidden", (4, 4)),  # depthwise at the base, and only there
        (lambda n: 4, "hidden", (4, 4)),
    ],
    ids=["depthwise", "fixed group width", "sixteen groups", "four groups"],
)
def test_transposed_convolutions_in_groups(groups: Callable[[int], int], role: str, m: tuple[int, int]) -> None:
    """Within groups of fixed width the fan-in does not grow, though the weight's first axis does."""
    of = Family(
        lambda s: Transposed(s.width, groups=groups(s.width)),
        torch.zeros(2, 5, 9),
        lambda m, x: m(x).square().mean(),
        Scale(16),
    )
    row = next(row for row in mt.plan(of, Scale(64)).rows if row.name == "up.weight")
    assert (row.role, (row.m_in, row.m_out)) == (role, m)


def test_transposed_convolutions_of_which_number_and_width_of_groups_grow_are_refused() -> None:
    of = Family(
        lambda s: Transposed(s.width**2, groups=s.width),
        torch.zeros(2, 5, 9),
        lambda m, x: m(x).square().mean(),
        Scale(4),
    )
    with pytest.raises(RequestError, match=r"up\.weight \[16, 4, 2\]: .* sums over a part of its axis 0, and both"):
        observe(of)


def test_a_matrix_kept_flat() -> None:
    """One axis that is summed over and survives at once has no one ratio."""
    with pytest.raises(
        RequestError, match=r"weight \[256\]: the operation 'mm' sums over a part of its axis 0, and both"
    ):
        spec(lambda n: (n * n,), lambda x, w: x @ w.view(x.shape[-1], -1), readout=True)
    assert spec(lambda n: (3 * n,), lambda x, w: x @ w.view(x.shape[-1], 3)).role == "output"
    assert spec(lambda n: (3 * n,), lambda x, w: x[..., :3] @ w.view(3, -1), readout=True).role == "vector"


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize(
    "changed", [lambda q: q, lambda q: q * 2, lambda q: q.transpose(0, 1).contiguous().transpose(0, 1)]
)
def test_learned_queries_dotted_with_keys(tokens: int, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """More heads of one size: a head's entries are summed over, and that part of the axis does not grow."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return changed(x.unflatten(-1, (-1, 4)).transpose(-2, -3))

    def apply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        keys: Any = heads(x)
        scores = heads(w).expand(len(x), -1, -1, -1) @ keys.mT
        return (scores.softmax(-1) @ keys).transpose(1, 2).flatten(2)

    found = spec(lambda n: (tokens, n), apply, readout=True)
    assert found.role in ("input", "vector")
    assert found.multipliers((tokens, 64)) == (1, 4)
