"""Of what grows in the fan-in only, the result decides: a feature's matrix is a bottleneck, a logit's or a gate's an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe


class Net(nn.Module):
    def __init__(self, width: int, parts: dict[str, nn.Module], apply: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(5, width, bias=False)
        for name, part in parts.items():
            setattr(self, name, part)
        self.apply_parts = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_parts(self, self.first(x))


def roles(parts: Callable[[int], dict[str, nn.Module]], apply: Callable[..., torch.Tensor]) -> dict[str, str]:
    of = Family(
        lambda s: Net(s.width, parts(s.width), apply),
        torch.zeros(2, 7, 5),
        lambda m, x: m(x).square().mean(),
        Scale(16),
    )
    return {name: spec.role for name, spec in observe(of).specs.items() if name != "first.weight"}


def linear(*shape: int) -> nn.Linear:
    return nn.Linear(*shape, bias=False)


@pytest.mark.parametrize(
    "function",
    [torch.relu, torch.tanh, F.silu, torch.sigmoid, lambda h: h * h.sigmoid(), lambda h: h.float().sigmoid() * h],
    ids=["relu", "tanh", "silu", "sigmoid", "silu by hand", "silu in float"],
)
def test_a_bottleneck_whatever_its_nonlinearity(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = roles(
        lambda n: {"down": linear(n, 4), "up": linear(4, n), "readout": linear(n, 3)},
        lambda net, x: net.readout(net.up(function(net.down(x)))),
    )
    assert found == {"down.weight": "bottleneck", "up.weight": "input", "readout.weight": "output"}


GATES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "mul": lambda net, x: net.up(x) * net.gate(x).sigmoid(),
    "lerp": lambda net, x: torch.lerp(x, net.up(x), net.gate(x).sigmoid()),
    "one minus": lambda net, x: (1 - net.gate(x).sigmoid()) * x + net.up(x),
    "normalized, in float": lambda net, x: (
        net.up(x) * (lambda g: g / g.sum(1, keepdim=True))(net.gate(x).float().sigmoid())
    ),
    "pooled by": lambda net, x: net.up(net.gate(x).sigmoid().mT @ x),
    "softmax": lambda net, x: net.up(net.gate(x).softmax(1).mT @ x),
}


@pytest.mark.parametrize("way", GATES)
def test_a_gate_over_other_values_is_an_output(way: str) -> None:
    found = roles(
        lambda n: {"gate": linear(n, 1), "up": linear(n, n), "readout": linear(n, 3)},
        lambda net, x: net.readout(GATES[way](net, x)),
    )
    assert found == {"gate.weight": "output", "up.weight": "hidden", "readout.weight": "output"}


def test_a_recurrence_by_hand_of_fixed_size() -> None:
    """Its gates weight what the same matrices made."""

    def apply(net: Any, x: torch.Tensor) -> torch.Tensor:
        steps = net.enter(x).unbind(1)
        h = c = x.new_zeros(len(x), 4)
        for step in steps:
            i, f, g, o = (step + net.again(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return net.readout(net.up(h))

    found = roles(
        lambda n: {"enter": linear(n, 16), "again": linear(4, 16), "up": linear(4, n), "readout": linear(n, 3)}, apply
    )
    assert (found["enter.weight"], found["again.weight"]) == ("bottleneck", "finite")


def test_a_gate_without_a_sigmoid_is_one_number_for_many_entries() -> None:
    """Experts weighted by relu (ReMoE), against an outer product of two fixed ranks."""
    experts = {
        "mul": lambda net, x: net.readout(
            (net.experts(x).unflatten(-1, (4, -1)) * net.gate(x).relu()[..., None]).sum(-2)
        ),
        "tanh": lambda net, x: net.readout(
            (net.experts(x).unflatten(-1, (4, -1)) * net.gate(x).tanh()[..., None]).mean(-2)
        ),
    }
    for apply in experts.values():
        found = roles(lambda n: {"gate": linear(n, 4), "experts": linear(n, 4 * n), "readout": linear(n, 3)}, apply)
        assert found == {"gate.weight": "output", "experts.weight": "hidden", "readout.weight": "output"}
    found = roles(
        lambda n: {"a": linear(n, 4), "b": linear(n, 3), "up": linear(12, n), "readout": linear(n, 3)},
        lambda net, x: net.readout(net.up((net.a(x)[..., None] * net.b(x)[..., None, :]).flatten(-2))),
    )
    assert (found["a.weight"], found["b.weight"]) == ("bottleneck", "bottleneck")
