"""Which layer of the base model a layer of a deeper one is scaled from: matched by pattern, not by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import RequestError

__all__ = ["match_layers"]

Tree = dict[str, Any]  # a name's parts → subtree; at a leaf, under "", (full name, number of axes)


def match_layers(target: Mapping[str, int], base: Mapping[str, int]) -> dict[str, str]:
    """Return for every parameter of the target the one of the base that it is scaled from.

    Layers are the numbered parts of a name. The same number is taken where the layer looks alike (the same parameters
    within it, with the same number of axes); otherwise the one that the layer would be if the base's stack went on
    periodically, otherwise the last that looks alike.

    Args:
        target: name → number of axes.
        base: likewise.

    Raises:
        RequestError: a parameter on one side has no counterpart on the other.
    """
    if target.keys() == base.keys():
        return {name: name for name in target}
    found = dict(_matched(_tree(target), _tree(base)))
    missing = sorted(set(base) - set(found.values()))
    if missing:
        raise RequestError(f"{missing[0]} is in the base and has no counterpart in the target: build the same modules.")
    return {name: found[name] for name in target}


def _tree(names: Mapping[str, int]) -> Tree:
    root: Tree = {}
    for name, axes in names.items():
        node = root
        for part in name.split("."):
            node = node.setdefault(part, {})
        node[""] = (name, axes)
    return root


def _matched(target: Tree, base: Tree) -> Iterable[tuple[str, str]]:
    looks = {key: _looks(value) for key, value in base.items() if key.isdigit()}
    for key, value in target.items():
        if key == "" and "" in base:
            yield value[0], base[""][0]
        elif key.isdigit() and looks:
            yield from _matched(value, base[_layer(int(key), _looks(value), looks, value)])
        elif key != "" and key in base:
            yield from _matched(value, base[key])
        else:
            raise _unmatched(target if key == "" else value)


def _layer(number: int, look: frozenset[Any], looks: dict[str, frozenset[Any]], value: Tree) -> str:
    alike = [key for key, other in looks.items() if other == look]
    if not alike:
        raise _unmatched(value)
    periodic = str(number % len(looks))
    return next((key for key in (str(number), periodic) if key in alike), alike[-1])


def _unmatched(tree: Tree) -> RequestError:
    name = next(iter(_leaves(tree)))[0]
    return RequestError(
        f"{name} is in the target and nothing in the base looks like it: give a base depth that has every kind of layer."
    )


def _looks(tree: Tree) -> frozenset[Any]:
    """What a layer is made of, whatever its own number and those within it."""
    return frozenset((tuple("#" if part.isdigit() else part for part in path), axes) for _, path, axes in _leaves(tree))


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterable[tuple[str, tuple[str, ...], int]]:
    for key, value in tree.items():
        if key == "":
            yield value[0], path, value[1]
        else:
            yield from _leaves(value, (*path, key))
