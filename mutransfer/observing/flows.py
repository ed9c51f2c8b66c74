"""What is known of every tensor in a watched forward pass: what it depends on, and what carries a factor into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Flow", "Graph", "Scores", "Sum", "numeric", "storage_key", "strides", "union"]


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
class Graph:
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
    return tensor.untyped_storage()._cdata


def numeric(tensor: torch.Tensor) -> bool:
    """Say whether a tensor holds real or complex numbers; others are indices and masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides in real numbers, so that a tensor and its view as complex numbers count alike."""
    return tuple((2 if tensor.is_complex() else 1) * each for each in tensor.stride())
