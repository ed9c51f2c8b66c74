"""mup's base shape files: which axes of every parameter grow, and how large they are at the base.

The format is mup's own (`mup.shape.save_base_shapes`): YAML, parameter name → one entry per axis, null for an axis that
does not grow and its size at the base for one that does.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ..errors import RequestError
from ..family import Family
from ..files import write_text
from ..names import planned_names
from ..observing.building import on_fake_tensors
from ..observing.observe import shapes_of
from ..observing.running import WIDER, build
from ..observing.specs import Observation

__all__ = ["BaseShapes", "based_on", "read_bsh", "write_bsh"]

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
