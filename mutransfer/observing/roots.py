"""Which tensors stand for a parameter, and what an operation does to its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import operations as ops
from .flows import storage_key
from .layouts import Axis, carried_to, label_of, layout_of

__all__ = ["Root", "Roots"]


@dataclass(frozen=True)
class Root:
    """A parameter, or a tensor made of one parameter alone, entry by entry.

    ``linear`` says that a factor on the parameter is a factor on the tensor; ``shift`` is what was added to the parameter
    first, as in gains used as 1 + w. ``factor`` is the number that it was multiplied with.
    ``sizes`` are the index and the use of the parameter that sets the sizes of a normalized weight, and carries its factors.
    """

    index: int
    layout: tuple[Axis, ...]
    linear: bool = True
    shift: float = 0.0
    factor: float = 1.0
    sizes: tuple[int, int] | None = None

    @property
    def carrier(self) -> int:
        """The index of the parameter that carries a factor into the tensor."""
        return self.index if self.sizes is None else self.sizes[0]


class Roots:
    """All tensors that stand for one of ``parameters``, by storage: views need no rules of their own."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._shapes = [tuple(each.shape) for each in parameters]
        self._roots = {storage_key(each): Root(i, layout_of(each)) for i, each in enumerate(parameters)}

    def get(self, tensor: torch.Tensor) -> Root | None:
        """Return what ``tensor`` stands for."""
        return self._roots.get(storage_key(tensor))

    def shape(self, root: Root) -> tuple[int, ...]:
        """Return the shape of the parameter itself."""
        return self._shapes[root.index]

    def sized(self, tensor: torch.Tensor, by: tuple[int, int]) -> None:
        """Let another parameter, ``by`` its index and use, carry the factors of what ``tensor`` stands for."""
        self._roots[storage_key(tensor)] = replace(self._roots[storage_key(tensor)], linear=True, sizes=by)

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
        elif name == "repeat":  # the first of the copies
            dims = [out.dim() - tensor.dim() + dim for dim in range(tensor.dim())]
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
        elif not ((name in ops.COPIES and alone) or name in ops.LOOKUPS or name == "repeat"):
            linear = False
        layout = carried_to(root.layout, tensor, dims, out)
        made = self._roots[storage_key(out)] = Root(root.index, layout, linear, shift, factor)
        return made

    def axes(self, name: str, args: Any, tensor: torch.Tensor) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Labels of the parameter's own axes (in, out, gather, each, unknown), found in the view that the operation met.

        Beside each label, the number of entries that are summed over: 1 for what is not "in", and less than all where
        only a part of the axis is.
        """
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
        groups = {0: args[8]} if name == "convolution" and args[6] and args[8] > 1 else {}
        found = [
            label_of(axis, size, tensor, seen, groups)
            for axis, size in zip(root.layout, self._shapes[root.index], strict=True)
        ]
        return tuple(label for label, _ in found), tuple(summed for _, summed in found)


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
