"""A model that mup has annotated (`set_base_shapes`, `MuReadout`), planned as it stands.

`MuReadout` multiplies its input by ``output_mult / width_mult`` in the forward pass (TP-V 2203.03466, Table 8), where our plans
fold that factor into the weight (Table 3). The model is not changed, so its readout is planned in the former gauge: everything
else has the settings of the plain family's plan, and training equals mup's own optimizers up to their unscaled epsilon.

Base shape files are mup's own format (`mup.shape.save_base_shapes`): YAML, parameter name → one entry per axis, null for an axis
that does not grow and its size at the base for one that does.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from mup.layer import MuReadout
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import RequestError
from ..family import Family
from ..initialization import Init
from ..io import write_text
from ..optimizers.rules import optimizer_rule
from ..param_names import planned_names
from ..parametrizations.spec import Factors
from ..parametrizations.tables import table
from ..planning.build import finished
from ..planning.builder import Draft
from ..planning.plan import Plan
from ..recipe import Recipe
from ..scale import Scale
from ..tracing.growing_products import Heads
from ..tracing.observe import shapes_of
from ..tracing.run import WIDER, build, on_fake_tensors
from ..tracing.specs import Observation, ParamSpec

__all__ = ["BaseShapes", "based_on", "plan_annotated", "read_bsh", "write_bsh"]

BaseShapes = dict[str, tuple[int | None, ...]]

COMMENT = "# Base shapes of mup: null for an axis that does not grow, the size at the base for one that does.\n"


def write_bsh(source: Family | Observation, path: str | os.PathLike[str]) -> Path:
    """Write the base shapes of a family as a file that ``mup.set_base_shapes(model, path)`` reads.

    Args:
        source: the family, whose builds at its base and at twice that width are compared on fake tensors; or what
            `observe` returned for it, to write those of another depth.
        path: where to write, conventionally ``*.bsh``.

    Raises:
        RequestError: the family cannot be built, or has other parameters at another width.
    """
    shapes = _base_shapes(source) if isinstance(source, Family) else _observed(source)
    plain = {name: list(axes) for name, axes in shapes.items()}
    return write_text(path, COMMENT + yaml.safe_dump(plain, indent=4))


def read_bsh(path: str | os.PathLike[str]) -> BaseShapes:
    """Read a base shape file: parameter name → the size of each axis at the base, None where it does not grow.

    Raises:
        RequestError: the file is missing, or not in mup's format.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"cannot read {path} ({error.strerror}): give the file that mup saved its shapes in."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise RequestError(f"{path} is not YAML: give a base shape file, as mup.make_base_shapes saves it.") from None
    if not isinstance(data, dict) or not data:
        raise RequestError(f"{path} holds no parameter names with shapes: save it with mup.make_base_shapes.")
    for name, axes in data.items():
        if not isinstance(axes, list) or not all(_is_axis(size) for size in axes):
            raise RequestError(f"{path} gives {name} the shape {axes!r}: expected a list of sizes and nulls.")
    return {str(name): tuple(axes) for name, axes in data.items()}


def based_on(family: Family, shapes: BaseShapes) -> Family:
    """Return ``family`` anchored at the width that has these base shapes, so that `plan` counts from there.

    Args:
        family: the model at any size; its own base gives the depth and a width to start from.
        shapes: what `read_bsh` returned.

    Raises:
        RequestError: no width of this family has these shapes, with the parameter that differs.
    """
    here = _base_shapes(family)
    owners = planned_names(shapes, here)
    wanted = {owners[name]: axes for name, axes in shapes.items()}
    if odd := sorted(wanted.keys() ^ here.keys()):
        where = "the base shapes have" if odd[0] in wanted else "the model has"
        raise RequestError(
            f"{where} a parameter {odd[0]!r} that the other lacks: give the shapes of this model and depth."
        )
    for name, axes in wanted.items():
        _refuse_other_growth(name, axes, here[name])
    # most axes are proportional to the width; one that is not (a square, an offset) may come first
    pairs = ((a, b) for name in here for a, b in zip(wanted[name], here[name], strict=True) if a and b)
    widths = Counter(max(1, round(family.base.width * a / b)) for a, b in pairs) or Counter([family.base.width])
    tried = [(width, _base_shapes(_at(family, width))) for width, _ in widths.most_common(2)]
    for width, found in tried:
        if found == wanted:
            return _at(family, width)
    width, found = tried[0]
    name = next(name for name in found if found[name] != wanted[name])
    raise RequestError(
        f"{name} has the base shape {_show(wanted[name])}, and {_show(found[name])} in {family.name} at width {width}: give the "
        "base shapes of this family, or change its fixed sizes."
    )


def _at(family: Family, width: int) -> Family:
    return family.with_base(family.base.with_(width=width))


def _base_shapes(family: Family) -> BaseShapes:
    with on_fake_tensors():
        base, wider = (
            shapes_of(build(family, family.base.with_(width=times * family.base.width))) for times in (1, WIDER)
        )
    if odd := sorted(base.keys() ^ wider.keys()):
        raise RequestError(
            f"{odd[0]} is there at one width and not at the other: one family must have the same parameters."
        )
    return {name: tuple(a if a != b else None for a, b in zip(base[name], wider[name], strict=True)) for name in base}


def _observed(seen: Observation) -> BaseShapes:
    return {
        name: tuple(size if grows else None for size, grows in zip(spec.shape, spec.grows, strict=True))
        for name, spec in seen.specs.items()
    }


def _refuse_other_growth(name: str, wanted: tuple[int | None, ...], here: tuple[int | None, ...]) -> None:
    if [size is None for size in wanted] != [size is None for size in here]:
        raise RequestError(
            f"{name} has the base shape {_show(wanted)}, and {_show(here)} in the model: other axes grow, so these are the base "
            "shapes of another model."
        )


def _is_axis(size: Any) -> bool:
    return size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)


def _show(axes: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("fixed" if size is None else str(size) for size in axes) + "]"


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
