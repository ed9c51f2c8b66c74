"""Telling which numbers of a config are width and depth: proposed by name, confirmed by building.

The model is built on the meta device with all proposed fields doubled, and again without each of them: a field that changes
neither a parameter's shape nor a number that a module keeps (its head count) is not read, and is left out.
"""

from __future__ import annotations

import contextlib
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

Build = Callable[
    [dict[str, Whole], Container[str]], torch.nn.Module
]  # changed fields, those that count layers → the model

WIDTH = re.compile(
    r"(\w+_)?(hidden_sizes?|hidden_dims?|hidden_channels|intermediate_size|intermediate_dim|d_model|n_embd|d_embed|embed_dims?"
    r"|embedding_size|embedding_dim|embed_proj_dim|ffn?_dim|ffn_hidden_size|d_ff|d_inner|n_inner|mlp_dim|projection_dim"
    r"|projection_size|proj_size|pooler_output_size|lru_width|conv_dim)|dim"
)
HEADS = re.compile(r"(\w+_)?(n|num)_(\w+_)?heads?(_kv)?|(\w+_)?attention_heads")
DEPTH = re.compile(r"((encoder|decoder)_)?((num|n)_)?((hidden|encoder|decoder)_)?layers?|depths?|num_blocks")
HEAD_DIM = re.compile(r"(qk_|v_)?head_dim|attention_head_size|head_size|key_value_proj_dim|d_head")
MAIN_WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "hidden_sizes", "embed_dims")
MAIN_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depths", "depth")


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


def infer(values: dict[str, Any], alias: dict[str, str], build: Build, width: list[str], depth: list[str]) -> Fields:
    """Return what is width and what is depth in a config.

    Args:
        values: the config, flat.
        alias: the config class's own map from common names to its names (``hidden_size`` → ``n_embd``).
        build: the model with some of the fields changed.
        width: the fields that the user names instead, or none.
        depth: likewise.

    Raises:
        RequestError: a named field is not there, is no number or changes nothing; no field can be told to be the width;
            or the doubled model cannot be built.
    """
    whole = {name: value for name, value in values.items() if _is_whole(value)}
    wide = [_known(name, "--width-field", whole, alias) for name in width] or _proposed(
        whole, (alias.get("hidden_size"), *MAIN_WIDTH), lambda leaf: bool(WIDTH.fullmatch(leaf) or HEADS.fullmatch(leaf))
        and not HEAD_DIM.fullmatch(leaf),
    )  # fmt: skip
    deep = [_known(name, "--depth-field", whole, alias) for name in depth] or _proposed(
        whole, (alias.get("num_hidden_layers"), *MAIN_DEPTH), lambda leaf: bool(DEPTH.fullmatch(leaf))
    )
    stages = [len(value) for name, value in whole.items() if name in deep and isinstance(value, list)]
    deep = [name for name in deep if depth or whole[name] not in stages]  # a number of stages, not of layers
    if not wide:
        raise RequestError(
            f"no field of the config has the name of a width ({_some(whole)}): name it with --width-field."
        )
    base = _signature(build, {}, deep)
    wide, wider = _confirmed(build, base, whole, list(wide), "--width-field", given=bool(width))
    deep, _ = _confirmed(build, base, whole, list(deep), "--depth-field", given=bool(depth))
    if not wide:
        raise RequestError(
            f"no field of the config changes the model's width ({_some(whole)}): name it with --width-field."
        )
    return Fields({name: whole[name] for name in wide}, {name: whole[name] for name in deep}, _head_dims(base, wider))


def _confirmed(
    build: Build, base: Signature, whole: dict[str, Whole], names: list[str], flag: str, *, given: bool
) -> tuple[list[str], Signature]:
    """Return those of ``names`` that the model reads, and the model's signature with all of them doubled."""
    layers = names if flag == "--depth-field" else ()
    try:
        doubled = _signature(build, {name: _double(whole[name]) for name in names}, layers)
    except Exception as error:
        if layers:
            return names, base  # a model that cannot be deeper can still be wider
        raise RequestError(
            f"with {', '.join(names)} doubled the model cannot be built ({said(error)}): say what grows together with {flag}."
        ) from error

    def read(name: str) -> bool:
        if f"self.config.{_leaf(name)}" in base.source:
            return True  # also where only the forward pass reads it
        with contextlib.suppress(Exception):  # without this field the others do not fit: it is read
            changes = {other: _double(whole[other]) for other in names if other != name}
            return _signature(build, changes, layers).numbers != doubled.numbers
        return True

    idle = [name for name in names if not read(name)]
    if idle and given:
        raise RequestError(
            f"{flag} {idle[0]} changes nothing in this model: {_nearest(idle[0], set(whole) - set(idle))}"
        )
    return [name for name in names if name not in idle], doubled


def _proposed(whole: dict[str, Whole], main: tuple[str | None, ...], fits: Callable[[str], bool]) -> list[str]:
    """Fields with a name of the kind, the main one first: the outermost config's, then the text model's."""
    rank = {name: i for i, name in reversed(list(enumerate(main)))}

    def place(name: str) -> tuple[bool, int, bool]:
        return _leaf(name) not in rank, name.count("."), not name.startswith(("text_config", "decoder"))

    return sorted(
        filter(lambda name: fits(_leaf(name)), whole), key=lambda name: (*place(name), rank.get(_leaf(name), 0))
    )


def _known(name: str, flag: str, whole: dict[str, Whole], alias: dict[str, str]) -> str:
    name = alias.get(name, name)
    if name not in whole:
        raise RequestError(f"{flag} {name} is no whole number in the config: {_nearest(name, whole)}")
    return name


def _nearest(name: str, whole: Iterable[str]) -> str:
    hint = nearest(name, whole)
    return hint if hint.startswith("known") else f"{hint[:-1]}, of {', '.join(sorted(whole))}?"


def _signature(build: Build, changes: dict[str, Whole], layers: Container[str]) -> Signature:
    with torch.device("meta"):
        model = build(changes, layers)
    numbers: dict[str, Any] = {
        f"{path}.{name}": value for path, module in model.named_modules() for name, value in vars(module).items()
        if type(value) is int
    }  # fmt: skip
    numbers |= {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Signature(numbers, {type(module).__module__ for module in model.modules()})


def _head_dims(base: Signature, wider: Signature) -> tuple[tuple[str, int, int], ...]:
    seen = {
        (path.rpartition(".")[2], value, wider.numbers.get(path, value))
        for path, value in base.numbers.items() if HEAD_DIM.fullmatch(path.rpartition(".")[2])
    }  # fmt: skip
    return tuple(sorted(seen))


def _is_whole(value: Any) -> bool:
    entries = value if isinstance(value, list) and value else [value]
    return all(type(entry) is int and entry > 0 for entry in entries)


def _double(value: Whole) -> Whole:
    return [2 * entry for entry in value] if isinstance(value, list) else 2 * value


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _some(whole: Iterable[str]) -> str:
    return f"known are {', '.join(sorted(whole))}"
