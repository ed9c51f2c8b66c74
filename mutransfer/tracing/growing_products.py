"""Dot products of activations that get longer with the width, and which parameters could carry the factor each asks for.

A sum over m times as many products of two activations that learn to agree is m times as large: a logit that is one needs 1/m
in all, as a readout's does, and so do weights of values that no softmax normalizes (TP-V 2203.03466, Definition 4.1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import RequestError
from .dataflow import Attention, Flow
from .products import Ended
from .roles import role_given
from .tracer import OpTracer

__all__ = ["Contraction", "Heads", "at_sizes", "compared", "contractions", "in_attention"]


@dataclass(frozen=True)
class Heads:
    """All attention of one model against a larger one's.

    ``ratio`` is what the head dim grows by, and ``power`` the power of the head dim by which the model itself scales the
    logits (−½ as usual).
    """

    dim: int | None = None
    ratio: float = 1.0
    power: float = -0.5


def compared(seen: Sequence[Attention], larger: Sequence[Attention]) -> Heads:
    """Compare layer by layer.

    Raises:
        RequestError: the sizes have other numbers of attention layers, or layers whose head dims or scales differ in growth.
    """
    if len(seen) != len(larger):
        raise RequestError(
            "the number of attention layers depends on the width: build the same modules at every width."
        )
    pairs = list(zip(seen, larger, strict=True))
    if len({wide.head_dim / base.head_dim for base, wide in pairs}) > 1:
        dims = sorted({base.head_dim for base, _ in pairs})
        raise RequestError(f"attention layers differ in head dim ({dims}), and only some grow: use one for all.")
    powers = [math.log(b.scale / a.scale, b.head_dim / a.head_dim) for a, b in pairs if a.head_dim != b.head_dim]
    if powers and max(powers) - min(powers) > 1e-6:
        raise RequestError(
            f"attention layers scale their logits by different powers of the head dim ({sorted(powers)}): use one."
        )
    if not pairs:
        return Heads()
    base, wide = pairs[0]
    return Heads(base.head_dim, wide.head_dim / base.head_dim, round(powers[0], 6) if powers else -0.5)


def in_attention(seen: Sequence[Attention], wider: Sequence[Attention], ratio: float) -> dict[str, float]:
    """Return powers of the width in the scale of attention where the head dim stays, by the queries that carry it."""
    powers: dict[str, float] = defaultdict(float)
    for narrow, broad in zip(seen, wider, strict=False):
        if narrow.head_dim == broad.head_dim:  # such as 1/√hidden with a fixed head dim
            for name in narrow.queries:
                powers[name] += round(math.log(broad.scale / narrow.scale, ratio), 6)
    return powers


Key = tuple[str, tuple[str, ...], tuple[str, ...]]  # the module where it ends, and what makes its sides


@dataclass(frozen=True)
class Contraction:
    """A dot product of ``size`` entries at the base, ``ratio`` times as many in the larger model.

    ``power`` is the power of the size that the model itself multiplies it with. ``carriers`` carry a factor into one side of
    it, or into ``both``, and into nothing else than such products; there may be none.
    """

    key: Key
    size: int
    ratio: float
    power: float
    carriers: frozenset[str] = frozenset()
    both: bool = False

    @property
    def sides(self) -> frozenset[str]:
        """Return the parameters that make the two sides."""
        return frozenset(self.key[1] + self.key[2])

    def refusal(self, factor: float) -> str:
        """Return why a ``factor`` cannot be written on any parameter, and the next move."""
        left, right = (", ".join(each[:2]) or "the data" for each in self.key[1:])
        named = (self.key[2] or self.key[1])[0]
        pattern = f"{named.rpartition('.')[0]}.*" if "." in named else named
        role = f"roles={{{pattern!r}: 'output'}} if what makes one side shall carry it, or its role now if nothing is missing"
        return (
            f"activations made by {left} and by {right} are multiplied and summed over {self.size} entries at the base and "
            f"{self.ratio:g} times as many here, which asks for a factor {factor:.4g} that nothing carries alone: multiply the "
            f"sum with base width / width in the forward pass, or name {role}."
        )


def contractions(seen: OpTracer, wider: OpTracer, roles: Mapping[str, str]) -> tuple[Contraction, ...]:
    """Return the dot products that grow and whose factor the model does not have itself, as far as no role says it.

    What takes in their sides is forgotten in both passes: a number on a side is a number on the product.
    """
    found = []
    for key, pairs in _paired(seen, wider):
        for base, wide in pairs:
            ratio = wide.scores.size / base.scores.size
            for watcher, each in ((seen, base), (wider, wide)):
                sides = {use for side in each.scores.sides for use in side.factors}
                watcher.factors.forget(sides, each.scores.nodes)
            power = round(math.log(abs(wide.scale / base.scale), ratio), 4) if base.scale and wide.scale else 0.0
            made = Contraction(key, base.scores.size, ratio, power)
            if power != -1 and not any(role_given(roles, name) for name in _makers(seen, base)):
                found.append((made, base))
    return tuple(_carried(found, seen))


def at_sizes(known: Sequence[Contraction], seen: OpTracer, target: OpTracer) -> tuple[Contraction, ...]:
    """Return the ``known`` with the ratio of a target's sizes to the base's."""
    ratios = {key: wide.scores.size / base.scores.size for key, pairs in _paired(seen, target) for base, wide in pairs}
    return tuple(replace(each, ratio=ratios.get(each.key, 1.0)) for each in known)


def _paired(seen: OpTracer, larger: OpTracer) -> Iterator[tuple[Key, list[tuple[Ended, Ended]]]]:
    before, after = _keyed(seen), _keyed(larger)
    for key, each in before.items():
        pairs = zip(each, after.get(key, []), strict=False)
        yield key, [(a, b) for a, b in pairs if a.scores.size != b.scores.size]


def _keyed(watcher: OpTracer) -> dict[Key, list[Ended]]:
    found: dict[Key, list[Ended]] = defaultdict(list)
    for each in watcher.dots.ended:
        left, right = (tuple(sorted(_made_by(watcher, side))) for side in each.scores.sides)
        found[each.module, left, right].append(each)
    return found


def _makers(seen: OpTracer, each: Ended) -> frozenset[str]:
    return frozenset().union(*(_made_by(seen, side) | seen.decode(side.carries) for side in each.scores.sides))


def _made_by(seen: OpTracer, side: Flow) -> frozenset[str]:
    return seen.used_by(side.direct) or seen.decode(side.carries) or seen.used_by(side.uses)


def _carried(found: Sequence[tuple[Contraction, Ended]], seen: OpTracer) -> Iterator[Contraction]:
    """Choose carriers so that each product is scaled once: the left side's where they do, as attention's queries."""
    covered: set[int] = set()
    for i, (made, each) in enumerate(found):
        if i in covered:
            continue
        for side in each.scores.sides:
            group = [j for j, (_, other) in enumerate(found) if _with(side, other)]
            if not covered & {*group} and _fits([found[j] for j in group], side, seen):
                covered |= {*group}
                both = each.scores.left.carries == each.scores.right.carries
                yield replace(made, carriers=seen.decode(side.carries), both=both)
                break
        else:
            covered.add(i)
            yield made


def _with(side: Flow, other: Ended) -> list[Flow]:
    return [each for each in other.scores.sides if each.carries == side.carries]


def _fits(group: Sequence[tuple[Contraction, Ended]], side: Flow, seen: OpTracer) -> bool:
    """Say whether what carries a factor into ``side`` can be scaled, with one result for a ``group`` of products."""
    mine = [flow for _, each in group for flow in _with(side, each)]
    uses = {use for flow in mine for use in flow.factors}
    nodes = {node for _, each in group for node in each.scores.nodes}
    alike = len({(made.ratio, made.power, len(_with(side, each))) for made, each in group}) == 1
    others = [flow for _, each in group for flow in each.scores.sides if flow.carries != side.carries]
    apart = not any(flow.depends & side.carries for flow in others)
    distances = any(each.scores.distance and (others or made.power) for made, each in group)
    return bool(side.carries) and alike and apart and not distances and seen.used_only(side.carries, uses, nodes)
