"""Which uses make logits and gates: what is normalized over its entries, and what says how much of others is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from . import operations as ops
from .flows import Flow, union

__all__ = ["NORMALIZED", "Gates"]

NORMALIZED = {"_softmax", "_safe_softmax", "_log_softmax", "topk", "sort"}


class Gates:
    """All gates and logits of one forward pass.

    Attributes:
        logits: their uses, as bits.
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
        """Note an operation on ``flows``, of which those of activations are ``live``; ``used_by`` names sets of uses."""
        if name in NORMALIZED:
            self.logits |= union(each.direct for each in flows)
        if name == "sigmoid":
            self._sigmoids |= result.direct
        if name in ops.WEIGHTINGS:
            self._meet(name, live, used_by)

    def _meet(
        self, name: str, live: Sequence[tuple[torch.Tensor, Flow]], used_by: Callable[[int], frozenset[str]]
    ) -> None:
        """Tell of activations that meet: what weights others than its own is a gate, otherwise a nonlinearity.

        That is a sigmoid, or one number for many entries of the other.
        """
        for tensor, each in live:
            wide = [other for other, _ in live if name in ops.PRODUCTS and _spread(tensor, other)]
            gates = each.direct if wide else each.direct & self._sigmoids
            own = used_by(gates)
            if any(not own & used_by(other.direct) for _, other in live if other is not each):
                self.logits |= gates


def _spread(one: torch.Tensor, many: torch.Tensor) -> bool:
    """Say whether every entry of ``one`` meets several of ``many``, and none of ``many`` several of ``one``."""
    if not 0 < one.dim() <= many.dim():  # a sum over everything is no gate
        return False
    sizes = zip(reversed(one.shape), reversed(many.shape), strict=False)
    return one.numel() < many.numel() and all(size in (1, other) for size, other in sizes)
