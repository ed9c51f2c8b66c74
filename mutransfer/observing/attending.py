"""Attention: every softmax over dot products of activations, fused or written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .dots import SOFTMAX, Dots
from .flows import Flow, Scores
from .noted import Attention

__all__ = ["Attentions"]


class Attentions:
    """All attention of one forward pass.

    Attributes:
        found: in the order seen.
        attended: the dot products that a softmax took in.
    """

    def __init__(self, decode: Callable[[int], frozenset[str]]) -> None:
        self.found: list[Attention] = []
        self.attended: list[Scores] = []
        self._decode = decode

    def see(
        self, name: str, args: Any, kwargs: Any, flow: Callable[[torch.Tensor], Flow], dots: Dots, module: str
    ) -> None:
        """Note an operation; a distance is none of attention's products and ends among the ``dots``."""
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
