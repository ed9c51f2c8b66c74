"""Data flow of a traced forward pass: which parameters every tensor depends on, and which can carry a factor into it.

A piece of a tensor (a chunk, a slice) is a separate value: a scale and a shift computed together by one layer are two values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._torch_internals import storage_id

__all__ = [
    "Attention",
    "Flow",
    "ValueGraph",
    "Pieces",
    "Region",
    "Scores",
    "Sum",
    "Use",
    "meet",
    "numeric",
    "storage_key",
    "strides",
    "union",
]


@dataclass
class Flow:
    """What a tensor depends on. Sets are stored as bits: bit i is parameter i, or use i in the order seen.

    Attributes:
        depends: parameters that the tensor depends on.
        carries: parameters that jointly carry a factor into the tensor.
        uses: uses that the tensor depends on.
        direct: uses whose result the tensor still is, up to entrywise functions.
        factors: use that carries a factor → the constants multiplied in since.
        residual: the constants multiplied in that are on no parameter's result (see `scales`).
        product: set on the product of two activations.
        dots: dot product that the tensor is still a function of → the constants multiplied in since (see `products`).
        bent: whether a nonlinearity has been applied, after which a constant is no longer a factor of the dot products.
        node: the tensor's node in the graph.
    """

    depends: int = 0
    carries: int = 0
    uses: int = 0
    direct: int = 0
    factors: dict[int, float] = field(default_factory=dict)
    residual: float = 1.0
    product: Scores | None = None
    dots: dict[Scores, float] = field(default_factory=dict)
    bent: bool = False
    node: int = 0

    @property
    def number(self) -> float:
        """The constant that the tensor has been multiplied by since the last use."""
        return next(iter(self.factors.values()), 1.0) * self.residual


@dataclass(frozen=True, eq=False)
class Scores:
    """A product of two activations that may become attention.

    Attributes:
        size: number of entries that are summed over.
        left: the left side.
        right: the right side.
        nodes: the node that computes it and the nodes that it passes through.
        distance: whether it is a distance between the two sides instead of a product.
    """

    size: int
    left: Flow
    right: Flow
    nodes: set[int] = field(default_factory=set)
    distance: bool = False

    @property
    def sides(self) -> tuple[Flow, Flow]:
        """The left and the right side."""
        return self.left, self.right


@dataclass(frozen=True)
class Sum:
    """One sum of two activations: nodes of the result and of both sides, and the parameters that carry a factor into each."""

    node: int
    left: int
    right: int
    left_carries: int
    right_carries: int


@dataclass
class ValueGraph:
    """Graph of the values in a forward pass. Node 0 stands for everything that depends on no parameter.

    Attributes:
        parents: the parents of each node.
        result: the node of the loss.
        sums: the sums of two activations.
        pieces: node that is a part of another → (the node of the whole, which part).
    """

    parents: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    result: int = 0
    sums: list[Sum] = field(default_factory=list)
    pieces: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def add(self, parents: Iterable[int]) -> int:
        """Append a node and return its number."""
        self.parents.append(tuple(parents))
        return len(self.parents) - 1


def union(bits: Iterable[int]) -> int:
    """Return the union of sets that are stored as bits."""
    total = 0
    for each in bits:
        total |= each
    return total


def storage_key(tensor: torch.Tensor) -> int:
    """Return the key of a tensor's storage, which all its views share."""
    return storage_id(tensor)


def numeric(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds real or complex numbers; other tensors are indices and masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides counted in real numbers, so that a tensor and its complex view are comparable."""
    return tuple((2 if tensor.is_complex() else 1) * each for each in tensor.stride())


# Offset of the first entry, and (stride, length) of each dim, the longest stride first.
Region = tuple[int, tuple[tuple[int, int], ...]]


class Pieces:
    """Nodes for views of a part of a value; each is a child of the value's node in the graph."""

    def __init__(self, graph: ValueGraph) -> None:
        self._graph = graph
        self._nodes: dict[tuple[int, Region], int] = {}

    def node(self, tensor: torch.Tensor, whole: int) -> int:
        """Return the node of ``tensor``, a view of the value at node ``whole``: a new node if it is a part, else ``whole``."""
        steps = _steps(tensor)
        width = tensor.element_size() // (2 if tensor.is_complex() else 1)
        if not whole or math.prod(size for _, size in steps) * width >= tensor.untyped_storage().nbytes():
            return whole
        begin = int(tensor.storage_offset()) * (2 if tensor.is_complex() else 1)
        key = whole, (begin, steps)
        if key not in self._nodes:
            self._nodes[key] = self._graph.add([whole])
            self._graph.pieces[self._nodes[key]] = key
        return self._nodes[key]


def _steps(tensor: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Return (stride, length) of each dim, independent of how a view splits or merges dims."""
    found = [(step, size) for step, size in zip(strides(tensor), tensor.shape, strict=True) if size > 1 and step > 0]
    merged: list[tuple[int, int]] = []
    for step, size in sorted([*found, *([(1, 2)] if tensor.is_complex() else [])], reverse=True):
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
