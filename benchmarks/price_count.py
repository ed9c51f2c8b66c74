"""Floating point operations of one step, counted over counted by hand, for twelve kinds of layer at two sizes.

By hand: 6 per weight and position it meets (2 forward, 4 backward; 4 for a layer that meets the data, which needs no gradient),
12·T·S·d for attention over all positions, masked or not, and what else a kind asks for, at its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Claim, arguments, publish
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mutransfer as mt
from mutransfer.price import FlopCounter, step_cost

VOCABULARY, BATCH, HEAD, SIDE = 97, 4, 16, 16
Forward = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def written_out(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal."""
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return ((q @ k.transpose(-1, -2)) / HEAD**0.5).masked_fill(mask, -torch.inf).softmax(-1) @ v


def fused(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every second position is padding."""
    mask = torch.arange(k.shape[-2]).remainder(2).bool().expand(q.shape[-2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def grouped(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two queries to a key."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """Query, key, value and output projections around ``attend``; keys and values may be shared by ``share`` queries."""

    def __init__(self, width: int, attend: Forward, share: int = 1) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v = (nn.Linear(width, width // each) for each in (1, share, share))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, T, width) to the same."""
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


class TorchAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` over its own input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(batch, T, width) to the same."""
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrence(nn.Module):
    """An LSTM or GRU; the gradient of its initial state is not asked for."""

    def __init__(self, width: int, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(width, width, batch_first=True)  # type: ignore[call-arg]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, T, width) to the same."""
        return self.layer(x)[0]  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Every token goes to two of eight feed-forward layers, which take the tokens that the router gives them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 8, bias=False)
        self.experts = nn.ModuleList(FeedForward(width) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, T, width) to the same."""
        tokens, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(2)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out = out.index_add(0, token, shares[token, place, None] * expert(tokens[token]))
        return out.view_as(x)


class FeedForward(nn.Module):
    """Up to four times the width and down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same."""
        return self.down(F.gelu(self.up(x)))


class Checkpointed(FeedForward):
    """Computed again in the backward pass, but for the last product, whose result no gradient needs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same."""
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


class Language(nn.Module):
    """An embedding, one layer with a residual connection, and a readout."""

    def __init__(self, width: int, layer: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer, self.readout = nn.Embedding(VOCABULARY, width), layer, nn.Linear(width, VOCABULARY)
        if tied:
            self.readout.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, T) to (batch, T, vocabulary)."""
        x = self.embedding(tokens)
        return self.readout(x + self.layer(x))


class Convolutions(nn.Module):
    """Two 3×3 convolutions, the second in ``groups`` and with stride 2."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, groups=groups)
        self.readout = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, side, side) to (batch, 10)."""
        return self.readout(F.relu(self.second(F.relu(self.first(x)))).mean((-1, -2)))


@dataclass(frozen=True)
class Kind:
    """A model of one ``width``, and its operations by hand at ``width`` and ``length``."""

    build: Callable[[int], nn.Module]
    by_hand: Callable[[int, int], float]
    images: bool = False


def language(layer: Callable[[int], nn.Module], by_hand: Callable[[int, int, int], float], tied: bool = False) -> Kind:
    """Return a `Language`; ``by_hand`` counts the layer alone, at (positions in all, length, width)."""
    return Kind(
        lambda width: Language(width, layer(width), tied),
        lambda width, length: by_hand(BATCH * length, length, width) + 6 * BATCH * length * VOCABULARY * width,
    )


def attention(attend: Forward, share: int = 1) -> Kind:
    """Return the kind of `Attention`."""
    weights = 2 + 2 / share
    return language(
        lambda width: Attention(width, attend, share), lambda n, t, d: 6 * n * weights * d * d + 12 * n * t * d
    )


def recurrence(kind: type[nn.RNNBase], gates: int) -> Kind:
    """Return the kind of `Recurrence`."""
    return language(lambda width: Recurrence(width, kind), lambda n, t, d: (12 * n - 2 * BATCH) * gates * d * d)


def convolution(groups: int) -> Kind:
    """Return the kind of `Convolutions`."""

    def by_hand(width: int, length: int) -> float:
        first, second = 4 * SIDE**2 * 27 * width, 6 * (SIDE // 2) ** 2 * 9 * width * 2 * width / groups
        return BATCH * (first + second + 6 * 2 * width * 10)

    return Kind(lambda width: Convolutions(width, groups), by_hand, images=True)


KINDS = {
    "attention, written out": attention(written_out),
    "attention, fused": attention(fused),
    "attention, fused and masked": attention(masked),
    "attention, grouped queries": attention(grouped, 2),
    "nn.MultiheadAttention": language(
        lambda width: TorchAttention(width, width // HEAD, batch_first=True),
        lambda n, t, d: 24 * n * d * d + 12 * n * t * d,
    ),
    "LSTM": recurrence(nn.LSTM, 4),
    "GRU": recurrence(nn.GRU, 3),
    "convolution": convolution(1),
    "convolution, four groups": convolution(4),
    "experts, two of eight": language(Experts, lambda n, t, d: 6 * n * (8 * d + 2 * 8 * d * d)),
    "tied embedding": language(FeedForward, lambda n, t, d: 48 * n * d * d, tied=True),
    "checkpointed": language(Checkpointed, lambda n, t, d: (48 + 8) * n * d * d),
}
SIZES = ((64, 32), (128, 256))  # width, and length of a sequence


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the cross-entropy."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def ratios(kind: Kind, width: int, length: int, real: bool) -> list[float]:
    """Return counted over by hand, on fake tensors and, if asked for, on real ones."""
    x = torch.randn(BATCH, 3, SIDE, SIDE) if kind.images else torch.randint(VOCABULARY, (BATCH, length))
    batch = x, torch.randint(10, (BATCH,) if kind.images else (BATCH, length))
    family = mt.Family(lambda scale: kind.build(scale.width), batch, loss, mt.Scale(width, 1))
    costs = [step_cost(family, family.base, batch)]
    if real:
        model = kind.build(width)
        with FlopCounter() as counter:
            loss(model, batch).backward()
        costs.append(counter.flops)
    uncounted = [name for cost in costs for name in cost.uncounted]
    assert not uncounted, uncounted
    return [cost.total / kind.by_hand(width, length) for cost in costs]


def measure(quick: bool) -> list[Claim]:
    """Count every kind at both sizes; ``quick`` leaves out real tensors at the larger one."""
    claims = []
    for name, kind in KINDS.items():
        for width, length in SIZES:
            found = ratios(kind, width, length, real=not quick or width == SIZES[0][0])
            where = f"{name}: width {width}" + ("" if kind.images else f", length {length}")
            off = max(abs(each - 1) for each in found)
            claims.append(Claim(where, found[0], min(found), max(found), 0.01, off <= 0.01))
    return claims


if __name__ == "__main__":
    given = arguments(__doc__ or "")
    publish(measure(given.quick), given.json)
