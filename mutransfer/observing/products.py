"""A parameter times activations, summed afterwards, as in (x * w).sum(-1): a contraction, though no single operation is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import operations as ops
from .flows import storage_key
from .layouts import Axis, carried_to, label_of
from .roots import Roots

__all__ = ["Product", "Products"]

PASSED = ops.COPIES | ops.PRODUCTS | {"neg", "masked_fill", "masked_fill_"}


@dataclass
class Product:
    """One use of a parameter (with ``shape``) in a product; ``others`` are the uses that the other factor was made by.

    ``axes`` are labels and counts as `label_of` gives them, once it is summed. What is ``read`` otherwise too is a gain,
    and the sum of it a statistic.
    """

    use: int
    shape: tuple[int, ...]
    others: int
    axes: tuple[tuple[str, int], ...] = ()
    read: bool = False


@dataclass
class Products:
    """All products of a parameter and activations, by storage.

    A mean is no contraction: it divides by the number of entries, which leaves the share of one as small as a gain's.
    """

    _all: list[Product] = field(default_factory=list)
    _at: dict[int, list[tuple[Product, tuple[Axis, ...]]]] = field(default_factory=dict)

    def note(
        self,
        name: str,
        args: Any,
        inputs: Sequence[torch.Tensor],
        out: torch.Tensor,
        roots: Roots,
        begun: int,
        others: int,
    ) -> int:
        """Note an operation whose uses of parameters are numbered from ``begun``; return the uses (as bits) that it sums over.

        ``others`` are the uses that its inputs were made by.
        """
        rooted = [(each, root) for each in inputs if (root := roots.get(each)) is not None]
        # Another parameter that is multiplied with later is the one that a sum contracts.
        bits = self._follow(name, args, inputs, out, last=any(each.numel() > 1 for each, _ in rooted))
        if name in ("mul", "mul_"):
            for use, (tensor, root) in enumerate(rooted, begun):
                product = Product(use, roots.shape(root), others)
                self._all.append(product)
                self._put(product, root.layout, tensor, out)
        return bits

    def contractions(self) -> dict[int, Product]:
        """Return by use the products that are read by nothing but sums over one of the parameter's axes."""
        return {each.use: each for each in self._all if not each.read and "in" in dict(each.axes)}

    def _follow(self, name: str, args: Any, inputs: Sequence[torch.Tensor], out: torch.Tensor, *, last: bool) -> int:
        bits = 0
        for tensor in {id(each): each for each in inputs}.values():
            passed = name in PASSED and not last and (args[0] is tensor or not name.startswith("div"))
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
