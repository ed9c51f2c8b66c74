"""Plans for models annotated by mup (`set_base_shapes`, `MuReadout`), and mup's base shape files.

`MuReadout` multiplies its input by ``output_mult / width_mult`` in the forward pass (TP-V 2203.03466, Table 8), whereas our plans
fold that factor into the weight (Table 3). The model is not modified, so its readout is planned with the factor in the forward
pass. All other parameters have the settings of the plain family's plan, and training is equivalent to training with mup's
optimizers except for their unscaled epsilon.

Base shape files use mup's format (`mup.shape.save_base_shapes`): YAML, parameter name → one entry per axis, null for an axis
that does not grow and the size at the base for one that does.
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

from ..errors import FileError, LayerError, RequestError, RoleError
from ..family import Family
from ..initialization import Init
from ..io import write_text
from ..optimizers.rules import optimizer_rule
from ..param_names import planned_names
from ..parametrizations.spec import Factors
from ..parametrizations.tables import table
from ..planning.build import finished
from ..planning.builder import PlanBuilder
from ..planning.plan import Plan
from ..recipe import Recipe, Scale
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
        source: the family, which is built on fake tensors at its base width and at twice that width to compare the shapes; or
            the result of `observe` for it, to write the base shapes of another depth.
        path: the output file, conventionally ``*.bsh``.

    Raises:
        BuildError: the family cannot be built.
        LayerError: its parameters differ between widths.
    """
    shapes = _base_shapes(source) if isinstance(source, Family) else _observed(source)
    plain = {name: list(axes) for name, axes in shapes.items()}
    return write_text(path, COMMENT + yaml.safe_dump(plain, indent=4))


def read_bsh(path: str | os.PathLike[str]) -> BaseShapes:
    """Read a base shape file as parameter name → the size of each axis at the base, or None if the axis does not grow.

    Raises:
        FileError: the file is missing, or not in mup's format.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path} ({error.strerror}): pass a base shape file that mup has saved.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise FileError(f"{path} is not YAML: pass a base shape file as saved by mup.make_base_shapes.") from None
    if not isinstance(data, dict) or not data:
        raise FileError(f"{path} does not map parameter names to shapes: save it with mup.make_base_shapes.")
    for name, axes in data.items():
        if not isinstance(axes, list) or not all(_is_axis(size) for size in axes):
            raise FileError(f"{path} gives {name} the shape {axes!r}: expected a list of sizes and nulls.")
    return {str(name): tuple(axes) for name, axes in data.items()}


def based_on(family: Family, shapes: BaseShapes) -> Family:
    """Return ``family`` with its base at the width that has these base shapes, so that `plan` scales relative to it.

    Args:
        family: the model family; its current base gives the depth and the width to start from.
        shapes: result of `read_bsh`.

    Raises:
        LayerError: no width of this family has these shapes; the message names a parameter that differs.
    """
    here = _base_shapes(family)
    owners = planned_names(shapes, here)
    wanted = {owners[name]: axes for name, axes in shapes.items()}
    if unmatched := sorted(wanted.keys() ^ here.keys()):
        where = "the base shapes have" if unmatched[0] in wanted else "the model has"
        raise LayerError(
            f"{where} a parameter {unmatched[0]!r} that the other lacks: pass the base shapes of this model and depth."
        )
    for name, axes in wanted.items():
        _check_growing_axes(name, axes, here[name])
    # Most axes are proportional to the width; one that is not (a square, an offset) may come first.
    pairs = ((a, b) for name in here for a, b in zip(wanted[name], here[name], strict=True) if a and b)
    widths = Counter(max(1, round(family.base.width * a / b)) for a, b in pairs) or Counter([family.base.width])
    tried = [(width, _base_shapes(_with_width(family, width))) for width, _ in widths.most_common(2)]
    for width, found in tried:
        if found == wanted:
            return _with_width(family, width)
    width, found = tried[0]
    name = next(name for name in found if found[name] != wanted[name])
    raise LayerError(
        f"{name} has the base shape {_format_axes(wanted[name])}, but {_format_axes(found[name])} in {family.name} at width "
        f"{width}: pass the base shapes of this family, or change its fixed sizes."
    )


def _with_width(family: Family, width: int) -> Family:
    return family.with_base(family.base.with_(width=width))


def _base_shapes(family: Family) -> BaseShapes:
    with on_fake_tensors():
        base, wider = (
            shapes_of(build(family, family.base.with_(width=times * family.base.width))) for times in (1, WIDER)
        )
    if unmatched := sorted(base.keys() ^ wider.keys()):
        raise LayerError(
            f"{unmatched[0]} exists at one width but not at another: a family must have the same parameters at every width."
        )
    return {name: tuple(a if a != b else None for a, b in zip(base[name], wider[name], strict=True)) for name in base}


def _observed(seen: Observation) -> BaseShapes:
    return {
        name: tuple(size if grows else None for size, grows in zip(spec.shape, spec.grows, strict=True))
        for name, spec in seen.specs.items()
    }


def _check_growing_axes(name: str, wanted: tuple[int | None, ...], here: tuple[int | None, ...]) -> None:
    if [size is None for size in wanted] != [size is None for size in here]:
        raise LayerError(
            f"{name} has the base shape {_format_axes(wanted)}, but {_format_axes(here)} in the model: different axes grow, so "
            "these are the base shapes of another model."
        )


def _is_axis(size: Any) -> bool:
    return size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)


def _format_axes(axes: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("fixed" if size is None else str(size) for size in axes) + "]"


# Modules that sum over the second axis of their weights.
CONTRACTING = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)
ALPHAS = ("alpha_input", "alpha_attention", "alpha_output")


def plan_annotated(
    model: nn.Module, optimizer: str = "adamw", recipe: Recipe | str | os.PathLike[str] | None = None
) -> Plan:
    """Return the "mup" plan of a model whose parameters have mup's ``infshape``, keeping its forward multipliers.

    The weights remain as mup and the user have set them: the plan's ``init`` describes them (mean and standard deviation), and
    nothing needs to be initialized. The equivalent model with a readout without a multiplier, as planned by `plan`, has
    ``output_mult / width_mult`` multiplied into the weight of `MuReadout`, and `nn.Linear` in its place.

    Args:
        model: a model on which ``mup.set_base_shapes(model, base, delta=...)`` was called.
        optimizer: name of a torch optimizer in lower case.
        recipe: hyperparameters at base scale, or the path of a saved recipe.

    Raises:
        RequestError: a parameter has no base shapes, base shapes that do not fit it, or more than two growing axes; no axis
            grows; or the recipe sets a multiplier that the annotated model applies itself.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe() if recipe is None else Recipe.load(recipe)
    if changed := [name for name in ALPHAS if getattr(recipe, name) != 1]:
        raise RequestError(
            f"the recipe has {changed[0]} {getattr(recipe, changed[0]):g}: an annotated model applies its multipliers in "
            "its forward pass (MuReadout's output_mult), so set it there and leave it at 1 in the recipe."
        )
    specs = _specs(model)
    growing = [(d.base_dim, d.dim) for p in model.parameters() for d in p.infshape if d.isinf()]  # type: ignore[attr-defined]
    if not growing:
        raise RequestError(
            "no axis of the annotated model grows: set_base_shapes was given None or the model itself, so pass a narrower "
            "base, and a delta that differs from it."
        )
    if recipe.method.name != "backprop":
        raise RequestError(
            f"the method {recipe.method.name} has no rule for models annotated by mup: plan the plain model as a Family."
        )
    base, width = growing[-1]  # only shown in the plan's title; each axis has its own ratio
    seen = Observation(
        specs=specs,
        queries=frozenset(),
        shared_queries=frozenset(),
        heads=Heads(),  # attention is scaled in the model, as mup requires
    )
    rules, rule = table("mup"), optimizer_rule(optimizer, recipe)
    inits = {name: spec.init for name, spec in specs.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    builder = PlanBuilder(rules, rule, recipe, seen, Scale(width), Scale(base), shapes, {name: name for name in shapes})
    folded = finished(builder, optimizer, inits)
    kind, rows, notes = rule.fold, [], list(folded.notes)
    for row in folded.rows:
        if row.role == "output":
            unfolded = Factors().folded(row.m_in, kind)
            notes.append(
                f"{row.name} keeps MuReadout's factor 1/{row.m_in:g} in the forward pass; its settings account for that."
            )
            row = row.times(unfolded)
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
            tied=False,  # MuSharedReadout scales its input, so the matrix itself remains an embedding
            carriers=frozenset(),
            on_data=False,
        )
    return specs


def _infinite(name: str, parameter: Any) -> tuple[tuple[int, ...], list[int]]:
    """Return the shape at the base and the axes that grow."""
    infshape = getattr(parameter, "infshape", None)
    if infshape is None:
        raise LayerError(
            f"{name} {list(parameter.shape)} has no base shapes: call mup.set_base_shapes(model, base, delta=delta) after "
            "anything that creates new parameters (deepcopy, to_empty, sharding), or plan the model's family, which needs none."
        )
    if list(infshape.shape()) != list(parameter.shape):
        raise LayerError(
            f"{name} has shape {list(parameter.shape)} and base shapes for {list(infshape.shape())}: call mup.set_base_shapes "
            "on this model."
        )
    shape = tuple(dim.base_dim if dim.isinf() else dim.dim for dim in infshape)
    return shape, [axis for axis, dim in enumerate(infshape) if dim.isinf()]


def _role(name: str, parameter: Any, infinite: list[int], owners: list[nn.Module]) -> tuple[str, tuple[str, ...]]:
    """Return the role and the axes of a parameter.

    The fan-in is a matrix's second axis, except in transposed convolutions. Readouts are the weights of `MuReadout`.
    """
    if len(infinite) > 2:
        raise RoleError(
            f"{name} {list(parameter.shape)} has {len(infinite)} growing axes: mup and our tables support at most two."
        )
    readout = all(isinstance(owner, MuReadout) for owner in owners)
    linear = any(isinstance(owner, CONTRACTING) and not isinstance(owner, MuReadout) for owner in owners)
    transposed = next((owner for owner in owners if isinstance(owner, _ConvTransposeNd)), None)
    axes = ["each"] * parameter.dim()
    if not infinite:
        return "finite", tuple(axes)
    if len(infinite) == 2:
        into = 0 if transposed else parameter.infshape.main_idx
        return "hidden", tuple("in" if axis == into else "out" for axis in range(parameter.dim()))
    if parameter.dim() == 1:
        return "vector", tuple(axes)
    grows_in = infinite == [1] and (readout or linear)
    if transposed:
        grows_in = infinite == [0] and not _groups_grow(name, parameter, transposed)
    axes = ["in" if (axis in infinite) == grows_in else "out" for axis in range(parameter.dim())]
    return ("output" if readout else "bottleneck") if grows_in else "input", tuple(axes)


def _groups_grow(name: str, parameter: Any, module: _ConvTransposeNd) -> bool:
    """Return whether a transposed convolution [in, out / groups, ...] with fixed out / groups has more groups than its base."""
    base = parameter.infshape[0].base_dim
    if module.groups == 1 or base % module.groups:
        return module.groups > 1
    bias = getattr(module.bias, "infshape", None)
    if bias is None:
        raise RoleError(
            f"cannot infer whether the groups of {name} {list(parameter.shape)} grow with the width: give it a bias, whose "
            "base shape shows it, or plan the model's family."
        )
    return any(dim.isinf() for dim in bias)


def _measured(parameter: torch.Tensor) -> Init:
    values = parameter.detach().double()
    mean = values.mean().item()
    spread = values.std(correction=0).item()
    return Init("normal", mean, spread) if spread > 0 else Init("constant", mean)
