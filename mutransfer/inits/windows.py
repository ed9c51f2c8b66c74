"""A tensor as a window (type, size, stride, offset) on one state of its storage, so that views and shared memory keep apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TRUNCATED", "Literal", "Step", "Version", "Window", "apart", "box"]

TRUNCATED = "trunc_normal_"  # the one step that is no aten operation: its rejection loop reads values


@dataclass(frozen=True, eq=False)
class Version:
    """One state of a storage: what ``step`` left in it, or memory as it was allocated."""

    storage: torch.UntypedStorage  # held: a freed storage's address would be given to the next one
    step: Step | None = None


@dataclass(frozen=True, eq=False)
class Window:
    """A tensor as a look at one version of a storage."""

    version: Version
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def key(self) -> int:
        """The storage's identity."""
        return self.version.storage._cdata

    @property
    def repeats(self) -> bool:
        """Whether one entry of memory is seen in several places."""
        return any(stride == 0 and size > 1 for size, stride in zip(self.size, self.stride, strict=True))

    @property
    def whole(self) -> bool:
        """Whether every byte of the storage is seen."""
        nbytes = math.prod(self.size) * self.dtype.itemsize
        return not self.repeats and nbytes == self.version.storage.nbytes()

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """What two windows on the same entries of one storage have in common."""
        return self.size, self.stride, self.offset


@dataclass(eq=False)
class Step:
    """One operation; ``results`` are the windows it wrote, in its arguments or its outputs."""

    order: int
    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[Window]

    @property
    def name(self) -> str:
        """The operation without its overload."""
        return self.func if isinstance(self.func, str) else self.func._opname

    @property
    def random(self) -> bool:
        """Whether two runs differ."""
        return self.func == TRUNCATED or torch.Tag.nondeterministic_seeded in self.func.tags


@dataclass(frozen=True)
class Literal:
    """The values of a tensor that was made outside."""

    tensor: torch.Tensor


def apart(a: Window, b: Window) -> bool:
    """Whether two windows on one storage have no entry in common, as far as their ends tell."""
    return _end(a) < b.offset or _end(b) < a.offset


def _end(window: Window) -> int:
    return window.offset + sum((size - 1) * stride for size, stride in zip(window.size, window.stride, strict=True))


def box(place: Window, window: Window) -> tuple[tuple[int, int, int], ...] | None:
    """Return where ``place`` lies in ``window``, (first index, count, step) per axis; None if that is no box."""
    rest = place.offset - window.offset
    if rest < 0 or place.dtype != window.dtype:
        return None
    found = [(0, 1, 1)] * len(window.size)
    axes = sorted((axis for axis, size in enumerate(window.size) if size > 1), key=lambda axis: -window.stride[axis])
    for axis in axes:
        first, rest = divmod(rest, window.stride[axis])
        found[axis] = (first, 1, 1)
    for size, stride in zip(place.size, place.stride, strict=True):
        if size == 1:
            continue
        along = [axis for axis in axes if stride >= window.stride[axis]]
        if not along or stride % window.stride[along[0]] or found[along[0]][1] > 1:
            return None
        found[along[0]] = (found[along[0]][0], size, stride // window.stride[along[0]])
    ends = [first + (count - 1) * step for first, count, step in found]
    return tuple(found) if not rest and all(map(int.__lt__, ends, window.size)) else None
