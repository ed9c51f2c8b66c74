"""Where the axes of a parameter lie in a tensor that is made of it: by strides, so that views need no rules of their own.

A view may cut one axis into several dims (heads and their entries) and merge several axes into one dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from .flows import strides

__all__ = ["Axis", "carried_to", "label_of", "layout_of"]

Axis = tuple[tuple[int, int], ...]  # (stride, size) of every part of one axis of a parameter; empty once it is lost


def layout_of(tensor: torch.Tensor) -> tuple[Axis, ...]:
    """Return the axes of a tensor in its own storage."""
    return tuple(((stride, size),) for stride, size in zip(strides(tensor), tensor.shape, strict=True))


def carried_to(
    layout: Sequence[Axis], tensor: torch.Tensor, dims: Sequence[int | None], out: torch.Tensor
) -> tuple[Axis, ...]:
    """Return the axes in the storage of ``out``, if dim i of ``tensor`` became dim ``dims[i]`` of it (None: looked up)."""
    axes = []
    for axis in layout:
        found = [(dims[dim], multiple, size) for dim, multiple, size in _parts(axis, tensor)]
        moved = [(strides(out)[to] * multiple, size) for to, multiple, size in found if to is not None]
        axes.append(tuple(moved) if len(moved) == len(found) else ())
    return tuple(axes)


def label_of(
    axis: Axis, size: int, tensor: torch.Tensor, seen: Sequence[str], groups: Mapping[int, int]
) -> tuple[str, int]:
    """Return an axis's label and how many of its ``size`` entries are summed over, given a label for each dim of ``tensor``.

    ``groups`` says that a dim which is summed over is so only within groups, and into how many it is divided.
    """
    if size == 1:  # no telling stride; it cannot be the one that grows either, unless nothing else says
        return "each", 1
    found = [
        (strides(tensor)[dim], seen[dim], part, groups.get(dim, 1))
        for dim, _, part in _parts(axis, tensor)
        if dim < len(seen)
    ]
    labels = {label for _, label, _, _ in found}
    if "in" in labels:
        cut = len(labels) > 1 or any(parted > 1 for *_, parted in found)
        return "in", math.prod(part // parted for _, label, part, parted in found if label == "in") if cut else size
    return (min(found)[1], 1) if found else ("unknown", 1)


def _parts(axis: Axis, tensor: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Dims of a view that hold entries of the axis: (dim, steps along it for one along the axis, number of entries)."""
    for stride, size in axis:
        for dim, (at, length) in enumerate(zip(strides(tensor), tensor.shape, strict=True)):
            if size == 1 or length == 1 or at < 1:
                continue
            if stride <= at < stride * size and at % stride == 0:
                yield dim, 1, min(length, stride * size // at)
            elif at < stride < at * length and stride % at == 0:
                yield dim, stride // at, min(at * length // stride, size)
