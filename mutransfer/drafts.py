"""A plan in the making: the factors of every parameter, and the multipliers to be written into them.

Factors of the sizes (``size``) and of the recipe's α's (``alpha``) are kept apart: only the former compare the target
with the base model under the same recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import RequestError
from .fold import Factors
from .optimizers import OptimizerRule
from .recipe import Recipe
from .scale import Scale
from .specs import Observation, ParamSpec
from .tables import Table

__all__ = ["Draft"]

DECAY_POLICIES = {"independent": -1.0, "coupled": 0.0, "sqrt": -0.5}  # power of the lr factor


@dataclass
class Draft:
    """The target's parameters (``shapes``), the base's that they are scaled from (``origin``), and the factors so far."""

    rules: Table
    rule: OptimizerRule
    recipe: Recipe
    seen: Observation
    scale: Scale
    base: Scale
    shapes: dict[str, tuple[int, ...]]
    origin: dict[str, str]
    size: dict[str, Factors] = field(default_factory=dict)
    alpha: dict[str, Factors] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.notes += self.seen.notes
        self.alpha = dict.fromkeys(self.shapes, Factors())
        self.size = {name: self._size(name) for name in self.shapes}

    @property
    def wider(self) -> float:
        """Target width / base width."""
        return self.scale.width / self.base.width

    @property
    def deeper(self) -> float:
        """Target depth / base depth, m_L."""
        return self.scale.depth / self.base.depth

    def spec(self, name: str) -> ParamSpec:
        """Return what was observed of the base's parameter that ``name`` is scaled from."""
        return self.seen.specs[self.origin[name]]

    def multipliers(self, name: str) -> tuple[float, float]:
        """Return (m_in, m_out) of one parameter of the target."""
        return self.spec(name).multipliers(self.shapes[name], name, self.deeper)

    def fold(self, names: Iterable[str], size: float = 1.0, alpha: float = 1.0) -> None:
        """Write multipliers into the target's parameters that come from ``names`` of the base."""
        if size == 1 and alpha == 1:
            return
        chosen = set(names)
        for name, origin in self.origin.items():
            if origin in chosen:
                kind = self.rule.of(self.spec(name)).fold
                self.size[name] = self.size[name].folded(size, kind)
                self.alpha[name] = self.alpha[name].folded(alpha, kind)

    def _size(self, name: str) -> Factors:
        """Return the table's own factors: of the width and, on residual branches, of the depth."""
        spec, rule = self.spec(name), self.rule.of(self.spec(name))
        m = self.multipliers(name)
        row = self.rules.rows[spec.role]
        lr = rule.lr(row, spec, self.shapes[name], m)
        eps = rule.eps(row, m)
        if self.rules.depth is not None and spec.inside:
            alpha = float(self.rules.depth)
            lr *= self.deeper ** (2 * alpha - 1 if rule.column == "sgd" else alpha - 1)
            eps *= self.deeper**-alpha
        gauge = self.rules.readout(*m) if spec.role == "output" else 1.0
        if spec.mixed and m != (1.0, 1.0) and rule.column != "adam":
            raise RequestError(
                f"{name} {list(self.shapes[name])} is one matrix whose rows have different roles (some grow with the width, "
                f"some do not), and {self.rule.name} needs a learning rate for each: split it, or use adamw."
            )
        if spec.mixed and m != (1.0, 1.0):
            eps = 1.0
            self.notes.append(f"{name} has rows of different roles: its epsilon is not scaled.")
        return Factors(
            init=row.init(*m), lr=lr, weight_decay=lr ** DECAY_POLICIES[self.recipe.decay_policy], eps=eps, gauge=gauge
        )
