"""Products and attention: summed products of a parameter, dot products of activations, softmaxes over them, and gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import ops as ops
from .aliases import Aliases, Axis, carried_to, label_of
from .dataflow import Attention, Flow, Scores, storage_key, union

__all__ = ["Attentions", "Dots", "Ended", "Gates", "NORMALIZED", "Product", "Products", "SOFTMAX"]

Live = Sequence[tuple[torch.Tensor, Flow]]
MATMULS = {
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "dot": 0,
    "addmm": 1,
    "addmv": 1,
    "baddbmm": 1,
}  # position of the left side among the arguments
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
}  # entrywise functions that preserve a factor
PASSED = ops.LINEAR | ops.PRODUCTS | ops.UNARY | LIKE
PASSED |= {"where", "tril", "triu", "amax", "amin", "max", "logsumexp", "rsub", "maximum", "minimum"}


@dataclass(frozen=True)
class Ended:
    """A dot product consumed by something other than a softmax, and the constant that it has been multiplied by."""

    scores: Scores
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

    left: Flow
    right: Flow
    shape: tuple[int, ...]
    full: tuple[bool, ...]
    node: int
    scale: float = 1.0


class Dots:
    """All dot products of activations in one forward pass.

    Attributes:
        ended: those that are not logits of attention.
    """

    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self._pairs: dict[int, Pair] = {}

    def sides(self) -> list[Flow]:
        """Return both sides of every ended dot product."""
        return [side for each in self.ended for side in each.scores.sides]

    def copy(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Record that ``out`` is a copy of ``tensor`` in another dtype or layout."""
        if (pair := self._pairs.get(storage_key(tensor))) and tensor.shape == out.shape:
            self._pairs[storage_key(out)] = pair

    def follow(
        self, name: str, args: Any, kwargs: Any, live: Live, result: Flow, out: torch.Tensor, by: float, module: str
    ) -> None:
        """Record an operation on ``live`` activations (and perhaps parameters) that multiplies by the constant ``by``."""
        result.bent = any(flow.bent for _, flow in live) or (name in ops.UNARY and name not in LIKE and name != "pow")
        for tensor, flow in live:
            alpha = kwargs.get("alpha", 1) if name in ops.SUMS and len(args) > 1 and tensor is args[1] else 1
            others = (
                [other for each, other in live if each is not tensor and not other.dots] if name in ops.PRODUCTS else []
            )
            for other in others:  # such as the norms of both sides
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
        """Record that a dot product is consumed in ``module`` by something other than a softmax."""
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


SUM_PASSED = ops.COPIES | ops.PRODUCTS | {"neg", "masked_fill", "masked_fill_"}


@dataclass
class Product:
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
class Products:
    """All products of a parameter and activations, keyed by storage.

    A mean does not count as a contraction: it divides by the number of entries, which leaves the share of each as small as a
    gain's.
    """

    _all: list[Product] = field(default_factory=list)
    _at: dict[int, list[tuple[Product, tuple[Axis, ...]]]] = field(default_factory=dict)

    def note(
        self,
        name: str,
        args: Any,
        inputs: Sequence[torch.Tensor],
        out: torch.Tensor,
        aliases: Aliases,
        begun: int,
        others: int,
    ) -> int:
        """Record an operation and return the uses (as bits) whose products it sums over.

        Args:
            name: name of the operation.
            args: its positional arguments.
            inputs: its tensor inputs.
            out: the result.
            aliases: the aliases of parameters.
            begun: number of the operation's first use of a parameter.
            others: uses (as bits) that its inputs were computed by.
        """
        with_alias = [(each, alias) for each in inputs if (alias := aliases.get(each)) is not None]
        # If another parameter is multiplied in later, that is the one which a sum contracts.
        bits = self._follow(name, args, inputs, out, last=any(each.numel() > 1 for each, _ in with_alias))
        if name in ("mul", "mul_"):
            for use, (tensor, alias) in enumerate(with_alias, begun):
                product = Product(use, aliases.shape(alias), others)
                self._all.append(product)
                self._put(product, alias.layout, tensor, out)
        return bits

    def contractions(self) -> dict[int, Product]:
        """Return, by use, the products that are read only by sums over an axis of the parameter."""
        return {each.use: each for each in self._all if not each.read and "in" in dict(each.axes)}

    def _follow(self, name: str, args: Any, inputs: Sequence[torch.Tensor], out: torch.Tensor, *, last: bool) -> int:
        bits = 0
        for tensor in {id(each): each for each in inputs}.values():
            passed = name in SUM_PASSED and not last and (args[0] is tensor or not name.startswith("div"))
            for product, layout in self._at.get(storage_key(tensor), []):
                if name == "sum":
                    product.axes = product.axes or _summed(product, layout, tensor, args)
                    bits |= 1 << product.use
                elif not passed:
                    product.read = True
                elif storage_key(out) != storage_key(tensor):
                    self._put(product, layout, tensor, out)
        return bits

    def _put(self, product: Product, layout: Sequence[Axis], tensor: torch.Tensor, out: torch.Tensor) -> None:
        broadcast = range(out.dim() - tensor.dim(), out.dim())
        self._at.setdefault(storage_key(out), []).append((product, carried_to(layout, tensor, broadcast, out)))


def _summed(product: Product, layout: Sequence[Axis], tensor: torch.Tensor, args: Any) -> tuple[tuple[str, int], ...]:
    every = range(tensor.dim())
    dims = {dim % tensor.dim() for dim in (len(args) > 1 and args[1]) or every} if tensor.dim() else set()
    seen = ["in" if dim in dims else "each" for dim in every]
    return tuple(label_of(axis, size, tensor, seen, {}) for axis, size in zip(layout, product.shape, strict=True))


class Attentions:
    """All attention of one forward pass.

    Attributes:
        found: the attentions in the order seen.
        attended: the dot products that a softmax consumes.
    """

    def __init__(self, decode: Callable[[int], frozenset[str]]) -> None:
        self.found: list[Attention] = []
        self.attended: list[Scores] = []
        self._decode = decode

    def see(
        self, name: str, args: Any, kwargs: Any, flow: Callable[[torch.Tensor], Flow], dots: Dots, module: str
    ) -> None:
        """Record an operation; a distance does not count as attention and is recorded as ended in ``dots``."""
        if name.startswith("_scaled_dot_product"):
            head_dim, queries, keys = int(args[0].shape[-1]), flow(args[0]), flow(args[1])
            scale = kwargs.get("scale") or head_dim**-0.5
            self._note(head_dim, scale, queries, keys, keys.carries | flow(args[2]).carries)
        elif name in SOFTMAX:
            for scores, scale in flow(args[0]).dots.items():
                if scores.distance:
                    dots.end(scores, scale, module)
                    continue
                self.attended.append(scores)
                self._note(scores.size, scale, scores.left, scores.right, scores.right.carries)

    def _note(self, head_dim: int, scale: float, queries: Flow, keys: Flow, others: int) -> None:
        scale *= queries.number * keys.number
        uses = frozenset(queries.factors)
        names = self._decode(others), self._decode(queries.carries)
        self.found.append(Attention(head_dim, scale, *names, uses, self._decode(keys.carries)))


NORMALIZED = {"_softmax", "_safe_softmax", "_log_softmax", "topk", "sort"}


class Gates:
    """All gates and logits of one forward pass.

    Attributes:
        logits: uses (as bits) whose results are gates or logits.
    """

    def __init__(self) -> None:
        self.logits = 0
        self._sigmoids = 0

    def see(
        self,
        name: str,
        flows: Sequence[Flow],
        result: Flow,
        live: Sequence[tuple[torch.Tensor, Flow]],
        used_by: Callable[[int], frozenset[str]],
    ) -> None:
        """Record an operation on ``flows``; ``live`` are its activations, and ``used_by`` names the parameters of uses."""
        if name in NORMALIZED:
            self.logits |= union(each.direct for each in flows)
        if name == "sigmoid":
            self._sigmoids |= result.direct
        if name in ops.WEIGHTINGS:
            self._meet(name, live, used_by)

    def _meet(
        self, name: str, live: Sequence[tuple[torch.Tensor, Flow]], used_by: Callable[[int], frozenset[str]]
    ) -> None:
        """Mark the gates among activations that are multiplied with each other.

        A gate is the result of a sigmoid, or one number for many entries of the other activation. It weights an activation
        that was made by other parameters; if both come from the same one, it is part of a nonlinearity.
        """
        for tensor, each in live:
            wide = [other for other, _ in live if name in ops.PRODUCTS and _spread(tensor, other)]
            gates = each.direct if wide else each.direct & self._sigmoids
            makers = used_by(gates)
            if any(not makers & used_by(other.direct) for _, other in live if other is not each):
                self.logits |= gates


def _spread(one: torch.Tensor, many: torch.Tensor) -> bool:
    """Return whether every entry of ``one`` is combined with several of ``many``, and each of ``many`` with one of ``one``."""
    if not 0 < one.dim() <= many.dim():  # a sum over everything is not a gate
        return False
    sizes = zip(reversed(one.shape), reversed(many.shape), strict=False)
    return one.numel() < many.numel() and all(size in (1, other) for size, other in sizes)
