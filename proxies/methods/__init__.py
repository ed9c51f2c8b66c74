"""Training methods beside backpropagation: what they need before and while a model trains."""

from __future__ import annotations

from collections.abc import Callable

from mutransfer.family import Family
from mutransfer.methods import Method, Pruned
from mutransfer.planning.build import plan
from mutransfer.planning.plan import Plan
from mutransfer.recipe import Recipe
from mutransfer.scale import Scale
from mutransfer.tracing.specs import Observation

from .pruned import layer_densities

__all__ = ["planner_for", "pruned_densities"]


def pruned_densities(recipe: Recipe, family: Family, observation: Observation | None = None) -> dict[str, float] | None:
    """Return the densities of the base model's hidden matrices, if the recipe's method has to measure them.

    Args:
        recipe: its method is what counts.
        family: its base model is scored.
        observation: the result of `observe` for this family, to avoid repeating it.

    Raises:
        RequestError: the score leaves no weight in a layer.
        BuildError: the model or its loss raised.
    """
    method = recipe.method
    if not isinstance(method, Pruned) or not method.needs_scores:
        return None
    return layer_densities(family, method.score, method.density, observation=observation)


def planner_for(method: Method) -> Callable[..., Plan]:
    """Return a function like `plan` for `record`, whose plans train by ``method``."""
    measured: list[dict[str, float] | None] = []  # once: a check has one family

    def planner(
        family: Family, scale: Scale, parametrization: str, optimizer: str, recipe: Recipe, *,
        observation: Observation | None = None,
    ) -> Plan:  # fmt: skip
        asked = recipe.with_(method=method)
        if not measured:
            measured.append(pruned_densities(asked, family, observation))
        return plan(family, scale, parametrization, optimizer, asked, observation=observation, pruned=measured[0])

    return planner
