"""Residual sums, found in the order of values: x + f(x) is a sum of which one side was made from the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .flows import Graph, Sum
from .pieces import meet

__all__ = ["Residual", "ancestors", "coupled", "descendants", "residual_sums", "within"]


@dataclass(frozen=True)
class Residual:
    """A sum of a stream and a branch, as nodes: the branch was made from ``source``, mostly the stream itself.

    ``carries`` are the parameters that carry a factor into the branch, as bits.
    """

    node: int
    stream: int
    source: int
    branch: int
    carries: int


def residual_sums(graph: Graph, above: list[int], known: Iterable[Residual] = ()) -> list[Residual]:
    """Return the sums of which one side was made from the other, or from what the other was before.

    In x + f(x) + g(x) the second branch was made from what the stream was before the first. ``above`` are all `ancestors`;
    the ``known`` are found already and left out.
    """
    found = []
    before = {each.node: each.stream for each in known}  # what a stream was before a branch was added to it
    for each in (each for each in graph.sums if each.node not in before):
        residual = _residual(each, graph, above, before)
        if residual is not None and residual.branch != residual.stream:
            found.append(residual)
            before[each.node] = each.left + each.right - residual.branch
    return found


def coupled(graph: Graph, found: list[Residual], above: list[int], after: list[int]) -> list[Residual]:
    """Return the other half of two streams that add to each other, a + f(b) beside b + g(a), where a and b enter apart.

    Neither side of that sum was made from the other. But it is on the way from b to what is added to b, and goes on beside it.
    ``after`` are all `descendants`.
    """
    known = {each.node for each in found}
    return [
        Residual(each.node, stream, other.stream, branch, carries)
        for each in graph.sums
        if each.node not in known
        for other in found
        if above[other.branch] >> each.node & 1 and not after[each.node] >> other.node & 1
        for stream, branch, carries in _ways(each)
        if above[branch] >> other.stream & 1 and not above[stream] >> other.stream & 1
    ]


def within(node: int, other: Residual, above: list[int]) -> bool:
    """Say whether a node is on the way from another sum's source to its branch."""
    return bool(
        above[other.branch] >> node & 1 and above[node] >> other.source & 1 and not above[other.source] >> node & 1
    )


def ancestors(graph: Graph, stops: frozenset[int]) -> list[int]:
    """Return for every node the set (as bits) of nodes it was made from, itself included, not looking past ``stops``."""
    above = [0]
    for node, parents in enumerate(graph.parents[1:], 1):
        bits = 1 << node
        for parent in parents:
            bits |= 1 << parent if parent in stops else above[parent]
        above.append(bits)
    return above


def descendants(graph: Graph, read: int) -> list[int]:
    """Return for every node the set (as bits) of nodes through which all of its ways to the result go, itself included.

    ``read`` are the nodes that lead there.
    """
    after = [-1] * len(graph.parents)
    for node in range(len(graph.parents) - 1, 0, -1):
        if read >> node & 1:
            after[node] = 1 << node | (after[node] if after[node] != -1 else 0)
            for parent in graph.parents[node]:
                after[parent] &= after[node]
    return after


def _ways(each: Sum) -> Iterable[tuple[int, int, int]]:
    """Every (stream, branch, what carries the branch) that a sum could be."""
    return (each.left, each.right, each.right_carries), (each.right, each.left, each.left_carries)


def _residual(each: Sum, graph: Graph, above: list[int], before: dict[int, int]) -> Residual | None:
    for stream, branch, carries in _ways(each):
        source = _source(branch, stream, graph, above, before)
        if source:
            return Residual(each.node, stream, source, branch, carries)
    for stream, branch, carries in _ways(each):
        own = _line(branch, before)
        for earlier in _line(stream, before):
            if earlier not in own and (source := _source(branch, earlier, graph, above, before)):
                return Residual(each.node, earlier, source, branch, carries)
    return None


def _source(branch: int, stream: int, graph: Graph, above: list[int], before: dict[int, int]) -> int:
    """Return from what of the stream a branch was made: the stream or, if that is a piece of a value, all of it; or 0.

    A sum of two streams is no branch of either: what the one was before it took from the other came from elsewhere.
    """
    if above[branch] >> stream & 1:
        return stream if all(above[each] >> stream & 1 for each in _line(branch, before)) else 0
    whole, region = graph.pieces.get(stream, (0, None))
    if not whole or not above[branch] >> whole & 1:
        return 0
    ways, seen = [branch], {branch}
    while ways:
        node = ways.pop()
        if node == whole:
            return whole
        its_whole, its_region = graph.pieces.get(node, (0, None))
        if its_whole != whole or meet(its_region, region):
            more = {parent for parent in graph.parents[node] if parent >= whole} - seen
            seen |= more
            ways += more
    return 0


def _line(node: int, before: dict[int, int]) -> list[int]:
    """Return a stream and what it was before, the latest first."""
    line = [node]
    while line[-1] in before:
        line.append(before[line[-1]])
    return line
