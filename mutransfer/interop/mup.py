"""A model that mup has annotated (`set_base_shapes`, `MuReadout`), planned as it stands.

`MuReadout` multiplies its input by ``output_mult / width_mult`` in the forward pass (TP-V 2203.03466, Table 8), where our plans
fold that factor into the weight (Table 3). The model is not changed, so its readout is planned in the former gauge: everything
else has the settings of the plain family's plan, and training equals mup's own optimizers up to their unscaled epsilon.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from mup.layer import MuReadout
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import RequestError
from ..inits import Init
from ..observing.heads import Heads
from ..observing.specs import Observation, ParamSpec
from ..optimizers.rules import optimizer_rule
from ..parametrizations.spec import Factors
from ..parametrizations.tables import table
from ..planning.build import finished
from ..planning.builder import Draft
from ..planning.plan import Plan
from ..recipe import Recipe
from ..scale import Scale
from .bsh import BaseShapes, based_on, read_bsh, write_bsh

__all__ = ["BaseShapes", "based_on", "plan_annotated", "read_bsh", "write_bsh"]

CONTRACTING = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)  # whose second axis is summed over
ALPHAS = ("alpha_input", "alpha_attention", "alpha_output")


def plan_annotated(
    model: nn.Module, optimizer: str = "adamw", recipe: Recipe | str | os.PathLike[str] | None = None
) -> Plan:
    """Plan a model whose parameters carry mup's ``infshape``, under "mup", with its forward multipliers left in.

    The weights are those mup and the user have set: the plan's ``init`` describes them (mean and standard deviation), and
    there is nothing to initialize. A readout without a multiplier, as `plan` gives it, is the same model with
    ``output_mult / width_mult`` multiplied into the weight of `MuReadout` and `nn.Linear` in its place.

    Args:
        model: on which ``mup.set_base_shapes(model, base, delta=...)`` was called.
        optimizer: name of a torch optimizer in lower case.
        recipe: hyperparameters at base scale, or the path of a saved recipe.

    Raises:
        RequestError: a parameter without base shapes, or with ones that do not fit it; no axis that grows; more than two;
            a multiplier in the recipe that is the annotated model's own business.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe() if recipe is None else Recipe.load(recipe)
    if changed := [name for name in ALPHAS if getattr(recipe, name) != 1]:
        raise RequestError(
            f"the recipe has {changed[0]} {getattr(recipe, changed[0]):g}: an annotated model has its multipliers in its own "
            "forward pass (MuReadout's output_mult), so set it there and leave it at 1 in the recipe."
        )
    specs = _specs(model)
    growing = [(d.base_dim, d.dim) for p in model.parameters() for d in p.infshape if d.isinf()]  # type: ignore[attr-defined]
    if not growing:
        raise RequestError(
            "no axis of the annotated model grows: set_base_shapes was given None or the model itself, so pass a narrower "
            "base, and a delta that differs from it."
        )
    base, width = growing[-1]  # for the plan's title; every axis counts by its own ratio
    seen = Observation(
        specs=specs,
        queries=frozenset(),
        shared_queries=frozenset(),
        heads=Heads(),  # attention is scaled in the model, as mup asks for
    )
    rules, rule = table("mup"), optimizer_rule(optimizer, recipe)
    inits = {name: spec.init for name, spec in specs.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    draft = Draft(rules, rule, recipe, seen, Scale(width), Scale(base), shapes, {name: name for name in shapes})
    folded = finished(draft, optimizer, inits)
    kind, rows, notes = rule.fold, [], list(folded.notes)
    for row in folded.rows:
        if row.role == "output":
            back = Factors().folded(row.m_in, kind)
            notes.append(f"{row.name} keeps MuReadout's factor 1/{row.m_in:g} in the forward pass, and is planned so.")
            row = row.times(back)
        rows.append(replace(row, init=specs[row.name].init))
    return replace(folded, rows=tuple(rows), notes=tuple(notes))


def _specs(model: nn.Module) -> dict[str, ParamSpec]:
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(module)
    specs = {}
    for name, parameter in model.named_parameters():
        shape, infinite = _infinite(name, parameter)
        role, axes = _role(name, parameter, infinite, owners[id(parameter)])
        specs[name] = ParamSpec(
            name=name,
            shape=shape,
            role=role,
            axes=axes,
            grows=tuple(axis in infinite for axis in range(len(shape))),
            init=_measured(parameter),
            tied=False,  # MuSharedReadout scales its input, so that the matrix itself stays an embedding
            carriers=frozenset(),
            on_data=False,
        )
    return specs


def _infinite(name: str, parameter: Any) -> tuple[tuple[int, ...], list[int]]:
    """Shape at the base and the axes that grow."""
    infshape = getattr(parameter, "infshape", None)
    if infshape is None:
        raise RequestError(
            f"{name} {list(parameter.shape)} has no base shapes: call mup.set_base_shapes(model, base, delta=delta), after "
            "anything that makes new parameters (deepcopy, to_empty, sharding), or plan the model's family, which needs none."
        )
    if list(infshape.shape()) != list(parameter.shape):
        raise RequestError(
            f"{name} has shape {list(parameter.shape)} and base shapes for {list(infshape.shape())}: call mup.set_base_shapes "
            "on this very model."
        )
    shape = tuple(dim.base_dim if dim.isinf() else dim.dim for dim in infshape)
    return shape, [axis for axis, dim in enumerate(infshape) if dim.isinf()]


def _role(name: str, parameter: Any, infinite: list[int], owners: list[nn.Module]) -> tuple[str, tuple[str, ...]]:
    """Role and axes: fan-in is a matrix's second axis, but for transposed convolutions; a readout is what MuReadout holds."""
    if len(infinite) > 2:
        raise RequestError(
            f"{name} {list(parameter.shape)} has {len(infinite)} growing axes: mup and our tables know two."
        )
    readout = all(isinstance(owner, MuReadout) for owner in owners)
    linear = any(isinstance(owner, CONTRACTING) and not isinstance(owner, MuReadout) for owner in owners)
    turned = next((owner for owner in owners if isinstance(owner, _ConvTransposeNd)), None)
    axes = ["each"] * parameter.dim()
    if not infinite:
        return "finite", tuple(axes)
    if len(infinite) == 2:
        into = 0 if turned else parameter.infshape.main_idx
        return "hidden", tuple("in" if axis == into else "out" for axis in range(parameter.dim()))
    if parameter.dim() == 1:
        return "vector", tuple(axes)
    inward = infinite == [1] and (readout or linear)
    if turned:
        inward = infinite == [0] and not _more_groups(name, parameter, turned)
    axes = ["in" if (axis in infinite) == inward else "out" for axis in range(parameter.dim())]
    return ("output" if readout else "bottleneck") if inward else "input", tuple(axes)


def _more_groups(name: str, parameter: Any, module: _ConvTransposeNd) -> bool:
    """Say whether a transposed convolution [in, out / groups, ...] of fixed out / groups has more groups than its base."""
    base = parameter.infshape[0].base_dim
    if module.groups == 1 or base % module.groups:
        return module.groups > 1
    bias = getattr(module.bias, "infshape", None)
    if bias is None:
        raise RequestError(
            f"cannot tell whether the groups of {name} {list(parameter.shape)} grow with the width: give it a bias, whose "
            "base shape says so, or plan the model's family."
        )
    return any(dim.isinf() for dim in bias)


def _measured(parameter: torch.Tensor) -> Init:
    values = parameter.detach().double()
    mean = values.mean().item()
    spread = values.std(correction=0).item()
    return Init("normal", mean, spread) if spread > 0 else Init("constant", mean)
