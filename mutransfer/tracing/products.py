"""Products of activations: dot products, the softmaxes over them that are attention, and gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from . import ops as ops
from .aliases import Aliases, union
from .dataflow import NORMALIZED, Attention, Carriers, Uses, ValueGraph
from .ops import Operation, Value
from .scales import SOFTMAX, Scales

__all__ = ["DotProduct", "Dots", "Ended", "gates"]

DISTANCES = {"_cdist_forward", "_euclidean_dist", "cdist"}
LIKE = {
    "neg",
    "abs",
    "relu",
    "relu_",
    "leaky_relu",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clamp_min_",
}  # entrywise functions that preserve a factor
PASSED = ops.LINEAR | ops.PRODUCTS | ops.UNARY | LIKE
PASSED |= {"where", "tril", "triu", "amax", "amin", "max", "logsumexp", "rsub", "maximum", "minimum"}


@dataclass(frozen=True, eq=False)
class DotProduct:
    """A dot product of two activations.

    Attributes:
        size: number of entries that are summed over.
        left: the left side.
        right: the right side.
        nodes: the node that computes it and the nodes that it passes through.
        distance: whether it is a distance between the two sides instead of a product.
    """

    size: int
    left: Value
    right: Value
    nodes: set[int] = field(default_factory=set)
    distance: bool = False

    @property
    def sides(self) -> tuple[Value, Value]:
        """The left and the right side."""
        return self.left, self.right


@dataclass(frozen=True)
class Ended:
    """A dot product consumed by something other than a softmax, and the constant that it has been multiplied by."""

    product: DotProduct
    scale: float
    module: str


@dataclass(frozen=True)
class Pair:
    """An entrywise product of two activations.

    Attributes:
        left: the left side.
        right: the right side.
        shape: shape of the product.
        full: for each dim, whether neither side is broadcast along it.
        node: node of the product in the graph.
        scale: the constant that the product has been multiplied by.
    """

    left: Value
    right: Value
    shape: tuple[int, ...]
    full: tuple[bool, ...]
    node: int
    scale: float = 1.0


class Dots:
    """All dot products of activations in one forward pass, and the attention among them.

    Attributes:
        ended: those that are not logits of attention.
        attended: those that a softmax consumes.
        attentions: every softmax over dot products, fused or written out, in the order seen.
    """

    def __init__(
        self, aliases: Aliases, graph: ValueGraph, carriers: Carriers, scales: Scales, names: Callable[[int], frozenset[str]]
    ) -> None:  # fmt: skip
        self.ended: list[Ended] = []
        self.attended: list[DotProduct] = []
        self.attentions: list[Attention] = []
        self._aliases, self._graph, self._carriers, self._scales, self._names = aliases, graph, carriers, scales, names
        self._dots: dict[int, dict[DotProduct, float]] = {}
        self._bent: set[int] = (
            set()
        )  # versions behind a nonlinearity, where a constant is no longer a factor of the products
        self._pairs: dict[int, Pair] = {}
        for op in aliases.operations:
            if not op.computes:
                continue
            copied = aliases.copied(op)
            if copied is None:
                self._attend(op)
                self._follow(op)
                continue
            dots, bent = self.of(copied), copied.version in self._bent
            for each in op.outputs:
                self._set(each, dots, bent)
            if (pair := self._pairs.get(copied.storage)) and copied.shape == op.out.shape:
                self._pairs[op.out.storage] = pair

    def of(self, value: Value) -> dict[DotProduct, float]:
        """Return the dot products that ``value`` is a function of, and the constants that they have been multiplied by."""
        return self._dots.get(value.version, {}) if self._aliases.get(value) is None else {}

    def end(self, value: Value) -> None:
        """Record that the forward pass ends with ``value``."""
        for product, scale in self.of(value).items():
            self._end(product, scale, "")

    def _set(self, value: Value, dots: dict[DotProduct, float], bent: bool) -> None:
        self._dots[value.version] = dots
        if bent:
            self._bent.add(value.version)

    def _end(self, product: DotProduct, scale: float, module: str) -> None:
        left, right = (self._scales.of(side).number for side in product.sides)
        self.ended.append(Ended(product, scale * left * right, module))

    def _attend(self, op: Operation) -> None:
        """Record attention; a distance does not count as attention and ends here."""
        if op.name.startswith("_scaled_dot_product"):
            queries, keys, values = op.args[:3]
            head_dim = int(queries.shape[-1])
            others = self._carriers.of(keys) | self._carriers.of(values)
            self._record(head_dim, op.kwargs.get("scale") or head_dim**-0.5, queries, keys, others)
        elif op.name in SOFTMAX:
            for product, scale in self.of(op.args[0]).items():
                if product.distance:
                    self._end(product, scale, op.module)
                else:
                    self.attended.append(product)
                    self._record(product.size, scale, product.left, product.right, self._carriers.of(product.right))

    def _record(self, head_dim: int, scale: float, queries: Value, keys: Value, others: int) -> None:
        scaled = self._scales.of(queries)
        names = self._names(others), self._names(self._carriers.of(queries))
        keyed = self._names(self._carriers.of(keys))
        scale *= scaled.number * self._scales.of(keys).number
        self.attentions.append(Attention(head_dim, scale, *names, frozenset(scaled.factors), keyed))

    def _follow(self, op: Operation) -> None:
        """Record an operation on activations (and perhaps parameters)."""
        name, by, node = op.name, self._scales.by.get(op, 1.0), self._graph.made(op)
        live = [each for each in self._aliases.activations(op) if self._aliases.depends(each)]
        dots: dict[DotProduct, float] = {}
        bent = any(each.version in self._bent for each in live) or (
            name in ops.UNARY and name not in LIKE and name != "pow"
        )
        for value in live:
            alpha = op.kwargs.get("alpha", 1) if name in ops.SUMS and len(op.args) > 1 and value is op.args[1] else 1
            others = [each for each in live if each is not value and not self.of(each)] if name in ops.PRODUCTS else []
            for number in (self._scales.of(other).number for other in others):  # such as the norms of both sides
                alpha *= 1 / number if name.startswith("div") and value is op.args[0] and number else number
            for product, scale in self.of(value).items():
                product.nodes.add(node)
                if name in PASSED:
                    dots[product] = scale if value.version in self._bent else scale * alpha * by
                elif name not in SOFTMAX:
                    self._end(product, scale, op.module)
        made, scale = self._made(op, live)
        if made is not None:
            made.nodes.add(node)
            dots[made], bent = scale, False
        for each in op.outputs:
            self._set(each, dots, bent)
        self._pair(op, live, by)

    def _made(self, op: Operation, live: list[Value]) -> tuple[DotProduct | None, float]:
        """Return the dot product that an operation computes, or None, and the constant that it has been multiplied by."""
        name, args = op.name, op.args
        if name in ops.MATMULS or name in DISTANCES:
            a, b = args[ops.MATMULS.get(name, 0) :][:2]
            if any(a is each for each in live) and any(b is each for each in live):
                return DotProduct(int(a.shape[-1]), a, b, distance=name in DISTANCES), 1.0
        elif name == "sum" and live and (pair := self._pairs.get(args[0].storage)):
            whole = args[0]
            full = pair.full if pair.shape == whole.shape else (all(pair.full),) * whole.dim()
            dims = {dim % whole.dim() for dim in (len(args) > 1 and args[1]) or range(whole.dim())}
            size = math.prod(whole.shape[dim] for dim in dims if full[dim])
            if size > 1:
                return DotProduct(size, pair.left, pair.right, {pair.node}), pair.scale
        return None, 1.0

    def _pair(self, op: Operation, live: list[Value], by: float) -> None:
        name, out, graph = op.name, op.out, self._graph
        known = self._pairs.pop(out.storage, None)
        if name == "mul" and len(live) == 2 and graph.node(live[0]) != graph.node(live[1]):
            full = tuple(all(_full(each, dim - out.dim()) for each in live) for dim in range(out.dim()))
            self._pairs[out.storage] = Pair(live[0], live[1], out.shape, full, graph.made(op))
        elif len(live) == 1 and (name in ops.PRODUCTS or name in {"neg", "masked_fill"}):
            pair = self._pairs.get(live[0].storage, known)
            if pair is not None:
                self._pairs[out.storage] = replace(pair, scale=pair.scale * by)


def _full(value: Value, dim: int) -> bool:
    return value.dim() >= -dim and (value.shape[dim] == 1 or value.strides[dim] > 0)


def gates(aliases: Aliases, uses: Uses) -> int:
    """Return the uses (as bits) whose results are gates or logits.

    A gate is the result of a sigmoid, or one number for many entries of the other activation. It weights an activation that
    was made by other parameters; if both come from the same one, it is part of a nonlinearity.
    """
    found = sigmoids = 0
    for op in aliases.operations:
        if not op.computes or aliases.copied(op) is not None:
            continue
        if op.name in NORMALIZED:
            found |= union(uses.direct(each) for each in op.inputs if each.numeric)
        if op.name == "sigmoid":
            sigmoids |= uses.direct(op.out)
        if op.name in ops.WEIGHTINGS:
            live = [each for each in aliases.activations(op) if aliases.depends(each)]
            for i, value in enumerate(live):
                others = [*live[:i], *live[i + 1 :]]
                wide = op.name in ops.PRODUCTS and any(_spread(value, other) for other in live)
                weights = uses.direct(value) if wide else uses.direct(value) & sigmoids
                makers = uses.parameters(weights)
                if any(not makers & uses.parameters(uses.direct(other)) for other in others):
                    found |= weights
    return found


def _spread(one: Value, many: Value) -> bool:
    """Return whether every entry of ``one`` is combined with several of ``many``, and each of ``many`` with one of ``one``."""
    if not 0 < one.dim() <= many.dim():  # a sum over everything is not a gate
        return False
    sizes = zip(reversed(one.shape), reversed(many.shape), strict=False)
    return one.numel() < many.numel() and all(size in (1, other) for size, other in sizes)
