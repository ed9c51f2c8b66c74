"""Aliases of parameters: which tensors stand for a parameter, where its axes lie in them, and how they are cut into pieces.

Axes are tracked by stride, so views need no special rules. Pieces that grow differently have different roles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import ops as ops
from .dataflow import storage_key, strides

__all__ = ["Axis", "Cut", "Cuts", "Alias", "Aliases", "carried_to", "label_of", "layout_of"]

Axis = tuple[tuple[int, int], ...]  # (stride, size) of every part of one axis of a parameter; empty if it is lost


def layout_of(tensor: torch.Tensor) -> tuple[Axis, ...]:
    """Return the layout of a tensor's axes in its own storage."""
    return tuple(((stride, size),) for stride, size in zip(strides(tensor), tensor.shape, strict=True))


def carried_to(
    layout: Sequence[Axis], tensor: torch.Tensor, dims: Sequence[int | None], out: torch.Tensor
) -> tuple[Axis, ...]:
    """Return the layout of the axes in the storage of ``out``, given that dim i of ``tensor`` became its dim ``dims[i]``.

    ``dims[i]`` is None if entries of dim i were looked up; an axis that lies in such a dim is lost.
    """
    axes = []
    for axis in layout:
        found = [(dims[dim], multiple, size) for dim, multiple, size in _parts(axis, tensor)]
        moved = [(strides(out)[to] * multiple, size) for to, multiple, size in found if to is not None]
        axes.append(tuple(moved) if len(moved) == len(found) else ())
    return tuple(axes)


def label_of(
    axis: Axis, size: int, tensor: torch.Tensor, seen: Sequence[str], groups: Mapping[int, int]
) -> tuple[str, int]:
    """Return an axis's label and how many of its ``size`` entries are summed over.

    ``seen`` holds a label for each dim of ``tensor``. ``groups`` maps a dim that is summed over only within groups to the
    number of groups.
    """
    if size == 1:  # the stride carries no information; if the axis grows, `settled` takes the wider model's label
        return "each", 1
    found = [
        (strides(tensor)[dim], seen[dim], part, groups.get(dim, 1))
        for dim, _, part in _parts(axis, tensor)
        if dim < len(seen)
    ]
    labels = {label for _, label, _, _ in found}
    if "in" in labels:
        cut = len(labels) > 1 or any(parted > 1 for *_, parted in found)
        return "in", math.prod(part // parted for _, label, part, parted in found if label == "in") if cut else size
    return (min(found)[1], 1) if found else ("unknown", 1)


def _parts(axis: Axis, tensor: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (dim, steps in it per step along the axis, number of entries) for every dim of a view that holds the axis."""
    for stride, size in axis:
        for dim, (at, length) in enumerate(zip(strides(tensor), tensor.shape, strict=True)):
            if size == 1 or length == 1 or at < 1:
                continue
            if stride <= at < stride * size and at % stride == 0:
                yield dim, 1, min(length, stride * size // at)
            elif at < stride < at * length and stride % at == 0:
                yield dim, stride // at, min(at * length // stride, size)


@dataclass(frozen=True)
class Alias:
    """A parameter, or a tensor computed entrywise from one parameter alone.

    Attributes:
        index: index of the parameter.
        layout: where the parameter's axes lie in the tensor's storage.
        linear: whether a factor on the parameter is a factor on the tensor.
        shift: the number added to the parameter, as in gains used as 1 + w.
        factor: the number that the parameter was multiplied by.
        sizes: for a weight under weight norm, the index and the use of its magnitude parameter, which carries its factors.
    """

    index: int
    layout: tuple[Axis, ...]
    linear: bool = True
    shift: float = 0.0
    factor: float = 1.0
    sizes: tuple[int, int] | None = None

    @property
    def carrier(self) -> int:
        """Index of the parameter that carries a factor into the tensor."""
        return self.index if self.sizes is None else self.sizes[0]


class Aliases:
    """All tensors that stand for one of ``parameters``, keyed by storage, so views need no special rules."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._shapes = [tuple(each.shape) for each in parameters]
        self._aliases = {storage_key(each): Alias(i, layout_of(each)) for i, each in enumerate(parameters)}

    def get(self, tensor: torch.Tensor) -> Alias | None:
        """Return the parameter that ``tensor`` stands for, or None."""
        return self._aliases.get(storage_key(tensor))

    def shape(self, alias: Alias) -> tuple[int, ...]:
        """Return the shape of the parameter itself."""
        return self._shapes[alias.index]

    def sized(self, tensor: torch.Tensor, by: tuple[int, int]) -> None:
        """Make the magnitude parameter ``by`` (index and use) carry the factors of the normalized weight ``tensor``."""
        self._aliases[storage_key(tensor)] = replace(self._aliases[storage_key(tensor)], linear=True, sizes=by)

    def derive(
        self, name: str, args: Any, tensor: torch.Tensor, out: torch.Tensor, number: float | None, *, alone: bool
    ) -> Alias | None:
        """Register ``out`` as an alias of the parameter of ``tensor`` if the operation is entrywise; otherwise return None.

        Args:
            name: name of the operation.
            args: its positional arguments.
            tensor: the input that stands for a parameter.
            out: the result.
            number: the constant that a product multiplies or divides by, if any.
            alone: whether ``tensor`` is the only tensor among the inputs.
        """
        alias = self._aliases[storage_key(tensor)]
        dims: list[int | None] = list(range(tensor.dim()))
        if name in ops.LOOKUPS:
            dims = _looked_up(name, args, tensor)
        elif name == "repeat":  # the layout of the first copy
            dims = [out.dim() - tensor.dim() + dim for dim in range(tensor.dim())]
        elif (
            name in ops.CONTRACTIONS
            or name in ops.AFFINE_NORMS
            or out.shape != tensor.shape
            or not (name in ops.ENTRYWISE or name in ops.COPIES or name.startswith("_weight_norm"))
        ):
            return None
        linear, shift, factor = alias.linear, alias.shift, alias.factor
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
        layout = carried_to(alias.layout, tensor, dims, out)
        made = self._aliases[storage_key(out)] = Alias(alias.index, layout, linear, shift, factor)
        return made

    def axes(self, name: str, args: Any, tensor: torch.Tensor) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return a label for each axis of the parameter and the number of its entries that are summed over.

        Labels are in, out, gather, each and unknown, found from the view that the operation received. The number is 1 for
        an axis that is not "in", and less than the axis's size if only a part of it is summed over.
        """
        alias = self._aliases[storage_key(tensor)]
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
            for axis, size in zip(alias.layout, self._shapes[alias.index], strict=True)
        ]
        return tuple(label for label, _ in found), tuple(summed for _, summed in found)


def _is_bias(name: str, args: Any, tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` is the bias that a fused attention adds to its logits."""
    return name.startswith("_scaled_dot_product") and not any(each is tensor for each in args[:3])


def _looked_up(name: str, args: Any, tensor: torch.Tensor) -> list[int | None]:
    """Return the new position of each dim of ``tensor`` when entries of one dim are looked up; None for that dim."""
    if name != "index":
        dims: list[int | None] = list(range(tensor.dim()))
        dims[args[1]] = None
        return dims
    chosen = [i for i, each in enumerate(args[1]) if each is not None]
    if len(chosen) != 1:
        return [None] * tensor.dim()
    at, more = chosen[0], args[1][chosen[0]].dim() - 1
    return [None if dim == at else dim + more * (dim > at) for dim in range(tensor.dim())]


@dataclass
class Cut:
    """A parameter, or a result of parameters, and all pieces that were cut from it.

    Attributes:
        whole: shape of the tensor that was cut.
        owners: name of the parameter if the tensor stands for one; otherwise empty.
        direct: uses (as bits) whose result the tensor is.
        pieces: (sizes, offsets) of each piece, one entry per dim of ``whole``.
    """

    whole: tuple[int, ...]
    owners: frozenset[str]
    direct: int
    pieces: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def unevenly(self, wide: Cut) -> bool:
        """Return whether the pieces grow differently in a wider model; a larger number of equal pieces does not count."""
        for dim, (size, wide_size) in enumerate(zip(self.whole, wide.whole, strict=False)):
            sizes, wide_sizes = ({piece[dim] for piece, _ in each.pieces} for each in (self, wide))
            alike = {wide_size * each for each in sizes} == {size * each for each in wide_sizes}
            more = sizes == wide_sizes and len(sizes) == 1 and self._covers(dim) and wide._covers(dim)
            if size != wide_size and not (alike or more):
                return True
        return False

    def _covers(self, dim: int) -> bool:
        return sum({begin[dim]: size[dim] for size, begin in self.pieces}.values()) == self.whole[dim]


class Cuts:
    """All tensors cut in one forward pass, in the order seen and keyed by storage and shape.

    A tensor may be cut in one step or piece by piece.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[int, ...]], Cut] = {}

    def add(self, whole: torch.Tensor, pieces: Iterable[torch.Tensor], owners: frozenset[str], direct: int) -> None:
        """Record the ``pieces`` that are smaller than ``whole`` and have as many dims, which excludes single entries."""
        shape = tuple(whole.shape)
        for piece in pieces:
            if piece.dim() == whole.dim() and piece.numel() < whole.numel():
                cut = self._found.setdefault((storage_key(whole), shape), Cut(shape, owners, direct))
                offset = piece.storage_offset() - whole.storage_offset()
                steps = zip(whole.stride(), shape, strict=True)
                begins = tuple(int(offset // at % size) if at and size else 0 for at, size in steps)
                cut.pieces.add((tuple(piece.shape), begins))

    def uneven(self, wider: Cuts) -> Iterator[Cut]:
        """Return the tensors that are cut into pieces that grow differently in a wider model's forward pass."""
        pairs = zip(self._found.values(), wider._found.values(), strict=False)
        return (cut for cut, wide in pairs if cut.unevenly(wide))
