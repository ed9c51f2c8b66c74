"""Which optimizers have a scaling rule, and which column of the tables each one reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .errors import RequestError, nearest
from .recipe import Recipe

__all__ = ["OPTIMIZERS", "OptimizerRule", "optimizer_rule"]

Column = Literal["adam", "sgd"]


@dataclass(frozen=True)
class OptimizerRule:
    """How one `torch.optim` class scales.

    ``column``: "adam" when the update does not change with the gradient's size, "sgd" when it is proportional to it.
    ``has_eps``: whether it adds an epsilon to the gradient's size.
    """

    name: str
    torch_name: str
    column: Column
    has_eps: bool

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return the settings that are equal for all parameters, as keyword arguments of the torch class."""
        return {"betas": recipe.betas} if self.column == "adam" else {"momentum": recipe.momentum}


OPTIMIZERS = {
    rule.name: rule
    for rule in (
        OptimizerRule("adamw", "AdamW", "adam", True),
        OptimizerRule("adam", "Adam", "adam", True),
        OptimizerRule("sgd", "SGD", "sgd", False),
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
