"""Telling which numbers of a config are width and depth: proposed by name, confirmed by building.

The model is built on the meta device with all proposed fields doubled, and again without each of them: a field that changes
neither a parameter's shape nor a number that a module keeps (its head count) is not read, and is left out.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mutransfer.errors import RequestError, nearest

from .hf_fields import Fields, Whole
from .importing import said

__all__ = ["infer"]

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
            nothing; or no field can be told to be the width.
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
