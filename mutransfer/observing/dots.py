"""Dot products of activations on their way: made by a matmul or by a product that is summed, until something ends them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import operations as ops
from .flows import Flow, Scores, storage_key

__all__ = ["SOFTMAX", "Dots", "Ended"]

Live = Sequence[tuple[torch.Tensor, Flow]]
MATMULS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "addmv": 1, "baddbmm": 1}  # the place of the left side
DISTANCES = {"_cdist_forward", "_euclidean_dist", "cdist"}
SOFTMAX = {"_softmax", "_safe_softmax"}
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
}  # a factor goes through
PASSED = ops.LINEAR | ops.PRODUCTS | ops.UNARY | LIKE
PASSED |= {"where", "tril", "triu", "amax", "amin", "max", "logsumexp", "rsub", "maximum", "minimum"}


@dataclass(frozen=True)
class Ended:
    """A dot product where something else than a softmax takes it in, and the number that it has been multiplied with."""

    scores: Scores
    scale: float
    module: str


@dataclass(frozen=True)
class Pair:
    """An entrywise product of two activations, of ``shape``; ``full`` says of which dims neither is one entry repeated."""

    left: Flow
    right: Flow
    shape: tuple[int, ...]
    full: tuple[bool, ...]
    node: int
    scale: float = 1.0


class Dots:
    """All dot products of activations in one forward pass.

    Attributes:
        ended: those that are no attention's logits.
    """

    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self._pairs: dict[int, Pair] = {}

    def sides(self) -> list[Flow]:
        """Return both sides of all of them."""
        return [side for each in self.ended for side in each.scores.sides]

    def copy(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Note that ``out`` is ``tensor`` in another type or layout."""
        if (pair := self._pairs.get(storage_key(tensor))) and tensor.shape == out.shape:
            self._pairs[storage_key(out)] = pair

    def follow(
        self, name: str, args: Any, kwargs: Any, live: Live, result: Flow, out: torch.Tensor, by: float, module: str
    ) -> None:
        """Note an operation on ``live`` activations (and perhaps parameters) that multiplied with the number ``by``."""
        result.bent = any(flow.bent for _, flow in live) or (name in ops.UNARY and name not in LIKE and name != "pow")
        for tensor, flow in live:
            alpha = kwargs.get("alpha", 1) if name in ops.SUMS and len(args) > 1 and tensor is args[1] else 1
            beside = (
                [other for each, other in live if each is not tensor and not other.dots] if name in ops.PRODUCTS else []
            )
            for other in beside:  # such as the norms of both sides
                alpha *= (
                    1 / other.number if name.startswith("div") and tensor is args[0] and other.number else other.number
                )
            for scores, scale in flow.dots.items():
                scores.nodes.add(result.node)
                if name in PASSED:
                    result.dots[scores] = scale if flow.bent else scale * alpha * by
                elif name not in SOFTMAX:
                    self.end(scores, scale, module)
        self._make(name, args, live, result)
        self._pair(name, live, result, out, by)

    def end(self, scores: Scores, scale: float, module: str) -> None:
        """Note that something takes a dot product in."""
        self.ended.append(Ended(scores, scale * scores.left.number * scores.right.number, module))

    def _make(self, name: str, args: Any, live: Live, result: Flow) -> None:
        flows = {id(tensor): flow for tensor, flow in live}
        made = None
        if name in MATMULS or name in DISTANCES:
            a, b = args[MATMULS.get(name, 0) :][:2]
            if id(a) in flows and id(b) in flows:
                made = Scores(int(a.shape[-1]), flows[id(a)], flows[id(b)], distance=name in DISTANCES)
        elif name == "sum" and live and (pair := self._pairs.get(storage_key(args[0]))):
            whole = args[0]
            full = pair.full if pair.shape == tuple(whole.shape) else (all(pair.full),) * whole.dim()
            dims = {dim % whole.dim() for dim in (len(args) > 1 and args[1]) or range(whole.dim())}
            size = math.prod(whole.shape[dim] for dim in dims if full[dim])
            if size > 1:
                made = Scores(size, pair.left, pair.right, {pair.node})
                result.dots[made] = pair.scale
        if made is not None:
            made.nodes.add(result.node)
            result.dots.setdefault(made, 1.0)
            result.bent = False

    def _pair(self, name: str, live: Live, result: Flow, out: torch.Tensor, by: float) -> None:
        known = self._pairs.pop(storage_key(out), None)
        if name == "mul" and len(live) == 2 and live[0][1].node != live[1][1].node:
            shape = tuple(out.shape)
            full = tuple(all(_full(tensor, dim - len(shape)) for tensor, _ in live) for dim in range(len(shape)))
            self._pairs[storage_key(out)] = Pair(live[0][1], live[1][1], shape, full, result.node)
        elif len(live) == 1 and (name in ops.PRODUCTS or name in {"neg", "masked_fill"}):
            pair = self._pairs.get(storage_key(live[0][0]), known)
            if pair is not None:
                both = Pair(pair.left, pair.right, pair.shape, pair.full, pair.node, pair.scale * by)
                self._pairs[storage_key(out)] = both


def _full(tensor: torch.Tensor, dim: int) -> bool:
    return tensor.dim() >= -dim and (tensor.shape[dim] == 1 or tensor.stride(dim) > 0)
