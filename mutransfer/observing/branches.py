"""Residual branches: what is used on the way from a stream to the sum that adds to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .flows import Graph, union
from .noted import Use
from .streams import Residual, ancestors, coupled, descendants, residual_sums, within

__all__ = ["Branch", "residual_branches"]


@dataclass(frozen=True)
class Branch:
    """One residual branch: the parameters used inside it, and what carries a factor into it (as a set of bits)."""

    inside: frozenset[str]
    ends: int


def residual_branches(graph: Graph, uses: dict[str, list[Use]]) -> list[Branch]:
    """Return the residual branches of one forward pass, the outermost only.

    A branch within a branch (a gated unit written as x + …, a token shift) does not grow in number with the depth.
    A parameter is inside a branch when it is used on the way from the stream to the sum; what feeds several branches
    without coming from their stream (an encoder's final norm, a table of positions that all layers share) is not, unless they
    are all of its own layer (a modulation of attention and FFN).
    """
    above = ancestors(graph, frozenset())
    read = above[graph.result] if graph.result else -1  # a recurrence's last state is made and not read
    after = descendants(graph, read)

    def layers(sums: Iterable[Residual]) -> list[Residual]:
        return [each for each in sums if read >> each.node & 1 and not _recurs(each, graph, above, uses)]

    second = layers(coupled(graph, layers(residual_sums(graph, above)), above, after))
    found = layers(residual_sums(graph, above, second)) + second
    # A branch in another one ends there: what goes on beside it is a second stream.
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
        branches.append(Branch(frozenset(inside), each.carries))
    on_streams = union(near[each.stream] for each in outer if each.stream not in sums)
    branches = [
        _with_own(branch, all_near & ~on_streams, uses, reach, branches)
        for branch, all_near in zip(branches, reach, strict=True)
    ]
    branches = [branch for branch in branches if branch.inside]
    return [branch for branch in branches if branch.ends or _repeats(branch, branches)]


def _with_own(
    branch: Branch, near: int, uses: dict[str, list[Use]], reach: list[int], branches: list[Branch]
) -> Branch:
    """Return the branch with what feeds several branches, if all of these are of the layer whose own it is."""
    layers = [{_layer(name) for name in each.inside} for each in branches]
    own = {
        name
        for name in uses
        if (layer := _layer(name)) and name not in branch.inside
        for node in [use.node for use in uses[name] if near >> use.node & 1]
        if all(its == {layer} for its, fed in zip(layers, reach, strict=True) if fed >> node & 1)
    }
    return replace(branch, inside=branch.inside | own)


def _layer(name: str) -> tuple[str, ...]:
    """Return the parts of a name up to its first number, or nothing."""
    parts = name.split(".")
    return next((tuple(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), ())


def _home(node: int, reach: list[int]) -> int:
    """Return the reach of the one branch that a value feeds, or 0."""
    fed = [each for each in reach if each >> node & 1]
    return fed[0] if len(fed) == 1 else 0


def _recurs(found: Residual, graph: Graph, above: list[int], uses: dict[str, list[Use]]) -> bool:
    """Say whether this is a step of a recurrence, and no layer: the same parameters made its stream from an earlier input.

    Either it adds to its input what they made of an earlier sum with that input, or every step takes in a piece of one value.
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
    """Say whether there may be more of it in a deeper model: a numbered layer's, or of parameters used again."""
    numbered = any(part.isdigit() for name in branch.inside for part in name.split("."))
    return numbered or sum(bool(branch.inside & other.inside) for other in branches) > 1
