"""Attention of K models at once: the models become part of the batch, so that the usual kernel does them all.

`torch.vmap` has no rule for the backward pass of `scaled_dot_product_attention` and would take the models one by one.

Shape suffixes: K models, B batch, T queries, S keys; a dot stands for any axes between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FoldedAttention"]


class FoldedAttention(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` under one `torch.vmap` folds the mapped axis into the batch.

    Gradients are to be taken outside of the vmap, of the sum of its losses.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """The arguments as torch's function takes them, by place or by name."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _Folded.apply(query, key, value, attn_mask, options)


class _Folded(torch.autograd.Function):
    """A function of autograd for the sake of its rule for vmap, which is made of differentiable parts."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Nothing is mapped: it was computed from what all models share."""
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved: what all models share has no gradient."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """Fold, attend, unfold."""
        K = info.batch_size
        q, k, v = (_first(each, dim, K) for each, dim in zip((query, key, value), in_dims[:3], strict=True))
        if q.dim() < 5:  # no batch axis, and the heads may be grouped: the models alone are the batch
            if mask is not None and in_dims[3] is not None:
                mask = _ranked(_first(mask, in_dims[3], K), q.dim())
            return F.scaled_dot_product_attention(q, k, v, mask, **options), 0
        B = max(each.shape[1] for each in (q, k, v))
        q, k, v = (each.expand(K, B, *each.shape[2:]).flatten(0, 1) for each in (q, k, v))
        if mask is not None and (in_dims[3] is not None or (mask.dim() == q.dim() and mask.shape[0] > 1)):
            mask = _ranked(_first(mask, in_dims[3], K), q.dim() + 1)
            mask = mask.expand(K, B, *mask.shape[2:]).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, mask, **options)
        return out.unflatten(0, (K, B)), 0


def _first(tensor: Tensor, dim: int | None, K: int) -> Tensor:
    """The tensor with the models as its first axis."""
    return tensor.expand(K, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _ranked(mask: Tensor, rank: int) -> Tensor:
    """The mask with axes of 1 after the models', as broadcasting would put them before each model's own."""
    return mask.reshape(mask.shape[0], *[1] * (rank - mask.dim()), *mask.shape[1:])
