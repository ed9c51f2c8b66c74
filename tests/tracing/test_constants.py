"""Numbers of the forward pass that grow with the width: written on a parameter where all of its result sees them, else told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.tracing.observe import observe

from ..helpers import families

VOCABULARY = families.VOCABULARY


class Net(nn.Module):
    """An embedding, two matrices, a gain and a readout, put together by the test."""

    def __init__(self, n: int, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.n, self.way = n, forward
        self.embed = nn.Embedding(VOCABULARY, n)
        self.up, self.down = (nn.Linear(n, n, bias=False) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(n))
        self.readout = nn.Linear(n, VOCABULARY, bias=False)
        self.register_buffer("root", torch.full((1,), n**0.5))
        self.register_buffer("wide", torch.ones(n) * n**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.way(self, x))


def seen(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> tuple[dict[str, float], tuple[str, ...]]:
    """The powers that are not 0, and the notes about numbers."""
    batch = families.token_batch()
    found = observe(mt.Family(lambda s: Net(s.width, forward), batch, families.loss, mt.Scale(32, 1)))
    notes = tuple(note for note in found.notes if "multiplies" in note)
    return {name: spec.constant for name, spec in found.specs.items() if spec.constant}, notes


def heads(net: Any, x: torch.Tensor) -> torch.Tensor:
    """As many rounds as heads: more of them in a wider model, and none multiplies with more."""
    h = torch.cat([0.5 * piece for piece in net.up(net.embed(x)).split(16, -1)], -1)
    return net.down((h * 4.0).relu() * net.gain)


def twice(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Encoder and decoder share an embedding, scaled at each of its uses."""
    return net.gain * (net.up(net.embed(x) * net.n**0.5) + net.down(net.embed(x.flip(1)) * net.n**0.5)).relu()


def through(way: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Something done to the embedding, before the rest."""
    return lambda net, x: net.down(net.up(way(net, net.embed(x))).relu() * net.gain)


def between(way: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Something done to what `up` makes."""
    return lambda net, x: net.down(way(net, net.up(net.embed(x))).relu() * net.gain)


def biased(*, alpha: bool = False, beta: bool = False) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A matrix product and a bias added to it, either of which `addmm` multiplies."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        # 1 at width 64: a bias that is 8 there hides the product, and its steps are 8 times as large.
        root = (net.n / 64) ** 0.5
        h, numbers = net.embed(x), {"alpha": root if alpha else 1, "beta": root if beta else 1}
        return net.down(torch.addmm(net.gain, h.flatten(0, 1), net.up.weight.t(), **numbers).relu().view_as(h))

    return forward


EMBEDDING = {"embed.weight": 0.5}
# What is added to the activations grows with the width and belongs to no parameter: no plan makes such a model stable.
GROWING = {"alpha of a number", "alpha of what is no activation"}
SEEN: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], dict[str, float]]] = {
    "a loop over heads": (heads, {}),
    "one embedding, scaled in both its uses": (twice, EMBEDDING),
    "a number": (through(lambda net, e: e * net.n**0.5), EMBEDDING),
    "a fresh scalar tensor": (through(lambda net, e: e * torch.tensor(net.n**0.5)), EMBEDDING),
    "full": (through(lambda net, e: e / torch.full([], net.n**-0.5)), EMBEDDING),
    "new_full": (through(lambda net, e: e * e.new_full((), net.n**0.5)), EMBEDDING),
    "ones times a number": (through(lambda net, e: e * (torch.ones(1) * net.n**0.5)), EMBEDDING),
    "sqrt of a tensor": (through(lambda net, e: e * torch.full((1,), float(net.n)).sqrt()), EMBEDDING),
    "a buffer of one entry": (through(lambda net, e: e * net.root), EMBEDDING),
    "a buffer as long as the width": (through(lambda net, e: e * net.wide), EMBEDDING),
    "alpha of a sum": (through(lambda net, e: torch.add(torch.zeros(()), e, alpha=net.n**0.5)), EMBEDDING),
    "alpha of a number": (through(lambda net, e: torch.add(e, 0.5, alpha=net.n**0.5)), {}),
    "alpha of what is no activation": (through(lambda net, e: torch.add(e, torch.ones(net.n), alpha=net.n**0.5)), {}),
    "alpha of a product, not of its bias": (biased(alpha=True), {"up.weight": 0.5}),
    "beta of a bias": (biased(beta=True), {"gain": 0.5}),
    "twice over": (through(lambda net, e: e * net.n * net.n**-0.5), EMBEDDING),
    "there and back": (through(lambda net, e: e * net.n / net.n), {}),
    "a mean, written as a sum": (between(lambda net, h: h - h.sum(-1, keepdim=True) / h.shape[-1]), {}),
    "a mean": (between(lambda net, h: h - h.mean(-1, keepdim=True)), {}),
    "a norm that is undone": (
        lambda net, x: net.down(net.up(F.normalize(net.embed(x), dim=-1) * net.gain * net.n**0.5).relu()),
        {},
    ),
    "a norm that is undone first": (
        lambda net, x: net.down(net.up(F.normalize(net.embed(x), dim=-1) * net.n**0.5 * net.gain).relu()),
        {},
    ),
    "a norm by hand": (
        lambda net, x: net.down(net.up((e := net.embed(x)) * e.square().sum(-1, keepdim=True).rsqrt() * net.n**0.5 * net.gain)),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", SEEN)
def test_a_power_is_written_on_what_carries_it(way: str) -> None:
    forward, powers = SEEN[way]
    assert seen(forward) == (powers, ())


TOLD: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "on one of two ways": lambda net, x: net.down(net.up((e := net.embed(x)) * net.n**0.5).relu() * net.gain + net.up(e)),
    "added to itself": between(lambda net, h: h + h * net.n**-0.5),
    "in one of two uses": lambda net, x: net.gain * (net.up(net.embed(x) * net.n**0.5) + net.down(net.embed(x))).relu(),
    "a norm that stays": lambda net, x: net.down(net.up(F.normalize(net.embed(x), dim=-1) * net.gain).relu()),
    "a sum that stays": between(lambda net, h: (h * h.sum(-1, keepdim=True)).tanh()),
    "on a nonlinearity": between(lambda net, h: h.tanh() * net.n**0.5),
}  # fmt: skip


@pytest.mark.parametrize("way", TOLD)
def test_what_no_parameter_can_hold_is_left_and_told(way: str) -> None:
    powers, notes = seen(TOLD[way])
    assert not powers
    assert notes
    assert all("left unchanged" in note for note in notes)


def test_a_control_keeps_what_the_forward_pass_multiplies_with() -> None:
    family = mt.Family(
        lambda s: Net(s.width, SEEN["a number"][0]), families.token_batch(), families.loss, mt.Scale(32, 1)
    )
    factors = {
        name: {row.name: row.lr_factor for row in mt.plan(family, mt.Scale(128, 1), name).rows}
        for name in ("mup", "sp")
    }
    assert set(factors["sp"].values()) == {1.0}
    assert factors["mup"]["embed.weight"] == 0.5


class Deep(nn.Module):
    """Residual branches with a number of their own, and one behind the last."""

    def __init__(self, n: int, depth: int, scale: Callable[[int, int], float]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, n)
        self.blocks = nn.ModuleList(nn.Linear(n, n) for _ in range(depth))
        self.readout = nn.Linear(n, VOCABULARY, bias=False)
        self.scales = [scale(i, depth) for i in range(depth)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            h = h + block(h.relu()) * scale
        return self.readout(h)


def deep(scale: Callable[[int, int], float], base: int = 2) -> mt.Family:
    return mt.Family(
        lambda s: Deep(s.width, s.depth, scale), families.token_batch(), families.loss, mt.Scale(32, base), "deep"
    )


@pytest.mark.parametrize("base", [2, 6])
def test_the_models_own_depth_multiplier_is_not_counted_twice(base: int) -> None:
    """What a branch adds at 4x the depth is a quarter, whoever multiplies: CompleteP 2505.01618, Table 1."""
    for scale in (lambda i, depth: 1.0, lambda i, depth: depth**-0.5, lambda i, depth: 3 / depth):
        family = deep(scale, base)
        plan = mt.plan(family, mt.Scale(32, 4 * base), "completep")
        ends = {round(row.gauge, 6) for row in plan.rows if row.name.startswith("blocks.")}
        own = scale(0, 4 * base) / scale(0, base)
        assert ends == {round(0.25 / own, 6)}
        assert any("depth^" in note for note in plan.notes) == (own != 1)
        assert {row.gauge for row in mt.plan(family, mt.Scale(32, 4 * base), "sp").rows} == {1.0}


def test_layers_that_shrink_differently_with_the_depth_are_refused() -> None:
    with pytest.raises(mt.RequestError, match="different powers of the depth"):
        mt.plan(deep(lambda i, depth: depth**-0.5 if i else 1.0), mt.Scale(32, 8), "completep")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way == "a norm that is undone" else pytest.mark.slow) for way in SEEN]
)
def test_what_is_planned_so_passes_the_check(way: str) -> None:
    family = mt.Family(lambda s: Net(s.width, SEEN[way][0]), families.token_batch(), families.loss, mt.Scale(64, 1))
    found = mt.verdict(mt.record(family, [64, 128, 256, 512], seeds=range(4)))
    if way in GROWING:
        assert (found.status, found.fault) == ("fail", "forward"), found.cause
    else:
        assert found.status == "pass", found.cause
