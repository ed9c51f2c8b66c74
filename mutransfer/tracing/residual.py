"""Residual branches: sums x + f(x) found in the graph of values, and the parameters used on the way from x to the sum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .dataflow import Sum, Use, ValueGraph, meet, union

__all__ = [
    "Branch",
    "Residual",
    "ancestors",
    "unrecognized_branches",
    "coupled",
    "descendants",
    "residual_branches",
    "residual_sums",
    "within",
]


@dataclass(frozen=True)
class Residual:
    """A sum of a residual stream and a branch.

    Attributes:
        node: node of the sum.
        stream: node of the stream.
        source: node that the branch was computed from, usually the stream itself.
        branch: node of the branch.
        carries: parameters (as bits) that carry a factor into the branch.
        module: the module in whose forward the sum is taken.
    """

    node: int
    stream: int
    source: int
    branch: int
    carries: int
    module: str


def residual_sums(graph: ValueGraph, above: list[int], known: Iterable[Residual] = ()) -> list[Residual]:
    """Return the sums in which one side was computed from the other, or from an earlier state of the other.

    In x + f(x) + g(x) the second branch was computed from the stream's state before the first branch was added.

    Args:
        graph: the graph of values.
        above: the `ancestors` of every node.
        known: residuals that were found already and are left out.
    """
    found = []
    before = {each.node: each.stream for each in known}  # sum → the stream's state before the branch was added
    for each in (each for each in graph.sums if each.node not in before):
        residual = _residual(each, graph, above, before)
        if residual is not None and residual.branch != residual.stream:
            found.append(residual)
            before[each.node] = each.left + each.right - residual.branch
    return found


def coupled(graph: ValueGraph, found: list[Residual], above: list[int], after: list[int]) -> list[Residual]:
    """Return the sums missing from ``found`` in two streams that add to each other, a + f(b) and b + g(a), with separate inputs.

    Neither side of a + f(b) was computed from the other. But the sum is on the way from b to the branch that is added to b,
    and it also reaches the result without passing through b's sum.

    Args:
        graph: the graph of values.
        found: the sums found by `residual_sums`.
        above: the `ancestors` of every node.
        after: the `descendants` of every node.
    """
    known = {each.node for each in found}
    return [
        Residual(each.node, stream, other.stream, branch, carries, each.module)
        for each in graph.sums
        if each.node not in known
        for other in found
        if above[other.branch] >> each.node & 1 and not after[each.node] >> other.node & 1
        for stream, branch, carries in _ways(each)
        if above[branch] >> other.stream & 1 and not above[stream] >> other.stream & 1
    ]


def within(node: int, other: Residual, above: list[int]) -> bool:
    """Return whether a node is on the way from another sum's source to its branch."""
    return bool(
        above[other.branch] >> node & 1 and above[node] >> other.source & 1 and not above[other.source] >> node & 1
    )


def ancestors(graph: ValueGraph, stops: frozenset[int]) -> list[int]:
    """Return, for every node, the nodes (as bits) that it was computed from, itself included, without going beyond ``stops``."""
    above = [0]
    for node, parents in enumerate(graph.parents[1:], 1):
        bits = 1 << node
        for parent in parents:
            bits |= 1 << parent if parent in stops else above[parent]
        above.append(bits)
    return above


def descendants(graph: ValueGraph, read: int) -> list[int]:
    """Return, for every node, the nodes (as bits) that all of its paths to the result pass through, itself included.

    ``read`` is the set (as bits) of nodes that lead to the result.
    """
    after = [-1] * len(graph.parents)
    for node in range(len(graph.parents) - 1, 0, -1):
        if read >> node & 1:
            after[node] = 1 << node | (after[node] if after[node] != -1 else 0)
            for parent in graph.parents[node]:
                after[parent] &= after[node]
    return after


def _ways(each: Sum) -> Iterable[tuple[int, int, int]]:
    """Return the two ways to read a sum, as (stream, branch, parameters that carry a factor into the branch)."""
    return (each.left, each.right, each.right_carries), (each.right, each.left, each.left_carries)


def _residual(each: Sum, graph: ValueGraph, above: list[int], before: dict[int, int]) -> Residual | None:
    for stream, branch, carries in _ways(each):
        source = _source(branch, stream, graph, above, before)
        if source:
            return Residual(each.node, stream, source, branch, carries, each.module)
    for stream, branch, carries in _ways(each):
        branch_history = _history(branch, before)
        for earlier in _history(stream, before):
            if earlier not in branch_history and (source := _source(branch, earlier, graph, above, before)):
                return Residual(each.node, earlier, source, branch, carries, each.module)
    return None


def _source(branch: int, stream: int, graph: ValueGraph, above: list[int], before: dict[int, int]) -> int:
    """Return the node of the stream that a branch was computed from, or 0.

    It is the stream or, if the stream is a piece of a value, that whole value. A sum of two streams is not a branch of either:
    the state of one before it received the other has another origin.
    """
    if above[branch] >> stream & 1:
        return stream if all(above[each] >> stream & 1 for each in _history(branch, before)) else 0
    whole, region = graph.pieces.get(stream, (0, (0, ())))
    if not whole or not above[branch] >> whole & 1:
        return 0
    pending, seen = [branch], {branch}
    while pending:
        node = pending.pop()
        if node == whole:
            return whole
        its_whole, its_region = graph.pieces.get(node, (0, (0, ())))
        if its_whole != whole or meet(its_region, region):
            more = {parent for parent in graph.parents[node] if parent >= whole} - seen
            seen |= more
            pending += more
    return 0


def _history(node: int, before: dict[int, int]) -> list[int]:
    """Return a stream and its earlier states, the latest first."""
    history = [node]
    while history[-1] in before:
        history.append(before[history[-1]])
    return history


Layer = tuple[str, ...]  # the parts of a parameter's name up to a layer number


def unrecognized_branches(
    graph: ValueGraph, uses: dict[str, list[Use]], inside: frozenset[str], shapes: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return matrices of numbered layers that are on no residual branch, each with a comparable matrix that is on one.

    The comparable matrix is the same matrix of a layer that looks the same, or another matrix of the same layer. With
    such a matrix, a rule for depth would hold for only a part of the stack.

    Args:
        graph: the graph of values in a forward pass.
        uses: every parameter's uses in it.
        inside: parameters on branches.
        shapes: shapes of every parameter, at all the sizes at which two parameters have to agree to look the same.
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
    """Yield every split of a name into (layer, rest), the innermost layer first."""
    parts = tuple(name.split("."))
    for i in range(len(parts), 0, -1):
        if parts[i - 1].isdigit():
            yield parts[:i], parts[i:]


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        inside: the parameters used inside it.
        ends: the parameters (as bits) that carry a factor into it.
        added_in: the module in whose forward it is added to the stream.
    """

    inside: frozenset[str]
    ends: int
    added_in: str


def residual_branches(graph: ValueGraph, uses: dict[str, list[Use]]) -> list[Branch]:
    """Return the outermost residual branches of one forward pass.

    The number of branches within a branch (a gated unit written as x + …, a token shift) does not grow with the depth.
    A parameter is inside a branch if it is used on the way from the stream to the sum. A parameter that feeds several branches
    without coming from their stream (an encoder's final norm, a table of positions that all layers share) is not, unless all
    of these branches belong to the parameter's own layer (a modulation of attention and FFN).
    """
    above = ancestors(graph, frozenset())
    read = above[graph.result] if graph.result else -1  # the last state of a recurrence is computed but not read
    after = descendants(graph, read)

    def layers(sums: Iterable[Residual]) -> list[Residual]:
        return [each for each in sums if read >> each.node & 1 and not _recurs(each, graph, above, uses)]

    second = layers(coupled(graph, layers(residual_sums(graph, above)), above, after))
    found = layers(residual_sums(graph, above, second)) + second
    # An inner branch ends inside the outer one; a sum that also reaches the result another way is a second stream.
    outer = [
        each
        for each in found
        if not any(within(each.node, other, above) and after[each.node] >> other.node & 1 for other in found)
    ]
    sums = frozenset(each.node for each in outer)
    near = ancestors(graph, sums)
    reach = [near[each.branch] for each in outer]
    homes = {name: {_home(use.node, reach) for use in each} for name, each in uses.items()}
    branches: list[Branch] = []
    for each, all_near in zip(outer, reach, strict=True):
        here = all_near & ~(above[each.stream] | above[each.source])
        inside = {
            name
            for name, its in uses.items()
            for use in its
            if here >> use.node & 1
            and (any(above[n] >> each.source & 1 for n in use.operands) or homes[name] == {all_near})
        }
        branches.append(Branch(frozenset(inside), each.carries, each.module))
    on_streams = union(near[each.stream] for each in outer if each.stream not in sums)
    branches = [
        _with_shared(branch, all_near & ~on_streams, uses, reach, branches)
        for branch, all_near in zip(branches, reach, strict=True)
    ]
    branches = [branch for branch in branches if branch.inside]
    return [branch for branch in branches if branch.ends or _repeats(branch, branches)]


def _with_shared(
    branch: Branch, near: int, uses: dict[str, list[Use]], reach: list[int], branches: list[Branch]
) -> Branch:
    """Return the branch with the parameters that feed several branches added, if all of these are in the parameter's layer."""
    layers = [{_layer(name) for name in each.inside} for each in branches]
    shared = {
        name
        for name in uses
        if (layer := _layer(name)) and name not in branch.inside
        for node in [use.node for use in uses[name] if near >> use.node & 1]
        if all(its == {layer} for its, fed in zip(layers, reach, strict=True) if fed >> node & 1)
    }
    return replace(branch, inside=branch.inside | shared)


def _layer(name: str) -> tuple[str, ...]:
    """Return the parts of a name up to its first number, or an empty tuple."""
    parts = name.split(".")
    return next((tuple(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), ())


def _home(node: int, reach: list[int]) -> int:
    """Return the reach of the branch that a value feeds, or 0 if it does not feed exactly one."""
    fed = [each for each in reach if each >> node & 1]
    return fed[0] if len(fed) == 1 else 0


def _recurs(found: Residual, graph: ValueGraph, above: list[int], uses: dict[str, list[Use]]) -> bool:
    """Return whether this sum is a step of a recurrence instead of a layer: the same parameters are used in an earlier step.

    Either the step adds to its input what the parameters computed from an earlier sum with that input, or every step reads a
    piece of one value.
    """
    earlier, all_since = above[found.source], above[found.branch] & ~above[found.source]
    steps = [
        (before & ~above[found.stream], above[found.branch] & ~above[each.node])
        for each in graph.sums
        if found.stream in (each.left, each.right) and above[found.branch] >> each.node & 1
        for before in [above[each.left] | above[each.right]]
    ]
    wholes = {whole for node, (whole, _) in graph.pieces.items() if earlier >> node & 1}
    if any(all_since >> node & 1 and whole in wholes for node, (whole, _) in graph.pieces.items()):
        steps.append((earlier, all_since))
    return any(
        any(before >> use.node & 1 for use in each) and any(since >> use.node & 1 for use in each)
        for before, since in steps
        for each in uses.values()
    )


def _repeats(branch: Branch, branches: list[Branch]) -> bool:
    """Return whether a deeper model may have more of this branch: it is in a numbered layer, or its parameters are reused."""
    numbered = any(part.isdigit() for name in branch.inside for part in name.split("."))
    return numbered or sum(bool(branch.inside & other.inside) for other in branches) > 1
