"""How a model to be checked comes to its weights and its optimizer: by a plan, or by the user's own hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors import RequestError, nearest
from ..family import Family, unwrapped
from ..observing.specs import Observation
from ..optimizers.registry import OPTIMIZERS
from ..planning import plan
from ..plans import Plan
from ..scale import Scale
from ..tables import table
from .parameters import Owned, owned
from .places import module_roles

__all__ = ["OWN", "Setup", "as_built", "as_planned", "divisors", "of_repeated"]

OWN = "own"  # in place of a parametrization's name: the model as its builder leaves it
FUSED = ("adamw", "adam", "sgd")  # whose fused step torch has on every device; the arithmetic is the same


@dataclass(frozen=True)
class Setup:
    """One model of a check.

    Args:
        scale: its size.
        build: seed → the initialized model.
        make_optimizer: over one such model.
        roles: model → role by module.
        divisors: module → multiplier that is folded into it, by which its features are divided.
        known: parameter → role and unit.
        stacked: whether seeds may be stacked.
    """

    scale: Scale
    build: Callable[[int], torch.nn.Module]
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
    roles: Callable[[torch.nn.Module], dict[str, str]]
    divisors: Mapping[str, float]
    known: Mapping[str, Owned]
    stacked: bool


def as_planned(family: Family, planned: Plan, seen: Observation, device: str) -> Setup:
    """Return the model that ``planned`` initializes, under the plan's optimizer."""

    def build(seed: int) -> torch.nn.Module:
        model = unwrapped(family.built(planned.scale, device))
        planned.attach(model)
        planned.initialize(model, seed)
        return model

    rule, wider = OPTIMIZERS[planned.optimizer], planned.scale.width / family.base.width
    inside = {name: wider**spec.constant for name, spec in seen.specs.items() if spec.constant_inside}
    options: dict[str, Any] = {"fused": True} if planned.optimizer in FUSED else {}
    return Setup(
        scale=planned.scale,
        build=build,
        make_optimizer=partial(planned.make_optimizer, **options),
        roles=partial(module_roles, planned=planned, attention=_growing_attention(seen)),
        divisors=divisors(planned, inside),
        known=owned(planned),
        stacked=rule.entrywise,
    )


def as_built(family: Family, scale: Scale, seen: Observation, optimizer: str, lr: float, device: str) -> Setup:
    """Return the model as its builder leaves it, under its own optimizer: what users have when they wired µP themselves.

    A model on which ``mup.set_base_shapes`` was called takes mup's optimizer of that name, any other torch's with one
    learning rate for all.

    Raises:
        RequestError: the optimizer is not one of adam, adamw and sgd, or no role of the model can be told.
    """
    if optimizer not in FUSED:
        raise RequestError(
            f"a model's own parametrization is checked under adam, adamw or sgd, not {optimizer!r}: {nearest(optimizer, FUSED)}"
        )

    def build(seed: int) -> torch.nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return unwrapped(family.built(scale, device))

    annotated = any(hasattr(parameter, "infshape") for parameter in build(0).parameters())
    planned = plan(family, scale, "sp", observation=seen)  # for the roles

    def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        if annotated:
            import mup

            made: torch.optim.Optimizer = {"adamw": mup.MuAdamW, "adam": mup.MuAdam, "sgd": mup.MuSGD}[optimizer](
                model.parameters(), lr=lr
            )
            return made
        cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        return cls(model.parameters(), lr=lr, fused=True)

    known = {row.name: Owned(row.role, None) for row in planned.rows}
    roles = partial(module_roles, planned=planned, attention=_growing_attention(seen))
    return Setup(scale, build, make_optimizer, roles, {}, known, stacked=not annotated)


def _growing_attention(seen: Observation) -> frozenset[str]:
    """Return the parameters that make queries and keys, if the head dim grows."""
    if seen.heads.ratio == 1:
        return frozenset()
    return frozenset().union(*(each.queries | each.keys for each in seen.attentions))


def divisors(planned: Plan, constants: Mapping[str, float]) -> dict[str, float]:
    """Return by what each module's features are divided: the multipliers folded into it.

    Args:
        planned: whose folds they are.
        constants: parameter → a number that its module itself multiplies its result with, which belongs to the features.
    """
    found, rules = {}, table(planned.parametrization).rows
    for row in planned.rows:
        # A multiplier that the table itself folds is part of the function.
        own = constants.get(row.name, 1.0) / rules[row.role].gauge(row.m_in, row.m_out)
        found[row.name.removesuffix(".weight")] = row.gauge * own
    return found


def of_repeated(divisors: Mapping[str, float], stacks: Collection[str], seen: Observation) -> dict[str, float]:
    """Return the divisors of a check over depths: of modules that are in a stack which grows, or that every layer uses.

    A multiplier on a branch that depth does not repeat is no part of any rule, and has to be seen.
    """

    def repeats(name: str) -> bool:
        parts = name.split(".")
        if any(part.isdecimal() and ".".join(parts[:i]) in stacks for i, part in enumerate(parts)):
            return True
        spec = seen.specs.get(f"{name}.weight") or seen.specs.get(name)
        return spec is not None and spec.rounds[1] > 0

    return {name: divisor for name, divisor in divisors.items() if repeats(name)}
