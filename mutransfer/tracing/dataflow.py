"""What is known of every tensor in a traced forward pass: which parameters it depends on, and which can carry a factor into it.

A piece of a tensor (a chunk, a slice) is a value of its own: a scale and a shift that one layer makes together are two values.
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
    """What a tensor depends on. Sets are bits: bit i is parameter i, or use i in the order seen.

    ``carries`` are the parameters that jointly carry a factor into the tensor; ``direct`` the uses whose result it still
    is, up to functions of single entries. ``factors`` are the numbers multiplied in since each use that carries, and
    ``residual`` those that are on no parameter's result (`factors`). ``product`` is set on the product of two activations,
    and ``dots`` are all dot products that the tensor still is a function of, each with the number multiplied in since
    (`dots`); after a nonlinearity (``bent``) a number is no factor of theirs.
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
        """The number that the tensor has been multiplied with since the last use."""
        return next(iter(self.factors.values()), 1.0) * self.residual


@dataclass(frozen=True, eq=False)
class Scores:
    """A product of two activations that may become attention: the size summed over, and its two sides.

    ``nodes`` are where it was made and what it went through; ``distance`` says that it is one instead.
    """

    size: int
    left: Flow
    right: Flow
    nodes: set[int] = field(default_factory=set)
    distance: bool = False

    @property
    def sides(self) -> tuple[Flow, Flow]:
        """Both."""
        return self.left, self.right


@dataclass(frozen=True)
class Sum:
    """One sum of two activations: nodes of the result and of both sides, and what carries a factor into each side."""

    node: int
    left: int
    right: int
    left_carries: int
    right_carries: int


@dataclass
class ValueGraph:
    """The order of values in a forward pass. Node 0 is everything that depends on no parameter; ``result`` is the loss.

    ``pieces`` are the nodes that are a part of another: of which one, and which part.
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
    """Return the union of sets of bits."""
    total = 0
    for each in bits:
        total |= each
    return total


def storage_key(tensor: torch.Tensor) -> int:
    """Return what all views of one tensor share."""
    return storage_id(tensor)


def numeric(tensor: torch.Tensor) -> bool:
    """Say whether a tensor holds real or complex numbers; others are indices and masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides in real numbers, so that a tensor and its view as complex numbers count alike."""
    return tuple((2 if tensor.is_complex() else 1) * each for each in tensor.stride())


# Where it begins, and (stride, length) of each dim, the longest stride first.
Region = tuple[int, tuple[tuple[int, int], ...]]


class Pieces:
    """Views of a part of a value, as nodes of the graph below the value's own."""

    def __init__(self, graph: ValueGraph) -> None:
        self._graph = graph
        self._nodes: dict[tuple[int, Region], int] = {}

    def node(self, tensor: torch.Tensor, whole: int) -> int:
        """Return the node of ``tensor``, which is stored in the value of node ``whole``: that one's, or its own."""
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
    """Return (stride, length) of each dim, however a view cuts or merges dims."""
    found = [(step, size) for step, size in zip(strides(tensor), tensor.shape, strict=True) if size > 1 and step > 0]
    merged: list[tuple[int, int]] = []
    for step, size in sorted([*found, *([(1, 2)] if tensor.is_complex() else [])], reverse=True):
        if merged and merged[-1][0] == step * size:
            merged[-1] = step, size * merged[-1][1]
        else:
            merged.append((step, size))
    return tuple(merged)


def meet(a: Region, b: Region) -> bool:
    """Say whether two pieces of one value have an entry in common."""
    ranges: dict[int, list[int]] = {}
    for (_, steps), sign in ((a, 1), (b, 0)):
        for stride, size in steps:
            low_high = ranges.setdefault(stride, [0, 0])
            low_high[sign] += (size - 1) * (1 if sign else -1)
    return _reached(b[0] - a[0], [(stride, low, high) for stride, (low, high) in sorted(ranges.items(), reverse=True)])


def _reached(distance: int, steps: Sequence[tuple[int, int, int]]) -> bool:
    """Say whether ``distance`` is a sum of one multiple of each stride, within its limits."""
    if not steps:
        return distance == 0
    (stride, low, high), rest = steps[0], steps[1:]
    below = sum(each * least for each, least, _ in rest)
    above = sum(each * most for each, _, most in rest)
    first, last = max(low, -((above - distance) // stride)), min(high, (distance - below) // stride)
    return any(_reached(distance - count * stride, rest) for count in range(first, last + 1))


@dataclass(frozen=True)
class Use:
    """One use of one parameter: the operation, what became of each axis, and what it met.

    ``carriers`` are the parameters that jointly carry a factor into this use's other operand: multiplying all of
    them by c multiplies that operand by c. It is where a multiplier before a shared matrix can be folded.
    ``on_data`` says that the other operand depends on no parameter at all: this is where data enters the model.
    ``feature`` says that the result meets another contracted parameter downstream, ``logit`` that it is first normalized
    over its entries (softmax, topk), as a router's is, or weights other values through a sigmoid, as a gate's does.
    ``alone`` says that it acts on a parameter, not on activations. ``shift`` is s for a gain used as s + w. ``summed`` is
    how many entries of each axis are summed over: of an axis labelled "in", perhaps only a part (see `settled`). ``node``
    and ``operands`` are the result's and the other operands' places in the graph. ``taken`` are the numbers (and residuals,
    `factors`) that the result has been multiplied with where the nodes ``takers`` take it in, ``inner`` what the
    parameter's own module multiplied in.
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
    """One softmax over scaled dot products: head dim, scale, and the parameters that carry a factor into the queries.

    ``others`` are the parameters that the keys and, where the operation is fused, the values depend on through them alone;
    ``uses`` those whose results the queries are; ``keys`` carry a factor into the keys.
    """

    head_dim: int
    scale: float
    others: frozenset[str]
    queries: frozenset[str]
    uses: frozenset[int]
    keys: frozenset[str] = frozenset()
