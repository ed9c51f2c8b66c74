"""Matrices that stand beside the residual branches though they look like ones inside: branches that were not recognized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from .flows import Graph
from .noted import Use
from .streams import ancestors

__all__ = ["beside"]

Layer = tuple[str, ...]  # the parts of a name up to its number


def beside(
    graph: Graph, uses: dict[str, list[Use]], inside: frozenset[str], shapes: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return matrices of numbered layers that are on no branch, each with one that is and should be no different.

    That is the same matrix of a layer that looks the same, or another matrix of the same layer. A rule for depth would then
    hold for a part of the stack only.

    Args:
        graph: the order of values in a forward pass.
        uses: every parameter's uses in it.
        inside: parameters on branches.
        shapes: of every parameter, at all the sizes at which two have to agree to be alike.
    """
    read = ancestors(graph, frozenset())[graph.result] if graph.result else -1
    looks: dict[Layer, set[tuple[Layer, Any]]] = defaultdict(set)
    for name in uses:
        for layer, rest in _numbered(name):
            looks[layer].add((rest, shapes[name]))
    kinds = {layer: (layer[:-1], frozenset(look)) for layer, look in looks.items()}

    def places(name: str) -> list[Any]:
        numbered = list(_numbered(name))
        return [(kinds[layer], rest) for layer, rest in numbered] + [layer for layer, _ in numbered[:1]]

    matrices = [n for n, each in uses.items() if any("in" in use.axes and read >> use.node & 1 for use in each)]
    known = {place: name for name in reversed(matrices) if name in inside for place in places(name)}
    found = ((name, [known[place] for place in places(name) if place in known]) for name in matrices)
    return [(name, others[0]) for name, others in found if others and name not in inside]


def _numbered(name: str) -> Iterator[tuple[Layer, Layer]]:
    """Every (layer, rest) of a name, the innermost layer first."""
    parts = tuple(name.split("."))
    for i in range(len(parts), 0, -1):
        if parts[i - 1].isdigit():
            yield parts[:i], parts[i:]
