"""Pieces of a value are values of their own: a scale and a shift that one layer makes together are not one another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .flows import Graph, strides

__all__ = ["Pieces", "Region", "meet"]

# Where it begins, and (stride, length) of each dim, the longest stride first.
Region = tuple[int, tuple[tuple[int, int], ...]]


class Pieces:
    """Views of a part of a value, as nodes of the graph below the value's own."""

    def __init__(self, graph: Graph) -> None:
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
