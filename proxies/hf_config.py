"""Infer which fields of a transformers config are width and depth, and resize the config.

Fields are proposed by name and confirmed by building: the model is built on the meta device with all proposed fields doubled, and
again without each of them. A field that changes neither a parameter's shape nor an integer that a module stores (such as its
number of heads) is not used by the model and is left out. Nested configs are flattened: ``text_config.hidden_size`` is one field.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mutransfer.errors import BuildError, RequestError, closest, nearest
from mutransfer.recipe import Scale

from .importing import describe_exception

__all__ = ["Fields", "Whole", "flat", "infer", "resized", "describe_changes"]

Whole = int | list[int]


@dataclass(frozen=True)
class Fields:
    """The fields of one config that grow with width or depth, and their values in it.

    Args:
        width: field → value; the first field is the unit of a family's width.
        depth: field → value; the first field is the unit of a family's depth. Empty if the config has no number of layers.
        head_dims: (name, value, value at double width) of every head dim that modules store.
    """

    width: dict[str, Whole]
    depth: dict[str, Whole]
    head_dims: tuple[tuple[str, int, int], ...] = ()

    def between(self, base: Scale, target: Scale) -> dict[str, dict[str, tuple[Whole, Whole]]]:
        """Return the values (at base, at target) of every growing field, grouped as ``width``, ``depth`` and ``head_dim``."""
        old, new = self.at(base.width, base.depth), self.at(target.width, target.depth)
        heads: dict[str, tuple[Whole, Whole]] = {}
        for name, dim, doubled in self.head_dims:
            sizes = [dim * scale.width // self.size[0] if doubled > dim else dim for scale in (base, target)]
            heads[name] = sizes[0], sizes[1]
        return {
            "width": {name: (old[name], new[name]) for name in self.width},
            "depth": {name: (old[name], new[name]) for name in self.depth},
            "head_dim": heads,
        }

    @property
    def size(self) -> tuple[int, int]:
        """Width and depth of the config."""
        return _unit(self.width), _unit(self.depth) if self.depth else 1

    def at(self, width: int, depth: int) -> dict[str, Whole]:
        """Return the value of every growing field at another width and depth.

        Raises:
            BuildError: if a value would not be an integer; the message names the number that the width or depth must be a
                multiple of. Also if the depth changes and the config has no field for it.
        """
        config_width, config_depth = self.size
        if depth != config_depth and not self.depth:
            raise BuildError(f"depth {depth}: the config has no field for its number of layers, so omit the depth.")
        grown = {
            name: _times(name, value, "width", width, config_width, self.width) for name, value in self.width.items()
        }
        return grown | {
            name: _times(name, value, "depth", depth, config_depth, self.depth) for name, value in self.depth.items()
        }


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every field of a config and of its nested configs, whose names are joined with a dot."""
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def resized(config: dict[str, Any], changes: dict[str, Whole], depth: Container[str]) -> dict[str, Any]:
    """Return a copy of a config with ``changes`` to its flattened fields.

    Lists with one entry per layer are resized along with the fields in ``depth``.
    """
    new = dict(config)
    for name, value in changes.items():
        if "." not in name:
            new[name] = value
            if name in depth and isinstance(value, int) and value != config[name]:
                for listed, layers in config.items():
                    per_layer = isinstance(layers, list) and (
                        "layer" in listed or all(isinstance(x, str) for x in layers)
                    )
                    if per_layer and len(layers) == config[name] and listed not in changes:
                        new[listed] = _resize_layers(layers, value)
    for nested in {name.partition(".")[0] for name in changes if "." in name}:
        prefix = f"{nested}."
        inner = {name.removeprefix(prefix): value for name, value in changes.items() if name.startswith(prefix)}
        new[nested] = resized(config[nested], inner, {name for name in inner if prefix + name in depth})
    return new


def _resize_layers(layers: list[Any], count: int) -> list[Any]:
    """Return a per-layer list with ``count`` entries.

    A periodic list is repeated. Any other is stretched, so that each kind of layer keeps its place and its share.
    """
    period = next(p for p in range(1, len(layers) + 1) if all(a == b for a, b in zip(layers, layers[p:], strict=False)))
    if period <= len(layers) // 2:
        return [layers[i % period] for i in range(count)]
    return [layers[i * len(layers) // count] for i in range(count)]


def describe_changes(changes: dict[str, dict[str, tuple[Whole, Whole]]]) -> str:
    """Return the result of `Fields.between` as one line of text."""

    def listed(kind: str) -> str:
        return ", ".join(
            f"{name} {old}→{new}" if old != new else f"{name} {old}" for name, (old, new) in changes[kind].items()
        )

    heads = [
        f"{name.replace('_', ' ')} {f'stays {old}' if old == new else f'grows {old}→{new}'}"
        for name, (old, new) in changes["head_dim"].items()
    ]
    return "; ".join([f"grows with width: {listed('width')}", *heads, f"depth: {listed('depth') or 'no field'}"])


def _times(name: str, value: Whole, axis: str, size: int, unit: int, fields: dict[str, Whole]) -> Whole:
    """Return ``value`` · ``size`` / ``unit``, for each entry of a list; ``fields`` are all the fields of the same axis."""
    entries = value if isinstance(value, list) else [value]
    if any(entry * size % unit for entry in entries):
        step = math.lcm(*(unit // math.gcd(unit, entry) for other in fields.values() for entry in _entries(other)))
        uneven = next(entry for entry in entries if entry * size % unit)
        raise BuildError(
            f"{axis} {size} would make {name} {uneven}·{size}/{unit} = {uneven * size / unit:.4g}: use a multiple of {step}, "
            f"or name the fields that grow with --{axis}-field."
        )
    grown = [entry * size // unit for entry in entries]
    return grown if isinstance(value, list) else grown[0]


def _entries(value: Whole) -> list[int]:
    return value if isinstance(value, list) else [value]


def _unit(fields: dict[str, Whole]) -> int:
    return _entries(next(iter(fields.values())))[0]


# Builds the model from the changed fields and the names of the fields that count layers.
Build = Callable[[dict[str, Whole], Container[str]], torch.nn.Module]

WIDTH = re.compile(
    r"(\w+_)?(hidden_sizes?|hidden_dims?|hidden_channels|intermediate_size|intermediate_dim|d_model|n_embd|d_embed|embed_dims?"
    r"|embedding_size|embedding_dim|embed_proj_dim|ffn?_dim|ffn_hidden_size|d_ff|d_inner|d_ssm|n_inner|mlp_dim|projection_dim"
    r"|projection_size|proj_size|pooler_output_size|lru_width|conv_dim)|dim"
)
HEADS = re.compile(r"(\w+_)?(n|num)_(\w+_)?heads?(_kv)?|(\w+_)?attention_heads")
DEPTH = re.compile(r"((encoder|decoder)_)?((num|n)_)?((hidden|encoder|decoder)_)?layers?|depths?|num_blocks")
HEAD_DIM = re.compile(r"(qk_|v_)?head_dim|attention_head_size|head_size|key_value_proj_dim|d_head")
MAIN_WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "hidden_sizes", "embed_dims")
MAIN_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depths", "depth")
FEW = 8  # number of layers in which most fields have an effect


@dataclass(frozen=True)
class Signature:
    """Signature of a model at one size.

    Attributes:
        numbers: shapes of the parameters and integers stored by the modules, by dotted name.
        modules: names of the Python modules that define its classes.
    """

    numbers: dict[str, Any]
    modules: set[str]

    @functools.cached_property
    def source(self) -> str:
        """Source code of the transformers modules that define the model's classes."""
        return "".join(
            inspect.getsource(sys.modules[name]) for name in self.modules if name.startswith("transformers.")
        )

    def head_dims(self, wider: Signature) -> tuple[tuple[str, int, int], ...]:
        """Return (name, value here, value in the ``wider`` model) of every head dim that a module stores."""
        found = {
            (name, value, wider.numbers[path])
            for path, value in self.numbers.items()
            if path in wider.numbers and HEAD_DIM.fullmatch(name := path.rpartition(".")[2])
        }
        return tuple(sorted(found))

    @property
    def shapes(self) -> list[Any]:
        """Shapes of the parameters."""
        return [value for value in self.numbers.values() if isinstance(value, tuple)]


class Probe:
    """Builds the model on the meta device with some of its fields doubled.

    Args:
        build: builds the model with changed fields.
        whole: field → value, for all fields that are positive integers or lists of them.
        deep: the fields that count layers.
    """

    def __init__(self, build: Build, whole: dict[str, Whole], deep: list[str]) -> None:
        self._build, self._whole, self._deep = build, whole, deep
        self._few: dict[str, Whole] = {
            name: FEW for name in deep if isinstance(value := whole[name], int) and value > FEW
        }
        self._known: dict[tuple[frozenset[str], bool], Signature] = {}
        try:
            self.base = self.doubled([])
        except Exception:
            self._few = {}  # some architectures cannot be built with fewer layers
            self.base = self.doubled([])

    def doubled(self, names: Iterable[str], few: bool = True) -> Signature:
        """Return the signature of the model with the fields ``names`` doubled; ``few`` builds only its first layers."""
        key = frozenset(names), few and bool(self._few)
        if key not in self._known:
            values = self._whole | self._few if few else self._whole
            changes = (self._few if few else {}) | {name: _double(values[name]) for name in key[0]}
            with torch.device("meta"):
                model = self._build(changes, self._deep)
            numbers: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            for path, module in model.named_modules():
                numbers |= {f"{path}.{name}": value for name, value in vars(module).items() if type(value) is int}
            self._known[key] = Signature(numbers, {type(module).__module__ for module in model.modules()})
        return self._known[key]

    def reads(self, name: str, names: list[str]) -> bool:
        """Return whether leaving ``name`` out of the doubled fields ``names`` makes a difference to the model."""
        shapeless = name in self._deep or HEADS.fullmatch(_leaf(name))
        if shapeless and f"self.config.{_leaf(name)}" in self.base.source:
            return True  # possibly used in the forward pass only
        others = [other for other in names if other != name]
        try:  # a field without effect in the first layers may be used in a later one
            return any(self.doubled(names, few).numbers != self.doubled(others, few).numbers for few in (True, False))
        except Exception:
            return True  # the other fields do not fit together without it


def infer(values: dict[str, Any], alias: dict[str, str], build: Build, width: list[str], depth: list[str]) -> Fields:
    """Return the width and depth fields of a config.

    Args:
        values: the flattened config.
        alias: the config class's map from common names to its own names (``hidden_size`` → ``n_embd``).
        build: builds the model with changed fields.
        width: width fields named by the user; empty to infer them.
        depth: depth fields named by the user; empty to infer them.

    Raises:
        BuildError: if the model cannot be built as it is or with its width doubled.
        RequestError: if a named field does not exist, is not an integer or changes nothing; or if no field can be identified as
            the width.
    """
    whole = {name: value for name, value in values.items() if _is_whole(value)}
    wide = [_known(name, "--width-field", whole, alias) for name in width] or _proposed(
        whole, (alias.get("hidden_size"), *MAIN_WIDTH), _is_width
    )
    deep = [_known(name, "--depth-field", whole, alias) for name in depth] or _proposed(
        whole, (alias.get("num_hidden_layers"), *MAIN_DEPTH), DEPTH.fullmatch
    )
    try:
        probe = Probe(build, whole, deep)
    except Exception as error:
        raise BuildError(
            f"the config's model cannot be built at its own size: it raised {describe_exception(error)}."
        ) from error
    try:
        wider = probe.doubled(wide)
    except Exception as error:
        raise BuildError(
            f"with {', '.join(wide)} doubled the model cannot be built ({describe_exception(error)}): name the fields that grow "
            "with --width-field."
        ) from error
    if width and wider.shapes == probe.base.shapes:
        raise RequestError(
            f"--width-field {wide[0]} changes no parameter of this model: {_nearest(wide[0], {*whole} - {*wide})}"
        )
    for flag, names in (("--width-field", width and wide), ("--depth-field", depth and deep)):
        if idle := [name for name in names if not probe.reads(name, names)]:
            raise RequestError(
                f"{flag} {idle[0]} changes nothing in this model: {_nearest(idle[0], {*whole} - {*idle})}"
            )
    wide = [name for name in wide if probe.reads(name, wide)]
    deep = [name for name in deep if len(deep) == 1 or probe.reads(name, deep)]
    if not wide:
        raise RequestError(
            f"no field of the config is known to be its width ({_nearest('', whole)[:-1]}): name it with --width-field."
        )
    return Fields(
        {name: whole[name] for name in wide}, {name: whole[name] for name in deep}, probe.base.head_dims(wider)
    )


def _is_width(leaf: str) -> bool:
    return bool(WIDTH.fullmatch(leaf) or HEADS.fullmatch(leaf)) and not HEAD_DIM.fullmatch(leaf)


def _proposed(whole: dict[str, Whole], main: tuple[str | None, ...], fits: Callable[[str], object]) -> list[str]:
    """Return the fields whose name fits, main fields first: those of the outermost config, then those of the text model."""
    rank = {name: i for i, name in reversed(list(enumerate(main)))}

    def sort_key(name: str) -> tuple[bool, int, bool, int]:
        leaf = _leaf(name)
        return leaf not in rank, name.count("."), not name.startswith(("text_config", "decoder")), rank.get(leaf, 0)

    return sorted((name for name in whole if fits(_leaf(name))), key=sort_key)


def _known(name: str, flag: str, whole: dict[str, Whole], alias: dict[str, str]) -> str:
    name = alias.get(name, name)
    if name not in whole:
        raise RequestError(f"{flag} {name} is not an integer field of the config: {_nearest(name, whole)}")
    return name


def _nearest(name: str, whole: Iterable[str]) -> str:
    meant = closest(name, whole)
    return f"did you mean {meant!r}, one of {', '.join(sorted(whole))}?" if meant else nearest(name, whole)


def _is_whole(value: Any) -> bool:
    entries = value if isinstance(value, list) and value else [value]
    return all(type(entry) is int and entry > 0 for entry in entries)


def _double(value: Whole) -> Whole:
    return [2 * entry for entry in value] if isinstance(value, list) else 2 * value


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
