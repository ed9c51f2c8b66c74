"""Which numbers of a transformers config are width and depth, and the config at another size.

Fields are proposed by name and confirmed by building: the model is built on the meta device with all proposed fields doubled, and
again without each of them. A field that changes neither a parameter's shape nor a number that a module keeps (its head count) is
not read, and is left out. Nested configs are seen flat: ``text_config.hidden_size`` is one field.
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

from mutransfer.errors import RequestError, nearest
from mutransfer.scale import Scale

from .importing import said

__all__ = ["Fields", "Whole", "flat", "infer", "resized", "describe_changes"]

Whole = int | list[int]


@dataclass(frozen=True)
class Fields:
    """What grows in one config, with its values there.

    Args:
        width: field → value; the first is the unit that a family's width counts in.
        depth: likewise; empty if the architecture has no number of layers.
        head_dims: (name, base, at double width) of every head dim that modules keep.
    """

    width: dict[str, Whole]
    depth: dict[str, Whole]
    head_dims: tuple[tuple[str, int, int], ...] = ()

    def between(self, base: Scale, target: Scale) -> dict[str, dict[str, tuple[Whole, Whole]]]:
        """Return (at base, at target) of every field that grows, as ``width``, ``depth`` and ``head_dim``."""
        old, new = self.at(base.width, base.depth), self.at(target.width, target.depth)
        heads: dict[str, tuple[Whole, Whole]] = {}
        for name, own, doubled in self.head_dims:
            sizes = [own * scale.width // self.size[0] if doubled > own else own for scale in (base, target)]
            heads[name] = sizes[0], sizes[1]
        return {
            "width": {name: (old[name], new[name]) for name in self.width},
            "depth": {name: (old[name], new[name]) for name in self.depth},
            "head_dim": heads,
        }

    @property
    def size(self) -> tuple[int, int]:
        """The config's own width and depth."""
        return _unit(self.width), _unit(self.depth) if self.depth else 1

    def at(self, width: int, depth: int) -> dict[str, Whole]:
        """Return every growing field's value at another width and depth.

        Raises:
            RequestError: one of them would not be whole, with the multiple that the width or depth must be of.
        """
        own_width, own_depth = self.size
        if depth != own_depth and not self.depth:
            raise RequestError(
                f"depth {depth}: the config has no field for its number of layers, so leave the depth out."
            )
        grown = {name: _times(name, value, "width", width, own_width, self.width) for name, value in self.width.items()}
        return grown | {
            name: _times(name, value, "depth", depth, own_depth, self.depth) for name, value in self.depth.items()
        }


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of a config and of the configs nested in it."""
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def resized(config: dict[str, Any], changes: dict[str, Whole], depth: Container[str]) -> dict[str, Any]:
    """Return a copy of a config with ``changes`` to its flat fields; what is listed per layer follows those in ``depth``."""
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
                        new[listed] = _relayered(layers, value)
    for folder in {name.partition(".")[0] for name in changes if "." in name}:
        inside = f"{folder}."
        inner = {name.removeprefix(inside): value for name, value in changes.items() if name.startswith(inside)}
        new[folder] = resized(config[folder], inner, {name for name in inner if inside + name in depth})
    return new


def _relayered(layers: list[Any], count: int) -> list[Any]:
    """Repeat a periodic stack; stretch one that is not, so that each kind of layer keeps its place and share."""
    period = next(p for p in range(1, len(layers) + 1) if all(a == b for a, b in zip(layers, layers[p:], strict=False)))
    if period <= len(layers) // 2:
        return [layers[i % period] for i in range(count)]
    return [layers[i * len(layers) // count] for i in range(count)]


def describe_changes(changes: dict[str, dict[str, tuple[Whole, Whole]]]) -> str:
    """Return what `Fields.between` found as one line."""

    def listed(kind: str) -> str:
        return ", ".join(
            f"{name} {old}→{new}" if old != new else f"{name} {old}" for name, (old, new) in changes[kind].items()
        )

    heads = [
        f"{name.replace('_', ' ')} {f'stays {old}' if old == new else f'grows {old}→{new}'}"
        for name, (old, new) in changes["head_dim"].items()
    ]
    return "; ".join([f"grows with width: {listed('width')}", *heads, f"depth: {listed('depth') or 'no field'}"])


def _times(name: str, value: Whole, axis: str, size: int, own: int, all_of_them: dict[str, Whole]) -> Whole:
    entries = value if isinstance(value, list) else [value]
    if any(entry * size % own for entry in entries):
        step = math.lcm(*(own // math.gcd(own, entry) for other in all_of_them.values() for entry in _entries(other)))
        odd = next(entry for entry in entries if entry * size % own)
        raise RequestError(
            f"{axis} {size} would make {name} {odd}·{size}/{own} = {odd * size / own:.4g}: use a multiple of {step}, or say "
            f"with --{axis}-field what is to grow."
        )
    grown = [entry * size // own for entry in entries]
    return grown if isinstance(value, list) else grown[0]


def _entries(value: Whole) -> list[int]:
    return value if isinstance(value, list) else [value]


def _unit(fields: dict[str, Whole]) -> int:
    return _entries(next(iter(fields.values())))[0]


# Changed fields, and those of them that count layers → the model.
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
FEW = 8  # layers in which most fields show what they do


@dataclass(frozen=True)
class Signature:
    """A model of one size: the shapes of its parameters, the whole numbers its modules keep, and where its classes are."""

    numbers: dict[str, Any]
    modules: set[str]

    @functools.cached_property
    def source(self) -> str:
        """The source of all its classes."""
        return "".join(
            inspect.getsource(sys.modules[name]) for name in self.modules if name.startswith("transformers.")
        )

    def head_dims(self, wider: Signature) -> tuple[tuple[str, int, int], ...]:
        """Return (name, here, in the ``wider`` model) of every head dim that a module keeps."""
        found = {
            (name, value, wider.numbers[path])
            for path, value in self.numbers.items()
            if path in wider.numbers and HEAD_DIM.fullmatch(name := path.rpartition(".")[2])
        }
        return tuple(sorted(found))

    @property
    def shapes(self) -> list[Any]:
        """The parameters' shapes."""
        return [value for value in self.numbers.values() if isinstance(value, tuple)]


class Probe:
    """The model with some of its fields doubled, built without memory; ``few`` builds its first layers alone."""

    def __init__(self, build: Build, whole: dict[str, Whole], deep: list[str]) -> None:
        self._build, self._whole, self._deep = build, whole, deep
        self._few: dict[str, Whole] = {
            name: FEW for name in deep if isinstance(value := whole[name], int) and value > FEW
        }
        self._known: dict[tuple[frozenset[str], bool], Signature] = {}
        try:
            self.base = self.doubled([])
        except Exception:
            self._few = {}  # some stacks cannot be cut
            self.base = self.doubled([])

    def doubled(self, names: Iterable[str], few: bool = True) -> Signature:
        key = frozenset(names), few and bool(self._few)
        if key not in self._known:
            own = self._whole | self._few if few else self._whole
            changes = (self._few if few else {}) | {name: _double(own[name]) for name in key[0]}
            with torch.device("meta"):
                model = self._build(changes, self._deep)
            numbers: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            for path, module in model.named_modules():
                numbers |= {f"{path}.{name}": value for name, value in vars(module).items() if type(value) is int}
            self._known[key] = Signature(numbers, {type(module).__module__ for module in model.modules()})
        return self._known[key]

    def reads(self, name: str, names: list[str]) -> bool:
        """Say whether it makes a difference to leave ``name`` out of the ``names`` that are doubled."""
        shapeless = name in self._deep or HEADS.fullmatch(_leaf(name))
        if shapeless and f"self.config.{_leaf(name)}" in self.base.source:
            return True  # perhaps only in the forward pass
        others = [other for other in names if other != name]
        try:  # what shows in no early layer may be read in a later one
            return any(self.doubled(names, few).numbers != self.doubled(others, few).numbers for few in (True, False))
        except Exception:
            return True  # the others do not fit without it


def infer(values: dict[str, Any], alias: dict[str, str], build: Build, width: list[str], depth: list[str]) -> Fields:
    """Return what is width and what is depth in a config.

    Args:
        values: the config, flat.
        alias: the config class's own map from common names to its names (``hidden_size`` → ``n_embd``).
        build: the model with some of the fields changed.
        width: the fields that the user names instead, or none.
        depth: likewise.

    Raises:
        RequestError: the model cannot be built, as it is or doubled; a named field is not there, is no number or changes
            nothing; or no field can be describe_changes to be the width.
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
        raise RequestError(f"the config's model cannot be built at its own size: it raised {said(error)}.") from error
    try:
        wider = probe.doubled(wide)
    except Exception as error:
        raise RequestError(
            f"with {', '.join(wide)} doubled the model cannot be built ({said(error)}): say with --width-field what grows."
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
            f"no field of the config is known to be its width ({_nearest('', whole)[:-1]}): use --width-field."
        )
    return Fields(
        {name: whole[name] for name in wide}, {name: whole[name] for name in deep}, probe.base.head_dims(wider)
    )


def _is_width(leaf: str) -> bool:
    return bool(WIDTH.fullmatch(leaf) or HEADS.fullmatch(leaf)) and not HEAD_DIM.fullmatch(leaf)


def _proposed(whole: dict[str, Whole], main: tuple[str | None, ...], fits: Callable[[str], object]) -> list[str]:
    """Fields with a name of the kind, the main one first: the outermost config's, then the text model's."""
    rank = {name: i for i, name in reversed(list(enumerate(main)))}

    def place(name: str) -> tuple[bool, int, bool, int]:
        leaf = _leaf(name)
        return leaf not in rank, name.count("."), not name.startswith(("text_config", "decoder")), rank.get(leaf, 0)

    return sorted((name for name in whole if fits(_leaf(name))), key=place)


def _known(name: str, flag: str, whole: dict[str, Whole], alias: dict[str, str]) -> str:
    name = alias.get(name, name)
    if name not in whole:
        raise RequestError(f"{flag} {name} is no whole number in the config: {_nearest(name, whole)}")
    return name


def _nearest(name: str, whole: Iterable[str]) -> str:
    hint = nearest(name, whole)
    return hint if hint.startswith("known") else f"{hint[:-1]}, one of {', '.join(sorted(whole))}?"


def _is_whole(value: Any) -> bool:
    entries = value if isinstance(value, list) and value else [value]
    return all(type(entry) is int and entry > 0 for entry in entries)


def _double(value: Whole) -> Whole:
    return [2 * entry for entry in value] if isinstance(value, list) else 2 * value


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
