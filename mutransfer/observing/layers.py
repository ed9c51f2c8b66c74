"""Which layer of the base model a layer of a deeper one is scaled from: matched by pattern, not by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import RequestError

__all__ = ["match_layers"]

Tree = dict[str, Any]  # a name's parts → subtree; at a leaf, under "", (full name, number of axes)


Fits = Callable[[str, str], bool]


def match_layers(
    target: Mapping[str, int], base: Mapping[str, int], fits: Fits | None = None, kinds: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return for every parameter of the target the one of the base that it is scaled from.

    Layers are the numbered parts of a name. The same number is taken where the layer looks alike (the same parameters
    within it, with the same number of axes); otherwise the one that the layer would be if the base's stack went on
    periodically, otherwise the last that looks alike. Of one list that holds the input and the readout as well, these are
    told by their ``kinds`` and matched from either end; what is between them is what there is more of.

    Args:
        target: name → number of axes.
        base: likewise.
        fits: says whether a parameter of the target can be one of the base, at another width.
        kinds: name in the base → what two layers of one kind have in common, such as shape and what grows.

    Raises:
        RequestError: a parameter on one side has no counterpart on the other.
    """
    if target.keys() == base.keys():
        return {name: name for name in target}
    found = dict(_matched(_tree(target), _tree(base), fits or (lambda *_: True), kinds or {}))
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


def _matched(target: Tree, base: Tree, fits: Fits, kinds: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    looks = {key: _looks(value) for key, value in base.items() if key.isdigit()}
    aligned = _aligned(target, base, fits, kinds) if kinds else {}
    for key, value in target.items():
        if key == "" and "" in base:
            yield value[0], base[""][0]
        elif key.isdigit() and looks:
            layer = aligned.get(key) or _layer(int(key), _looks(value), looks, value)
            yield from _matched(value, base[layer], fits, kinds)
        elif key != "" and key in base:
            yield from _matched(value, base[key], fits, kinds)
        else:
            raise _unmatched(target if key == "" else value)


def _layer(number: int, look: frozenset[Any], looks: dict[str, frozenset[Any]], value: Tree) -> str:
    alike = [key for key, other in looks.items() if other == look]
    if not alike:
        raise _unmatched(value)
    periodic = str(number % len(looks))
    return next((key for key in (str(number), periodic) if key in alike), alike[-1])


def _aligned(target: Tree, base: Tree, fits: Fits, kinds: Mapping[str, Any]) -> dict[str, str]:
    """Match a list of layers, of which some that look alike are not: the target has a part of it more often.

    Of several such parts, one that the base repeats itself is taken, otherwise the one that grows the most.
    """
    wide, narrow = (sorted((key for key in tree if key.isdigit()), key=int) for tree in (target, base))
    kind = {key: tuple((path, kinds[name]) for name, path, _ in _leaves(base[key])) for key in narrow}
    alike: dict[Any, set[Any]] = {}
    for key in narrow:
        alike.setdefault(_looks(base[key]), set()).add(kind[key])
    more = len(wide) - len(narrow)
    if more <= 0 or all(len(found) == 1 for found in alike.values()):
        return {}
    found: list[tuple[tuple[bool, float], list[str]]] = []
    for size in (size for size in range(1, len(narrow) + 1) if more % size == 0):
        for end in range(size, len(narrow) + 1):
            part, before = narrow[end - size : end], narrow[max(0, end - 2 * size) : end - size]
            row = [*narrow[:end], *part * (more // size), *narrow[end:]]
            if all(_could_be(target[a], base[b], fits) for a, b in zip(wide, row, strict=True)):
                repeated = [kind[key] for key in part] == [kind[key] for key in before]
                grows = sum(sum(grown) for key in part for _, (_, grown) in kind[key]) / size
                found.append(((repeated, grows), row))
    return dict(zip(wide, max(found, key=lambda each: each[0])[1], strict=True)) if found else {}


def _could_be(target: Tree, base: Tree, fits: Fits) -> bool:
    ours, theirs = (list(_leaves(each)) for each in (target, base))
    return _looks(target) == _looks(base) and all(fits(a[0], b[0]) for a, b in zip(ours, theirs, strict=True))


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
