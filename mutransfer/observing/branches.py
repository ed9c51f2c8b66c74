"""Residual branches, found in the order of values: x + f(x) is a sum of which one side was made from the other."""

from __future__ import annotations

from dataclasses import dataclass

from .flows import Graph, Sum
from .noted import Use

__all__ = ["Branch", "ancestors", "residual_branches"]


@dataclass(frozen=True)
class Branch:
    """One residual branch: the parameters used inside it, and what carries a factor into it (as a set of bits)."""

    inside: frozenset[str]
    ends: int


def residual_branches(graph: Graph, uses: dict[str, list[Use]]) -> list[Branch]:
    """Return the residual branches of one forward pass, the outermost only.

    A branch within a branch (a gated unit written as x + …, a token shift) does not grow in number with the depth.
    A parameter is inside a branch when it is used on the way from the stream to the sum; what feeds several branches
    without coming from their stream (an encoder's final norm, a table of positions that all layers share) is not.
    """
    above = ancestors(graph, frozenset())
    read = above[graph.result] if graph.result else -1  # a recurrence's last state is made and not read
    found = []
    before: dict[int, int] = {}  # what a stream was before a branch was added to it
    for each in graph.sums:
        stream, branch, carries = _sides(each, above, before)
        if stream and branch != stream and read >> each.node & 1 and not _recurs(stream, branch, graph, above, uses):
            found.append((each.node, stream, branch, carries))
            before[each.node] = each.left + each.right - branch
    outer = [
        (node, stream, branch, carries)
        for node, stream, branch, carries in found
        if not any(above[b] >> node & 1 and above[node] >> s & 1 and not above[s] >> node & 1 for _, s, b, _ in found)
    ]
    near = ancestors(graph, frozenset(node for node, *_ in outer))
    reach = [near[branch] for _, _, branch, _ in outer]
    homes = {name: {_home(use.node, reach) for use in each} for name, each in uses.items()}
    branches = []
    for (_, stream, _, carries), all_near in zip(outer, reach, strict=True):
        here = all_near & ~above[stream]
        inside = {
            name
            for name, each in uses.items()
            for use in each
            if here >> use.node & 1 and (any(above[n] >> stream & 1 for n in use.operands) or homes[name] == {all_near})
        }
        if inside:
            branches.append(Branch(frozenset(inside), carries))
    return [branch for branch in branches if branch.ends or _repeats(branch, branches)]


def _home(node: int, reach: list[int]) -> int:
    """Return the reach of the one branch that a value feeds, or 0."""
    fed = [each for each in reach if each >> node & 1]
    return fed[0] if len(fed) == 1 else 0


def _recurs(stream: int, branch: int, graph: Graph, above: list[int], uses: dict[str, list[Use]]) -> bool:
    """Say whether a recurrence adds to its input what the same parameters made of an earlier sum with that input."""
    for each in graph.sums:
        if stream in (each.left, each.right) and above[branch] >> each.node & 1:
            before = (above[each.left] | above[each.right]) & ~above[stream]
            since = above[branch] & ~above[each.node]
            for use in uses.values():
                if any(before >> u.node & 1 for u in use) and any(since >> u.node & 1 for u in use):
                    return True
    return False


def _repeats(branch: Branch, branches: list[Branch]) -> bool:
    """Say whether there may be more of it in a deeper model: a numbered layer's, or of parameters used again."""
    numbered = any(part.isdigit() for name in branch.inside for part in name.split("."))
    return numbered or sum(bool(branch.inside & other.inside) for other in branches) > 1


def _sides(each: Sum, above: list[int], before: dict[int, int]) -> tuple[int, int, int]:
    """Return (stream, branch, what carries the branch); a stream of 0 where neither side was made from the other.

    In x + f(x) + g(x) the second branch was made from what the stream was before the first.
    """
    ways = (each.left, each.right, each.right_carries), (each.right, each.left, each.left_carries)
    for stream, branch, carries in ways:
        if above[branch] >> stream & 1:
            return stream, branch, carries
    for stream, branch, carries in ways:
        own = _line(branch, before)
        for earlier in _line(stream, before):
            if above[branch] >> earlier & 1 and earlier not in own:
                return earlier, branch, carries
    return 0, 0, 0


def _line(node: int, before: dict[int, int]) -> list[int]:
    """Return a stream and what it was before, the latest first."""
    line = [node]
    while line[-1] in before:
        line.append(before[line[-1]])
    return line


def ancestors(graph: Graph, stops: frozenset[int]) -> list[int]:
    """Return for every node the set (as bits) of nodes it was made from, itself included, not looking past ``stops``."""
    above = [0]
    for node, parents in enumerate(graph.parents[1:], 1):
        bits = 1 << node
        for parent in parents:
            bits |= 1 << parent if parent in stops else above[parent]
        above.append(bits)
    return above
