"""Axes joined from growing and fixed pieces: which columns are which, however they are joined, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ..helpers.handmade import parameter, seen

N, FIXED = 16, 6
Parts = Callable[[int], dict[str, Any]]
Apply = Callable[..., torch.Tensor]


def fixed(x: torch.Tensor, size: int = FIXED) -> torch.Tensor:
    return torch.ones(*x.shape[:-1], size)


def linear(n: int) -> dict[str, Any]:
    return {"mid": nn.Linear(n + FIXED, n)}


def runs(parts: Parts, apply: Apply, **roles: str) -> dict[str, list[tuple[int, int, bool]]]:
    specs = seen(parts, apply, **roles).specs
    return {
        name: [(each.begin, each.end, each.grows) for each in spec.columns]
        for name, spec in specs.items()
        if spec.columns
    }


LAST = [(0, N, True), (N, N + FIXED, False)]
FIRST = [(0, FIXED, False), (FIXED, N + FIXED, True)]


def joined(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, fixed(x)], -1)


def buffer(net: Any, x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    z = x.new_zeros(*x.shape[:-1], n + FIXED)
    z[..., :n] = x
    z[..., n:] = fixed(x)
    return net.mid(z)


def filled_by_copy(net: Any, x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    z = torch.empty(*x.shape[:-1], n + FIXED)
    z.narrow(-1, FIXED, n).copy_(x)
    z[..., :FIXED].fill_(1)
    return net.mid(z)


def padded(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.mid(F.pad(x, (0, FIXED)) + F.pad(fixed(x), (x.shape[-1], 0)))


def chosen(net: Any, x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    return net.mid(torch.where(torch.arange(n + FIXED) < n, F.pad(x, (0, FIXED)), F.pad(fixed(x), (n, 0))))


def scattered(net: Any, x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    z = torch.slice_scatter(x.new_zeros(*x.shape[:-1], n + FIXED), x, -1, 0, n)
    return net.mid(torch.slice_scatter(z, fixed(x), -1, n))


def added_to_some(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[..., :FIXED] += fixed(x)
    return net.mid(y)


def after_much(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = F.gelu(net.norm(joined(x))).transpose(0, 1).contiguous()
    return net.mid(F.dropout(y, 0.1).flatten(0, 1)).unflatten(0, (7, 3)).transpose(0, 1)


def twice(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.mid(torch.cat([joined(x).tanh(), fixed(x, 2)], -1))


def stacked(net: Any, x: torch.Tensor) -> torch.Tensor:
    """As many heads as the width has fours, and one more."""
    heads = [*x.split(4, -1), fixed(x, 4)]
    return net.mid(torch.stack(heads, -2).flatten(-2))


def einsum(net: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bti,io->bto", joined(x), net.w)


def over_heads(net: Any, x: torch.Tensor) -> torch.Tensor:
    """(heads, head dim, out), with one head of the data's own."""
    return torch.einsum("bthd,hdo->bto", torch.cat([x, fixed(x, 4)], -1).unflatten(-1, (-1, 4)), net.w)


def batched(net: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(joined(x), net.w.expand(3, -1, -1))


def multiplied_and_summed(net: Any, x: torch.Tensor) -> torch.Tensor:
    return (joined(x).unsqueeze(-2) * net.w).sum(-1)


def experts(net: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bti,eio->bteo", joined(x), net.w).mean(2)


def experts_one_by_one(net: Any, x: torch.Tensor) -> torch.Tensor:
    z = joined(x)
    return sum((z @ each for each in net.w), torch.zeros(()))


def cut_matrix(net: Any, x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    return F.linear(x, net.mid.weight[:, :n], net.mid.bias) + F.linear(fixed(x), net.mid.weight[:, n:])


def recurrent(net: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(3, x.shape[-1])
    for t in range(x.shape[1]):
        h = torch.tanh(net.mid(torch.cat([fixed(x[:, t]), h], -1)))
    return h


def recurrent_reversed(net: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(3, x.shape[-1])
    for t in range(x.shape[1]):
        h = torch.tanh(net.mid(torch.cat([h, fixed(x[:, t])], -1)))
    return h


def gated(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A ConvLSTM's step: the gates see the picture and the state."""
    h = c = torch.zeros(3, x.shape[-1], 4, 4)
    for _ in range(2):
        i, f, o, g = net.gates(torch.cat([torch.ones(3, FIXED, 4, 4), h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h.mean((2, 3)) + x.mean(1)


def channels_flattened(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.cat([x.mean(1)[..., None, None].expand(-1, -1, 2, 2), torch.ones(3, FIXED, 2, 2)], 1)
    return net.mid(F.relu(F.max_pool2d(y, 1)).flatten(1))


def channels_last(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.cat([x, fixed(x)], -1).transpose(1, 2).unsqueeze(-1).to(memory_format=torch.channels_last)
    return net.gates(y).squeeze(-1).transpose(1, 2)


def keys_from_two(net: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = net.q(x), net.k(joined(x)), net.v(joined(x))
    return (
        F.scaled_dot_product_attention(*(each.unflatten(-1, (-1, 4)).transpose(1, 2) for each in (q, k, v)))
        .transpose(1, 2)
        .flatten(2)
    )


def values_attended(net: Any, x: torch.Tensor) -> torch.Tensor:
    """What attention mixes over positions keeps its columns."""
    return net.mid(torch.softmax(x @ x.mT / x.shape[-1], -1) @ joined(x))


def shuffled(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.mid(joined(x).flip(-1))


MIXED: dict[str, tuple[Parts, Apply, dict[str, Any]]] = {
    "linear": (linear, lambda net, x: net.mid(joined(x)), {"mid.weight": LAST}),
    "fixed first": (linear, lambda net, x: net.mid(torch.cat([fixed(x), x], -1)), {"mid.weight": FIRST}),
    "two sides": (
        lambda n: {"mid": nn.Linear(n + 2 * FIXED, n)},
        lambda net, x: net.mid(torch.cat([fixed(x), x, fixed(x)], -1)),
        {"mid.weight": [*FIRST, (N + FIXED, N + 2 * FIXED, False)]},
    ),
    "of the width in all": (
        lambda n: {"down": nn.Linear(n, n - FIXED), "mid": nn.Linear(n, n)},
        lambda net, x: net.mid(joined(net.down(x))),
        {"mid.weight": [(0, N - FIXED, True), (N - FIXED, N, False)]},
    ),
    "buffer": (linear, buffer, {"mid.weight": LAST}),
    "filled by copy": (linear, filled_by_copy, {"mid.weight": FIRST}),
    "padded": (linear, padded, {"mid.weight": LAST}),
    "where": (linear, chosen, {"mid.weight": LAST}),
    "slice_scatter": (linear, scattered, {"mid.weight": LAST}),
    "added in place": (lambda n: {"mid": nn.Linear(n, n)}, added_to_some, {"mid.weight": [(0, FIXED, False), (FIXED, N, True)]}),
    "norm and activation between": (lambda n: {**linear(n), "norm": nn.LayerNorm(n + FIXED)}, after_much, {"mid.weight": LAST}),
    "joined twice": (
        lambda n: {"mid": nn.Linear(n + FIXED + 2, n)}, twice, {"mid.weight": [(0, N, True), (N, N + FIXED + 2, False)]}
    ),
    "one more of growing heads": (
        lambda n: {"mid": nn.Linear(n + 4, n)}, stacked, {"mid.weight": [(0, N, True), (N, N + 4, False)]}
    ),
    "einsum": (lambda n: {"w": parameter(n + FIXED, n)}, einsum, {"w": LAST}),
    "bmm": (lambda n: {"w": parameter(n + FIXED, n)}, batched, {"w": LAST}),
    "einsum over heads": (
        lambda n: {"w": parameter(n // 4 + 1, 4, n)}, over_heads, {"w": [(0, N // 4, True), (N // 4, N // 4 + 1, False)]}
    ),
    "product and sum": (lambda n: {"w": parameter(n, n + FIXED)}, multiplied_and_summed, {"w": LAST}),
    "experts": (lambda n: {"w": parameter(3, n + FIXED, n)}, experts, {"w": LAST}),
    "experts one by one": (lambda n: {"w": parameter(3, n + FIXED, n)}, experts_one_by_one, {"w": LAST}),
    "a matrix cut by hand": (linear, cut_matrix, {"mid.weight": LAST}),
    "a cell written by hand": (linear, recurrent, {"mid.weight": FIRST}),
    "its state first": (linear, recurrent_reversed, {"mid.weight": LAST}),
    "ConvLSTM": (lambda n: {"gates": nn.Conv2d(n + FIXED, 4 * n, 3, padding=1)}, gated, {"gates.weight": FIRST}),
    "channels flattened": (
        lambda n: {"mid": nn.Linear(4 * (n + FIXED), n)}, channels_flattened,
        {"mid.weight": [(0, 4 * N, True), (4 * N, 4 * (N + FIXED), False)]},
    ),
    "channels last": (lambda n: {"gates": nn.Conv2d(n + FIXED, n, 1)}, channels_last, {"gates.weight": LAST}),
    "transposed convolution": (
        lambda n: {"gates": nn.ConvTranspose2d(n + FIXED, n, 1)}, channels_last, {"gates.weight": LAST}
    ),
    "keys and values of two sources": (
        lambda n: {"q": nn.Linear(n, n), "k": nn.Linear(n + FIXED, n), "v": nn.Linear(n + FIXED, n)}, keys_from_two,
        {"k.weight": LAST, "v.weight": LAST},
    ),
    "attended": (linear, values_attended, {"mid.weight": LAST}),
    "flipped": (linear, shuffled, {"mid.weight": FIRST}),
    "LSTM": (
        lambda n: {"cell": nn.LSTM(n + FIXED, n, batch_first=True)}, lambda net, x: net.cell(joined(x))[0],
        {"cell.weight_ih_l0": LAST},
    ),
    "one weight-normalized": (
        lambda n: {"mid": nn.utils.parametrizations.weight_norm(nn.Linear(n + FIXED, n))}, lambda net, x: net.mid(joined(x)),
        {"mid.parametrizations.weight.original1": LAST},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_columns(kind: str) -> None:
    parts, apply, expected = MIXED[kind]
    assert runs(parts, apply) == expected


def attend(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Keys and values of two sources, one after the other, and learned tokens in front."""
    x = torch.cat([net.tokens.expand(3, -1, -1), x], 1)
    both = torch.cat([x, net.up(torch.ones(3, 2, FIXED))], 1)
    q, k, v = (each.unflatten(-1, (-1, 4)).transpose(1, 2) for each in (net.q(x), net.k(both), net.v(both)))
    return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotated(net: Any, x: torch.Tensor) -> torch.Tensor:
    heads = net.mid(x).unflatten(-1, (-1, 4))
    a, b = heads.chunk(2, -1)
    return net.out(torch.cat([-b, a], -1).flatten(-2))


def heads_one_by_one(net: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    for i, head in enumerate(net.mid(x).split(4, -1)):
        y[..., 4 * i : 4 * i + 4] = torch.cat([head[..., 2:], head[..., :2].tanh()], -1)
    return net.out(y)


def heads_cut(net: Any, x: torch.Tensor) -> torch.Tensor:
    heads = net.mid(x).split(4, -1)
    return sum((F.linear(head, net.out.weight[:, 4 * i : 4 * i + 4]) for i, head in enumerate(heads)), torch.zeros(()))


def frozen_copy(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = net.target(joined(x))
    return net.out(x) + target


def two(n: int) -> dict[str, Any]:
    return {"mid": nn.Linear(n, n), "out": nn.Linear(n, n)}


UNMIXED: dict[str, tuple[Parts, Apply]] = {
    "growing pieces": (
        lambda n: {"mid": nn.Linear(3 * n, n)}, lambda net, x: net.mid(torch.cat([x, x.tanh(), x.mean(1, True).expand_as(x)], -1))
    ),
    "fixed pieces": (
        lambda n: {"up": nn.Linear(FIXED + 3, n)}, lambda net, x: x + net.up(torch.cat([fixed(x), fixed(x, 3)], -1))
    ),
    "a stream of width + 6": (
        lambda n: {"up": nn.Linear(n, n + FIXED), "mid": nn.Linear(n + FIXED, n)}, lambda net, x: net.mid(net.up(x).relu())
    ),
    "along the sequence": (
        lambda n: {"tokens": parameter(1, 2, n), "up": nn.Linear(FIXED, n), "q": nn.Linear(n, n), "k": nn.Linear(n, n),
                   "v": nn.Linear(n, n), "out": nn.Linear(n, n)}, attend,
    ),
    "tokens, then flattened": (
        lambda n: {"tokens": parameter(1, 2, n), "mid": nn.Linear(9 * n, n)},
        lambda net, x: net.mid(torch.cat([net.tokens.expand(3, -1, -1), x], 1).flatten(1)),
    ),
    "rotated halves of heads": (two, rotated),
    "heads written one by one": (two, heads_one_by_one),
    "heads cut out of the matrix": (two, heads_cut),
    "a frozen copy": (lambda n: {"out": nn.Linear(n, n), "target": nn.Linear(n + FIXED, n).requires_grad_(False)}, frozen_copy),
    "split in two": (
        lambda n: {"mid": nn.Linear(n, n), "side": nn.Linear(FIXED, n, bias=False)},
        lambda net, x: net.mid(x) + net.side(fixed(x)),
    ),
    "padded images": (
        lambda n: {"conv": nn.Conv2d(n, n, 3)},
        lambda net, x: net.conv(F.pad(x.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 7), (1, 1, 1, 1))).mean((2, 3)),
    ),
    "padded channels": (lambda n: {"mid": nn.Linear(2 * n, n)}, lambda net, x: net.mid(F.pad(x, (x.shape[-1] // 2,) * 2))),
    "growing pieces of a dense block": (
        lambda n: {"a": nn.Linear(n, n // 2), "b": nn.Linear(n + n // 2, n)}, lambda net, x: net.b(torch.cat([x, net.a(x)], -1))
    ),
    "a cell of two matrices": (
        lambda n: {"cell": nn.RNN(FIXED, n, batch_first=True)}, lambda net, x: x + net.cell(fixed(x))[0]
    ),
    "cut again": (two, lambda net, x: net.out(net.mid(joined(x)[..., : x.shape[-1]]))),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNMIXED)
def test_what_has_one_ratio(kind: str) -> None:
    assert runs(*UNMIXED[kind]) == {}
