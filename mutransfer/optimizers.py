"""Which optimizers have a scaling rule, and which column of the tables each one reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .errors import RequestError, nearest
from .recipe import Recipe
from .specs import ParamSpec
from .tables import Row

__all__ = ["OPTIMIZERS", "OptimizerRule", "optimizer_rule"]

Column = Literal["adam", "sgd"]


@dataclass(frozen=True)
class OptimizerRule:
    """How one `torch.optim` class scales.

    ``column``: "adam" when the update does not change with the gradient's size, "sgd" when it is proportional to it.
    ``fold``: which of `fold.FOLDS` rewrites a forward multiplier.
    ``has_eps``: whether it adds an epsilon to the gradient's size.
    """

    name: str
    torch_name: str
    column: Column
    fold: str
    has_eps: bool

    def of(self, spec: ParamSpec) -> OptimizerRule:
        """Return the rule that this parameter follows: some optimizers leave some roles to another."""
        return self

    def lr(self, row: Row, spec: ParamSpec, shape: tuple[int, ...], m: tuple[float, float]) -> float:
        """Return the learning rate's factor for a parameter of this ``shape`` and these (m_in, m_out)."""
        return row.lr(self.column)(*m)

    def eps(self, row: Row, m: tuple[float, float]) -> float:
        """Return epsilon's factor."""
        return row.eps(*m)

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return the settings that are equal for all parameters, as keyword arguments of the torch class."""
        return {"betas": recipe.betas} if self.column == "adam" else {"momentum": recipe.momentum}


OPTIMIZERS = {
    rule.name: rule
    for rule in (
        OptimizerRule("adamw", "AdamW", "adam", "adam", True),
        OptimizerRule("adam", "Adam", "adam", "adam", True),
        OptimizerRule("sgd", "SGD", "sgd", "sgd", False),
    )
}

# Refused for good, each with its reason; everything else is merely unknown.
REFUSED = {
    "radam": "its first steps are not normalized, so neither column of the tables holds",
    "adadelta": "its update has no unit of learning rate",
    "lbfgs": "a line search has no learning rate to transfer",
    "rprop": "its step sizes adapt by sign and forget the learning rate",
    "sparseadam": "it updates only the rows it has seen",
}


def optimizer_rule(name: str, recipe: Recipe) -> OptimizerRule:
    """Return the rule of the optimizer called ``name`` (its torch class in lower case).

    Raises:
        RequestError: no rule is known for it, or the recipe asks Adam for L2 weight decay.
    """
    if name.lower() in REFUSED:
        raise RequestError(f"{name} has no rule that transfers ({REFUSED[name.lower()]}): use adamw, adam or sgd.")
    if name not in OPTIMIZERS:
        raise RequestError(f"no scaling rule is known for the optimizer {name!r}: {nearest(name, OPTIMIZERS)}")
    if name == "adam" and recipe.weight_decay > 0:
        raise RequestError(
            f"Adam with weight_decay {recipe.weight_decay:g} is L2 regularization, which adaptive steps do not transfer: "
            "use adamw, whose decay is decoupled, or set weight_decay to 0."
        )
    return OPTIMIZERS[name]
