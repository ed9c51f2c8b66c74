"""Data flow of a forward pass: the graph of values, the parameters that carry a factor into each, and uses of parameters.

A piece of a tensor (a chunk, a slice) is a separate value: a scale and a shift computed together by one layer are two values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import ops as ops
from .aliases import Aliases, Axis, carried_to, label_of, union
from .ops import Operation, Value

__all__ = [
    "Attention",
    "Carriers",
    "Region",
    "Sum",
    "Use",
    "Uses",
    "ValueGraph",
    "NORMALIZED",
    "meet",
]


@dataclass(frozen=True)
class Sum:
    """One sum of two activations.

    Attributes:
        node: node of the result.
        left: node of one side.
        right: node of the other side.
        left_carries: parameters (as bits) that carry a factor into the left side.
        right_carries: the same for the right side.
        module: the module in whose forward the sum is taken.
    """

    node: int
    left: int
    right: int
    left_carries: int
    right_carries: int
    module: str


# Offset of the first entry, and (stride, length) of each dim, the longest stride first.
Region = tuple[int, tuple[tuple[int, int], ...]]


@dataclass
class ValueGraph:
    """Graph of the values in a forward pass. Node 0 stands for everything that depends on no parameter.

    A view of a part of a value has a node of its own, a child of the value's node.

    Attributes:
        parents: the parents of each node.
        result: the node of the loss.
        sums: the sums of two activations.
        pieces: node that is a part of another → (the node of the whole, which part).
    """

    parents: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    result: int = 0
    sums: list[Sum] = field(default_factory=list)
    pieces: dict[int, tuple[int, Region]] = field(default_factory=dict)
    _nodes: dict[int, int] = field(default_factory=dict)
    _pieces: dict[tuple[int, Region], int] = field(default_factory=dict)

    @classmethod
    def of(cls, aliases: Aliases) -> ValueGraph:
        """Return the graph of a forward pass, without its sums and its result."""
        graph = cls()
        for op in aliases.operations:
            if not op.computes:
                continue
            nodes = {id(each): graph.node(each) for each in op.inputs if aliases.get(each) is None}
            copied = aliases.copied(op)
            if copied is not None:
                node = nodes[id(copied)]
            elif any(aliases.depends(each) for each in op.inputs if each.numeric):
                parents = dict.fromkeys(nodes[id(each)] for each in aliases.activations(op))
                node = graph.add(parent for parent in parents if parent)
            else:
                node = 0
            for each in op.outputs:
                graph._nodes[each.version] = node
        return graph

    def add(self, parents: Iterable[int]) -> int:
        """Append a node and return its number."""
        self.parents.append(tuple(parents))
        return len(self.parents) - 1

    def made(self, op: Operation) -> int:
        """Return the node of an operation's result."""
        return self._nodes.get(op.out.version, 0)

    def node(self, value: Value) -> int:
        """Return the node of an activation; a view of a part of one gets a node on its first use."""
        return self.piece(value, self._nodes.get(value.version, 0))

    def piece(self, value: Value, whole: int) -> int:
        """Return the node of ``value``, a view of the value at node ``whole``: its own node if it is a part, else ``whole``."""
        steps = _steps(value)
        if not whole or math.prod(size for _, size in steps) >= value.entries:
            return whole
        key = whole, (value.offset, steps)
        if key not in self._pieces:
            self._pieces[key] = self.add([whole])
            self.pieces[self._pieces[key]] = key
        return self._pieces[key]


def _steps(value: Value) -> tuple[tuple[int, int], ...]:
    """Return (stride, length) of each dim, independent of how a view splits or merges dims."""
    found = [(step, size) for step, size in zip(value.strides, value.shape, strict=True) if size > 1 and step > 0]
    merged: list[tuple[int, int]] = []
    for step, size in sorted([*found, *([(1, 2)] if value.complex else [])], reverse=True):
        if merged and merged[-1][0] == step * size:
            merged[-1] = step, size * merged[-1][1]
        else:
            merged.append((step, size))
    return tuple(merged)


def meet(a: Region, b: Region) -> bool:
    """Return whether two pieces of one value have an entry in common."""
    ranges: dict[int, list[int]] = {}
    for (_, steps), sign in ((a, 1), (b, 0)):
        for stride, size in steps:
            low_high = ranges.setdefault(stride, [0, 0])
            low_high[sign] += (size - 1) * (1 if sign else -1)
    return _reached(b[0] - a[0], [(stride, low, high) for stride, (low, high) in sorted(ranges.items(), reverse=True)])


def _reached(distance: int, steps: Sequence[tuple[int, int, int]]) -> bool:
    """Return whether ``distance`` is a sum of one multiple of each stride, with each multiple within its limits."""
    if not steps:
        return distance == 0
    (stride, low, high), rest = steps[0], steps[1:]
    below = sum(each * least for each, least, _ in rest)
    above = sum(each * most for each, _, most in rest)
    first, last = max(low, -((above - distance) // stride)), min(high, (distance - below) // stride)
    return any(_reached(distance - count * stride, rest) for count in range(first, last + 1))


class Carriers:
    """Which parameters (as bits) jointly carry a factor into every value: multiplying all of them by c multiplies it by c."""

    def __init__(self, aliases: Aliases) -> None:
        self._aliases = aliases
        self._carries: dict[int, int] = {}
        for op in aliases.operations:
            if op.computes:
                copied = aliases.copied(op)
                carries = self._result(op) if copied is None else self.of(copied)
                for each in op.outputs:
                    self._carries[each.version] = carries

    def of(self, value: Value) -> int:
        """Return the parameters (as bits) that carry a factor into ``value``."""
        alias = self._aliases.get(value)
        if alias is None:
            return self._carries.get(value.version, 0)
        return 1 << alias.carrier if alias.linear else 0

    def _result(self, op: Operation) -> int:
        name, values = op.name, [each for each in op.inputs if each.numeric]
        parameters = [self.of(each) for each in values if self._aliases.get(each) is not None]
        if name in ops.CONTRACTIONS and len(values) > 1 and not parameters:  # such as attention weights times values
            return self._product(name, values[-2:][::-1], [])
        if name in ops.CONTRACTIONS or name in ops.AFFINE_NORMS:
            # A factor on a bias alone is not a factor on the result, if the weight's size is fixed.
            return union(parameters) if all(parameters) else 0
        if name in ops.PRODUCTS and values:
            return self._product(name, values, parameters)
        if name in ops.WRITES:  # a write into an empty tensor carries what the written values carry
            values = [each for each in values if self._aliases.depends(each)]
        if name in ops.LINEAR and values and all(self.of(each) for each in values):
            return union(self.of(each) for each in values)
        return 0

    def _product(self, name: str, values: Sequence[Value], parameters: Sequence[int]) -> int:
        """Return what one side of a product carries, unless the other side depends on it too (as in x·sigmoid(x)); else 0."""
        if parameters and not name.startswith("div"):
            return parameters[0]
        sides = values[:1] if name.startswith("div") else values
        for i, side in enumerate(sides):
            others = union(self._aliases.depends(other) for other in (*values[:i], *values[i + 1 :]))
            if self.of(side) and not self.of(side) & others:
                return self.of(side)
        return 0


@dataclass(frozen=True)
class Use:
    """One use of one parameter.

    Attributes:
        op: name of the operation.
        axes: label of each axis of the parameter (in, out, gather, each, unknown).
        carriers: parameters that jointly carry a factor into this use's other operand: multiplying all of them by c
            multiplies that operand by c. A multiplier before a shared matrix can be folded into them.
        on_data: whether the other operand depends on no parameter, so that data enters the model here.
        node: node of the result in the graph.
        operands: nodes of the other operands.
        shift: s for a gain used as s + w.
        feature: whether the result is an input of another contracted parameter downstream.
        logit: whether the result is first normalized over its entries (softmax, topk), as a router's is, or weights other
            values through a sigmoid, as a gate's does.
        alone: whether the parameter acts on another parameter instead of on activations.
        summed: number of entries of each axis that are summed over; for an axis labelled "in" this may be only a part (see
            `settled`).
        taken: the constants and residuals (see `scales`) that the result has been multiplied by where it is consumed.
        takers: the nodes that consume the result.
        inner: the constants that the parameter's own module multiplied in.
    """

    op: str
    axes: tuple[str, ...]
    carriers: frozenset[str]
    on_data: bool
    node: int
    operands: tuple[int, ...]
    shift: float = 0.0
    feature: bool = False
    logit: bool = False
    alone: bool = False
    summed: tuple[int, ...] = ()
    taken: frozenset[tuple[float, float]] = frozenset()
    takers: frozenset[int] = frozenset()
    inner: float = 1.0


NORMALIZED = {"_softmax", "_safe_softmax", "_log_softmax", "topk", "sort"}


class Uses:
    """All uses of parameters in one forward pass, numbered in the order seen. Sets of uses are stored as bits.

    Attributes:
        found: index of the parameter of each use, and the use.
        sites: the operation of each use and the value that stands for the parameter.
        factors: operation → its uses of parameters, each with the number that the parameter was multiplied by.
        features: uses whose result is an input of another contracted parameter.
    """

    def __init__(self, aliases: Aliases, graph: ValueGraph, carriers: Carriers, names: Sequence[str]) -> None:
        self.found: list[tuple[int, Use]] = []
        self.sites: list[tuple[Operation, Value]] = []
        self.factors: dict[Operation, dict[int, float]] = {}
        self.features = 0
        self._aliases, self._graph, self._carriers, self._names = aliases, graph, carriers, names
        self._uses: dict[int, int] = {}
        self._direct: dict[int, int] = {}
        self._normalized: dict[int, int] = {}  # version of a weight under weight norm → use of its magnitudes
        products = _Products()
        for op in aliases.operations:
            if op.view or op.created:
                continue
            if op.name == "_weight_norm_interface" and op.fresh:
                self._record(replace(op, name="weight_norm" if any(op.args[2:]) else "mul"), op.args[1:2])
                self._normalized[op.out.version] = len(self.found) - 1
            if not op.derived:
                self._follow(op, products)
        summed = products.contractions()
        self.features |= union(each.others for each in summed.values())
        for i, product in summed.items():
            axes, counts = zip(*product.axes, strict=True)
            self.found[i] = self.found[i][0], replace(self.found[i][1], axes=axes, summed=counts)

    def of(self, value: Value) -> int:
        """Return the uses that an activation depends on."""
        return self._uses.get(value.version, 0) if self._aliases.get(value) is None else 0

    def direct(self, value: Value) -> int:
        """Return the uses whose result an activation still is, up to entrywise functions."""
        return self._direct.get(value.version, 0) if self._aliases.get(value) is None else 0

    def parameters(self, bits: int) -> frozenset[str]:
        """Return the names of the parameters of a set of uses."""
        return frozenset(self._names[index] for i, (index, _) in enumerate(self.found) if bits >> i & 1)

    def owner(self, use: int) -> str:
        """Return the module that owns the parameter of a use."""
        return self._names[self.found[use][0]].rpartition(".")[0]

    def _follow(self, op: Operation, products: _Products) -> None:
        aliases = self._aliases
        first, read = len(self.found), union(self.of(each) for each in op.inputs)
        copied = aliases.copied(op)
        if copied is not None:
            uses, direct = self.of(copied), self.direct(copied)
        else:
            used = self._record(op, op.inputs)
            numeric = [each for each in op.inputs if each.numeric]
            uses = used | union(self.of(each) for each in numeric)
            if used and op.name in ops.CONTRACTIONS:
                direct = used
            elif op.name in ops.CONTRACTIONS or op.name in ops.AFFINE_NORMS or op.name in NORMALIZED:
                direct = 0
            else:
                direct = union(self.direct(each) for each in numeric)
            self.factors[op] = self._factors(op, first)
        direct |= products.follow(op, aliases, first, read)
        for each in op.outputs:
            self._uses[each.version], self._direct[each.version] = uses, direct

    def _factors(self, op: Operation, first: int) -> dict[int, float]:
        found = {}
        for i, alias in enumerate(alias for each in op.inputs if (alias := self._aliases.get(each)) is not None):
            use = first + i
            if alias.magnitude is not None:  # magnitudes under weight norm act where the normalized weight is used
                place, use = self.found[use][1], self._normalized[alias.normalized]
                index, magnitudes = self.found[use]
                self.found[use] = index, replace(magnitudes, node=place.node, operands=place.operands)
            if alias.linear:
                found[use] = alias.factor
        return found

    def _record(self, op: Operation, inputs: Sequence[Value]) -> int:
        """Record the uses of the parameters among ``inputs`` and return them."""
        aliases, graph, carriers, name = self._aliases, self._graph, self._carriers, op.name
        others = [each for each in inputs if aliases.get(each) is None]
        carries = union(carriers.of(each) for each in others)
        operands = tuple(node for each in others if (node := graph.node(each)))
        on_data = not any(aliases.depends(each) for each in others)
        used = 0
        for value in inputs:
            alias = aliases.get(value)
            if alias is None:
                continue
            axes, summed = aliases.axes(op, value)
            alone = name in ops.CONTRACTIONS and "in" in axes and self._meets_only_parameters(inputs, value)
            if alone and any(value is each for each in op.args[-2:-1]):
                # The parameter takes the place of activations: its rows go into the other one, such as learned queries.
                axes, alone = tuple({"in": "out", "out": "gather"}.get(label, label) for label in axes), False
            if "in" in axes:
                self.features |= union(self.of(each) for each in others)
            used |= 1 << len(self.found)
            names = frozenset(each for i, each in enumerate(self._names) if carries >> i & 1)
            shift = alias.shift if alias.linear else 0.0
            use = Use(name, axes, names, on_data, graph.made(op), operands, shift, alone=alone, summed=summed)
            self.found.append((alias.index, use))
            self.sites.append((op, value))
        return used

    def _meets_only_parameters(self, inputs: Sequence[Value], value: Value) -> bool:
        met = [each for each in inputs if each is not value and each.numeric and each.dim() > 1]
        return bool(met) and all(self._aliases.get(each) is not None for each in met)


SUM_PASSED = ops.COPIES | ops.PRODUCTS | {"neg", "masked_fill", "masked_fill_"}


@dataclass
class _Product:
    """One use of a parameter in an entrywise product.

    Attributes:
        use: number of the use.
        shape: shape of the parameter.
        others: uses (as bits) that the other factor was computed by.
        axes: label and count of each axis as returned by `label_of`, once the product is summed.
        read: whether the product is used other than by a sum; then the parameter is a gain and the sum a statistic.
    """

    use: int
    shape: tuple[int, ...]
    others: int
    axes: tuple[tuple[str, int], ...] = ()
    read: bool = False


@dataclass
class _Products:
    """All products of a parameter and activations, keyed by storage.

    A mean does not count as a contraction: it divides by the number of entries, which leaves the share of each as small as a
    gain's.
    """

    _all: list[_Product] = field(default_factory=list)
    _at: dict[int, list[tuple[_Product, tuple[Axis, ...]]]] = field(default_factory=dict)

    def follow(self, op: Operation, aliases: Aliases, first: int, others: int) -> int:
        """Record an operation and return the uses (as bits) whose products it sums over.

        Args:
            op: the operation.
            aliases: the aliases of parameters.
            first: number of the operation's first use of a parameter.
            others: uses (as bits) that its inputs were computed by.
        """
        with_alias = [(each, alias) for each in op.inputs if (alias := aliases.get(each)) is not None]
        # If another parameter is multiplied in later, that is the one which a sum contracts.
        bits = self._sum(op, last=any(each.numel() > 1 for each, _ in with_alias))
        if op.name in ("mul", "mul_"):
            for use, (value, alias) in enumerate(with_alias, first):
                product = _Product(use, aliases.shape(alias), others)
                self._all.append(product)
                self._put(product, alias.layout, value, op.out)
        return bits

    def contractions(self) -> dict[int, _Product]:
        """Return, by use, the products that are read only by sums over an axis of the parameter."""
        return {each.use: each for each in self._all if not each.read and "in" in dict(each.axes)}

    def _sum(self, op: Operation, *, last: bool) -> int:
        bits = 0
        for value in {id(each): each for each in op.inputs}.values():
            passed = op.name in SUM_PASSED and not last and (op.args[0] is value or not op.name.startswith("div"))
            for product, layout in self._at.get(value.storage, []):
                if op.name == "sum":
                    product.axes = product.axes or _summed(product, layout, value, op.args)
                    bits |= 1 << product.use
                elif not passed:
                    product.read = True
                elif op.out.storage != value.storage:
                    self._put(product, layout, value, op.out)
        return bits

    def _put(self, product: _Product, layout: Sequence[Axis], value: Value, out: Value) -> None:
        broadcast = range(out.dim() - value.dim(), out.dim())
        self._at.setdefault(out.storage, []).append((product, carried_to(layout, value, broadcast, out)))


def _summed(product: _Product, layout: Sequence[Axis], value: Value, args: Any) -> tuple[tuple[str, int], ...]:
    every = range(value.dim())
    dims = {dim % value.dim() for dim in (len(args) > 1 and args[1]) or every} if value.dim() else set()
    seen = ["in" if dim in dims else "each" for dim in every]
    return tuple(label_of(axis, size, value, seen, {}) for axis, size in zip(layout, product.shape, strict=True))


@dataclass(frozen=True)
class Attention:
    """One softmax over scaled dot products.

    Attributes:
        head_dim: number of entries of a query.
        scale: the number that the dot products are multiplied by.
        others: parameters that carry a factor into the keys or, in a fused operation, into the values.
        queries: parameters that carry a factor into the queries.
        uses: uses whose results the queries are.
        keys: parameters that carry a factor into the keys.
    """

    head_dim: int
    scale: float
    others: frozenset[str]
    queries: frozenset[str]
    uses: frozenset[int]
    keys: frozenset[str] = frozenset()
