"""Growing products: dot products of activations that get longer with the width, and which parameters can carry their factors.

A sum over m times as many products of two activations that learn to correlate is m times as large. A logit computed this way
needs a total factor of 1/m, as a readout does, and so do weights of values that no softmax normalizes (TP-V 2203.03466,
Definition 4.1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import LayerError
from .dataflow import Attention
from .ops import Value
from .products import Ended
from .roles import role_given
from .tracer import ForwardPass

__all__ = ["Contraction", "Heads", "at_sizes", "compared", "contractions", "in_attention"]


@dataclass(frozen=True)
class Heads:
    """Comparison of all attention of one model with that of a larger one.

    Attributes:
        dim: head dim of the smaller model, or None without attention.
        ratio: the ratio that the head dim grows by.
        power: power of the head dim by which the model itself scales the logits (usually −½).
    """

    dim: int | None = None
    ratio: float = 1.0
    power: float = -0.5


def compared(seen: Sequence[Attention], larger: Sequence[Attention]) -> Heads:
    """Compare the attention of a model with that of a larger one, layer by layer.

    Raises:
        LayerError: the two sizes have different numbers of attention layers, or the layers differ in how their head dims or
            scales grow.
    """
    if len(seen) != len(larger):
        raise LayerError("the number of attention layers depends on the width: build the same modules at every width.")
    pairs = list(zip(seen, larger, strict=True))
    if len({wide.head_dim / base.head_dim for base, wide in pairs}) > 1:
        dims = sorted({base.head_dim for base, _ in pairs})
        raise LayerError(
            f"attention layers differ in head dim ({dims}), and only some of them grow: use one head dim for all."
        )
    powers = [math.log(b.scale / a.scale, b.head_dim / a.head_dim) for a, b in pairs if a.head_dim != b.head_dim]
    if powers and max(powers) - min(powers) > 1e-6:
        raise LayerError(
            f"attention layers scale their logits by different powers of the head dim ({sorted(powers)}): use one power for all."
        )
    if not pairs:
        return Heads()
    base, wide = pairs[0]
    return Heads(base.head_dim, wide.head_dim / base.head_dim, round(powers[0], 6) if powers else -0.5)


def in_attention(seen: Sequence[Attention], wider: Sequence[Attention], ratio: float) -> dict[str, float]:
    """Return, by query parameter, the power of the width in the scale of attention whose head dim does not grow."""
    powers: dict[str, float] = defaultdict(float)
    for narrow, broad in zip(seen, wider, strict=False):
        if narrow.head_dim == broad.head_dim:  # such as 1/√hidden with a fixed head dim
            for name in narrow.queries:
                powers[name] += round(math.log(broad.scale / narrow.scale, ratio), 6)
    return powers


Key = tuple[str, tuple[str, ...], tuple[str, ...]]  # the module that consumes it, and the parameters of its two sides


@dataclass(frozen=True)
class Contraction:
    """A dot product of activations that gets longer with the width.

    Attributes:
        key: the module that consumes it and the parameters that its two sides are made by.
        size: number of entries at the base.
        ratio: how many times as many entries it has in the larger model.
        power: power of the size that the model itself multiplies it by.
        carriers: parameters that carry a factor into one side of it, and into nothing other than such products; may be empty.
        both: whether the carriers carry a factor into both sides.
    """

    key: Key
    size: int
    ratio: float
    power: float
    carriers: frozenset[str] = frozenset()
    both: bool = False

    @property
    def sides(self) -> frozenset[str]:
        """Return the parameters that the two sides are made by."""
        return frozenset(self.key[1] + self.key[2])

    def refusal(self, factor: float) -> str:
        """Return the error message for a ``factor`` that cannot be folded into any parameter."""
        left, right = (", ".join(each[:2]) or "the data" for each in self.key[1:])
        named = (self.key[2] or self.key[1])[0]
        pattern = f"{named.rpartition('.')[0]}.*" if "." in named else named
        roles = (
            f"roles={{{pattern!r}: 'output'}} to put the factor on these parameters, or to their current role if no factor is "
            "missing"
        )
        return (
            f"activations made by {left} and by {right} are multiplied and summed over {self.size} entries at the base and "
            f"{self.ratio:g} times as many here, which needs a factor of {factor:.4g} that no parameter carries alone: multiply "
            f"the sum by base width / width in the forward pass, or set {roles}."
        )


def contractions(seen: ForwardPass, wider: ForwardPass, roles: Mapping[str, str]) -> tuple[Contraction, ...]:
    """Return the growing dot products that the model does not already rescale.

    Those with a parameter whose role is given are left out. Both passes drop their records of constants on the sides, as a
    constant on a side is a constant on the product.
    """
    found = []
    for key, pairs in _paired(seen, wider):
        for base, wide in pairs:
            ratio = wide.product.size / base.product.size
            for run, each in ((seen, base), (wider, wide)):
                sides = {use for side in each.product.sides for use in run.scales.of(side).factors}
                run.scales.discard(sides, each.product.nodes)
            power = round(math.log(abs(wide.scale / base.scale), ratio), 4) if base.scale and wide.scale else 0.0
            made = Contraction(key, base.product.size, ratio, power)
            if power != -1 and not any(role_given(roles, name) for name in _makers(seen, base)):
                found.append((made, base))
    return tuple(_carried(found, seen))


def at_sizes(known: Sequence[Contraction], seen: ForwardPass, target: ForwardPass) -> tuple[Contraction, ...]:
    """Return the ``known`` contractions with the ratio of the target's sizes to the base's."""
    ratios = {
        key: wide.product.size / base.product.size for key, pairs in _paired(seen, target) for base, wide in pairs
    }
    return tuple(replace(each, ratio=ratios.get(each.key, 1.0)) for each in known)


def _paired(seen: ForwardPass, larger: ForwardPass) -> Iterator[tuple[Key, list[tuple[Ended, Ended]]]]:
    before, after = _keyed(seen), _keyed(larger)
    for key, each in before.items():
        pairs = zip(each, after.get(key, []), strict=False)
        yield key, [(a, b) for a, b in pairs if a.product.size != b.product.size]


def _keyed(seen: ForwardPass) -> dict[Key, list[Ended]]:
    found: dict[Key, list[Ended]] = defaultdict(list)
    for each in seen.dots.ended:
        left, right = (tuple(sorted(seen.made_by(side))) for side in each.product.sides)
        found[each.module, left, right].append(each)
    return found


def _makers(seen: ForwardPass, each: Ended) -> frozenset[str]:
    return frozenset().union(*(seen.made_by(side) | seen.decode(seen.carries(side)) for side in each.product.sides))


def _carried(found: Sequence[tuple[Contraction, Ended]], seen: ForwardPass) -> Iterator[Contraction]:
    """Choose carriers that scale each product once: those of the left side if they fit, as with the queries of attention."""
    covered: set[int] = set()
    for i, (made, each) in enumerate(found):
        if i in covered:
            continue
        for side in each.product.sides:
            group = [j for j, (_, other) in enumerate(found) if _with(seen, side, other)]
            if not covered & {*group} and _fits([found[j] for j in group], side, seen):
                covered |= {*group}
                both = seen.carries(each.product.left) == seen.carries(each.product.right)
                yield replace(made, carriers=seen.decode(seen.carries(side)), both=both)
                break
        else:
            covered.add(i)
            yield made


def _with(seen: ForwardPass, side: Value, other: Ended) -> list[Value]:
    return [each for each in other.product.sides if seen.carries(each) == seen.carries(side)]


def _fits(group: Sequence[tuple[Contraction, Ended]], side: Value, seen: ForwardPass) -> bool:
    """Return whether the parameters that carry a factor into ``side`` can be scaled to the same effect on all of ``group``."""
    carries = seen.carries(side)
    same_side = [value for _, each in group for value in _with(seen, side, each)]
    uses = {use for value in same_side for use in seen.scales.of(value).factors}
    nodes = {node for _, each in group for node in each.product.nodes}
    alike = len({(made.ratio, made.power, len(_with(seen, side, each))) for made, each in group}) == 1
    others = [value for _, each in group for value in each.product.sides if seen.carries(value) != carries]
    independent = not any(seen.depends(value) & carries for value in others)
    distances = any(each.product.distance and (others or made.power) for made, each in group)
    return bool(carries) and alike and independent and not distances and seen.used_only(carries, uses, nodes)
