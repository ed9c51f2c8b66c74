"""Which tensors stand for a parameter, and which of their strides is which of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import operations as ops
from .flows import storage_key

__all__ = ["Root", "Roots"]


@dataclass(frozen=True)
class Root:
    """A parameter, or a tensor made of one parameter alone, entry by entry.

    ``linear`` says that a factor on the parameter is a factor on the tensor; ``shift`` is what was added to the parameter
    first, as in gains used as 1 + w. ``factor`` is the number that it was multiplied with.
    """

    index: int
    strides: tuple[int, ...]
    linear: bool = True
    shift: float = 0.0
    factor: float = 1.0


class Roots:
    """All tensors that stand for one of ``parameters``, by storage: views need no rules of their own."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._shapes = [tuple(each.shape) for each in parameters]
        self._roots = {storage_key(each): Root(i, each.stride()) for i, each in enumerate(parameters)}

    def get(self, tensor: torch.Tensor) -> Root | None:
        """Return what ``tensor`` stands for."""
        return self._roots.get(storage_key(tensor))

    def derive(
        self, name: str, args: Any, tensor: torch.Tensor, out: torch.Tensor, number: float | None, *, alone: bool
    ) -> Root | None:
        """Let ``out`` stand for the parameter of ``tensor`` if the operation ``name`` works entry by entry.

        ``number`` is the constant that a product multiplies with or divides by; ``alone`` says that nothing else enters.
        """
        root = self._roots[storage_key(tensor)]
        dims: list[int | None] = list(range(tensor.dim()))
        if name in ops.LOOKUPS:
            dims = _looked_up(name, args, tensor)
        elif (
            name in ops.CONTRACTIONS
            or name in ops.AFFINE_NORMS
            or out.shape != tensor.shape
            or not (name in ops.ENTRYWISE or name in ops.COPIES or name.startswith("_weight_norm"))
        ):
            return None
        linear, shift, factor = root.linear, root.shift, root.factor
        if name in ops.SUMS and alone:
            numbers = [each for each in args if isinstance(each, (int, float)) and not isinstance(each, bool)]
            shift += (numbers[0] if name.startswith("add") else -numbers[0]) if numbers else 0.0
            linear = linear and bool(numbers)
        elif number is not None:
            linear = linear and (not name.startswith("div") or args[0] is tensor)
            by = 1 / number if name.startswith("div") and number else number
            shift, factor = shift * by, factor * by
        elif not ((name in ops.COPIES and alone) or name in ops.LOOKUPS):
            linear = False
        strides = tuple(_moved(tensor, stride, dims, out) for stride in root.strides)
        made = self._roots[storage_key(out)] = Root(root.index, strides, linear, shift, factor)
        return made

    def axes(self, name: str, args: Any, tensor: torch.Tensor) -> tuple[str, ...]:
        """Labels of the parameter's own axes (in, out, gather, each, unknown), found in the view that the operation met."""
        root = self._roots[storage_key(tensor)]
        labels = ops.CONTRACTIONS.get(name)
        if name == "convolution" and args[6]:
            labels = ops.TRANSPOSED_CONVOLUTION
        if labels is not None:
            position = next(i for i, argument in enumerate(args) if argument is tensor)
            seen = (
                labels.get(position, ())[-tensor.dim() :] if name != "convolution" else labels[position][: tensor.dim()]
            )
        elif name in ops.ENTRYWISE or name in ops.AFFINE_NORMS or name in ops.WRITES or _is_bias(name, args, tensor):
            seen = ("each",) * tensor.dim()
        else:
            seen = ()
        # An axis of size 1 has no telling stride; it cannot be the one that grows either, unless nothing else says.
        dims = [each for each in zip(tensor.stride(), tensor.shape, seen, strict=False) if each[1] > 1 and each[0] > 0]
        layout = zip(root.strides, self._shapes[root.index], strict=True)
        return tuple("each" if n == 1 else _label(stride, dims) for stride, n in layout)


def _label(stride: int, dims: list[tuple[int, int, str]]) -> str:
    """Return the label of the dim (its stride, size and label) that an axis became, or was merged into with its neighbours."""
    own = [label for at, _, label in dims if at == stride]
    merged = [label for at, size, label in dims if at < stride < at * size and stride % at == 0]
    return own[-1] if own else merged[0] if len(merged) == 1 else "unknown"


def _is_bias(name: str, args: Any, tensor: torch.Tensor) -> bool:
    """Say whether ``tensor`` is what a fused attention adds to its logits."""
    return name.startswith("_scaled_dot_product") and not any(each is tensor for each in args[:3])


def _looked_up(name: str, args: Any, tensor: torch.Tensor) -> list[int | None]:
    """Return where each dim of ``tensor`` ends up when entries of one dim are looked up; None for that dim."""
    if name != "index":
        dims: list[int | None] = list(range(tensor.dim()))
        dims[args[1]] = None
        return dims
    chosen = [i for i, each in enumerate(args[1]) if each is not None]
    if len(chosen) != 1:
        return [None] * tensor.dim()
    at, more = chosen[0], args[1][chosen[0]].dim() - 1
    return [None if dim == at else dim + more * (dim > at) for dim in range(tensor.dim())]


def _moved(tensor: torch.Tensor, stride: int, dims: list[int | None], out: torch.Tensor) -> int:
    """Return the stride in ``out`` of the axis that has ``stride`` in ``tensor``; −1 if it is lost."""
    for dim, (size, own) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        to = dims[dim]
        if own == stride and size > 1 and to is not None:
            return out.stride(to)
    return -1
