"""Training methods beside backpropagation: what they need before and while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mutransfer.family import Family
from mutransfer.methods import ForwardGradient, Method, Pruned
from mutransfer.planning.build import plan
from mutransfer.planning.plan import Plan, matched
from mutransfer.recipe import Recipe, Scale
from mutransfer.tracing.specs import Observation

from .forward_gradient import forward_gradients
from .pruned import layer_densities

__all__ = ["gradients_for", "planner_for", "pruned_densities"]


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


Gradients = Callable[[nn.Module, Any, int], Tensor]


def gradients_for(plan: Plan, family: Family, seed: int, of: str) -> Gradients:
    """Return a function of (model, batch, step) that sets the gradients of a model and returns its loss.

    Args:
        plan: the plan of the model, whose recipe names the method.
        family: provides the loss.
        seed: seed of random numbers that the method draws.
        of: describes the batches in error messages.
    """
    method = plan.recipe.method
    if not isinstance(method, ForwardGradient):

        def backpropagated(model: nn.Module, batch: Any, step: int) -> Tensor:
            loss = family.loss_on(model, batch, of)
            model.zero_grad(set_to_none=True)
            loss.backward()
            return loss

        return backpropagated
    scales = {row.name: row.tangent for row in plan.rows}

    def estimated(model: nn.Module, batch: Any, step: int) -> Tensor:
        planned = {id(each): scales[name] for name, each in matched(plan, model).items()}
        own = {name: planned[id(each)] for name, each in model.named_parameters() if each.requires_grad}
        return forward_gradients(method, model, family.loss, batch, own, seed, step)

    return estimated


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
