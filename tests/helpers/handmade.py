"""A net of a first layer, what is put between, and a readout; and what was seen of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import Observation, ParamSpec

FEATURES = 5
Apply = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """A first layer, what is put between (``parts``, joined by ``apply``), and a readout."""

    def __init__(self, width: int, parts: dict[str, nn.Module | nn.Parameter], apply: Apply) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width, bias=False)
        for name, part in parts.items():
            setattr(self, name, part)
        self.apply_parts = apply
        self.readout = nn.Linear(width, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.apply_parts(self, self.first(x)))


def family(parts: Callable[[int], dict[str, Any]], apply: Callable[..., torch.Tensor], **roles: str) -> Family:
    return Family(
        lambda s: Net(s.width, parts(s.width), apply), torch.zeros(3, 7, FEATURES), lambda model, x: model(x).square().mean(),
        Scale(16), roles=roles,
    )  # fmt: skip


def seen(parts: Callable[[int], dict[str, Any]], apply: Callable[..., torch.Tensor], **roles: str) -> Observation:
    return observe(family(parts, apply, **roles))


def between(found: Observation) -> dict[str, ParamSpec]:
    return {name: spec for name, spec in found.specs.items() if name not in ("first.weight", "readout.weight")}


def roles(found: Observation) -> dict[str, str]:
    return {name: spec.role for name, spec in between(found).items()}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def places(found: Observation) -> dict[str, str]:
    return {n: "end" if s.ends_branch else "in" if s.inside else "-" for n, s in between(found).items()}
