"""Aliases of parameters: which tensors stand for a parameter, where its axes lie in them, and how they are cut into pieces.

Axes are tracked by stride, so views need no special rules. Pieces that grow differently have different roles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import ops as ops
from .ops import Decompositions, Operation, Value

__all__ = ["Alias", "Aliases", "Axis", "Cut", "carried_to", "cuts", "label_of", "uneven", "union"]

Axis = tuple[tuple[int, int], ...]  # (stride, size) of every part of one axis of a parameter; empty if it is lost


def union(bits: Iterable[int]) -> int:
    """Return the union of sets that are stored as bits."""
    total = 0
    for each in bits:
        total |= each
    return total


def carried_to(layout: Sequence[Axis], tensor: Value, dims: Sequence[int | None], out: Value) -> tuple[Axis, ...]:
    """Return the layout of the axes in the storage of ``out``, given that dim i of ``tensor`` became its dim ``dims[i]``.

    ``dims[i]`` is None if entries of dim i were looked up; an axis that lies in such a dim is lost.
    """
    axes = []
    for axis in layout:
        found = [(dims[dim], multiple, size) for dim, multiple, size in _parts(axis, tensor)]
        moved = [(out.strides[to] * multiple, size) for to, multiple, size in found if to is not None]
        axes.append(tuple(moved) if len(moved) == len(found) else ())
    return tuple(axes)


def label_of(axis: Axis, size: int, tensor: Value, seen: Sequence[str], groups: Mapping[int, int]) -> tuple[str, int]:
    """Return an axis's label and how many of its ``size`` entries are summed over.

    ``seen`` holds a label for each dim of ``tensor``. ``groups`` maps a dim that is summed over only within groups to the
    number of groups.
    """
    if size == 1:  # the stride carries no information; if the axis grows, `settled` takes the wider model's label
        return "each", 1
    found = [
        (tensor.strides[dim], seen[dim], part, groups.get(dim, 1))
        for dim, _, part in _parts(axis, tensor)
        if dim < len(seen)
    ]
    labels = {label for _, label, _, _ in found}
    if "in" in labels:
        cut = len(labels) > 1 or any(parted > 1 for *_, parted in found)
        return "in", math.prod(part // parted for _, label, part, parted in found if label == "in") if cut else size
    return (min(found)[1], 1) if found else ("unknown", 1)


def _parts(axis: Axis, tensor: Value) -> Iterator[tuple[int, int, int]]:
    """Yield (dim, steps in it per step along the axis, number of entries) for every dim of a view that holds the axis."""
    for stride, size in axis:
        for dim, (at, length) in enumerate(zip(tensor.strides, tensor.shape, strict=True)):
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
        magnitude: for a weight under weight norm, the index of its magnitude parameter, which carries its factors.
        normalized: for such a weight, the version of the normalized weight.
    """

    index: int
    layout: tuple[Axis, ...]
    linear: bool = True
    shift: float = 0.0
    factor: float = 1.0
    magnitude: int | None = None
    normalized: int = 0

    @property
    def carrier(self) -> int:
        """Index of the parameter that carries a factor into the tensor."""
        return self.index if self.magnitude is None else self.magnitude


class Aliases:
    """Which values stand for one of ``parameters``, and which parameters (as bits) every value depends on.

    Aliases are keyed by storage, so views need no special rules.

    Attributes:
        operations: the operations of the pass; those on activations are decomposed.
        magnitudes: index of the magnitude parameter of a weight under weight norm → index of the parameter that it scales.
    """

    def __init__(self, parameters: Sequence[Value], recorded: Iterable[Operation]) -> None:
        self._shapes = [each.shape for each in parameters]
        self._aliases = {
            each.storage: Alias(
                i, tuple(((stride, size),) for stride, size in zip(each.strides, each.shape, strict=True))
            )
            for i, each in enumerate(parameters)
        }
        self._depends: dict[int, int] = {}
        self.magnitudes: dict[int, int] = {}
        decompositions = Decompositions()
        self.operations = [self._followed(step) for op in recorded for step in decompositions.steps(op, self.live)]

    def get(self, value: Value) -> Alias | None:
        """Return the parameter that ``value`` stands for, or None."""
        return self._aliases.get(value.storage)

    def shape(self, alias: Alias) -> tuple[int, ...]:
        """Return the shape of the parameter itself."""
        return self._shapes[alias.index]

    def depends(self, value: Value) -> int:
        """Return the parameters (as bits) that ``value`` depends on."""
        alias = self.get(value)
        return self._depends.get(value.version, 0) if alias is None else 1 << alias.index

    def live(self, value: Any) -> bool:
        """Return whether ``value`` is an activation that depends on a parameter."""
        return isinstance(value, Value) and self.get(value) is None and bool(self.depends(value))

    def activations(self, op: Operation) -> list[Value]:
        """Return the numeric inputs of an operation that stand for no parameter."""
        return [each for each in op.inputs if each.numeric and self.get(each) is None]

    def number(self, op: Operation) -> float | None:
        """Return the number that is one of a product's two factors, or None."""
        for each, number in zip(op.args[:2], op.numbers, strict=False):
            if number is not None and not (isinstance(each, Value) and self.depends(each)):
                return number
        return None

    def copied(self, op: Operation) -> Value | None:
        """Return the activation that an operation copies to another place, dtype or layout, or None."""
        activations = self.activations(op) if op.name in ops.COPIES else []
        return activations[0] if len(activations) == 1 else None

    def _followed(self, op: Operation) -> Operation:
        if op.view or op.created:
            return op
        if op.fresh and self._derive(op):
            return replace(op, derived=True)
        depends = union(self.depends(each) for each in op.inputs if each.numeric)
        for each in op.outputs:
            self._depends[each.version] = depends
        return op

    def _derive(self, op: Operation) -> bool:
        """Register the result as an alias of a parameter if it is computed entrywise from that parameter alone."""
        inputs = op.inputs
        normalized = op.name == "_weight_norm_interface"
        if normalized:  # v keeps its axes; g multiplies the rows
            inputs = inputs[:1]
        with_alias = [(each, alias) for each in inputs if (alias := self.get(each)) is not None]
        if not with_alias or not op.out.numeric:
            return False
        value, alias = with_alias[0]
        # An index only selects entries: the experts that a router chooses still stand for the parameter.
        if union(self.depends(each) for each in inputs if each.numeric) != 1 << alias.index:
            return False
        number = self.number(op) if op.name in ops.PRODUCTS else None
        made = _derived(alias, op, value, number, alone=len(inputs) == 1)
        if made is None:
            return False
        if normalized and (magnitude := self.get(op.args[1])) is not None:
            made = replace(made, linear=True, magnitude=magnitude.index, normalized=op.out.version)
            self.magnitudes[magnitude.index] = made.index
        self._aliases[op.out.storage] = made
        return True

    def axes(self, op: Operation, tensor: Value) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return a label for each axis of the parameter of ``tensor`` and the number of its entries that are summed over.

        Labels are in, out, gather, each and unknown, found from the view that the operation received. The number is 1 for
        an axis that is not "in", and less than the axis's size if only a part of it is summed over.
        """
        name, args, alias = op.name, op.args, self._aliases[tensor.storage]
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


def _derived(alias: Alias, op: Operation, value: Value, number: float | None, *, alone: bool) -> Alias | None:
    """Return the alias that the result of an operation is, or None if the operation is not entrywise.

    Args:
        alias: the parameter that ``value`` stands for.
        op: the operation.
        value: the input that stands for a parameter.
        number: the constant that a product multiplies or divides by, if any.
        alone: whether ``value`` is the only tensor among the inputs.
    """
    name, args, out = op.name, op.args, op.out
    dims: list[int | None] = list(range(value.dim()))
    if name in ops.LOOKUPS:
        dims = _looked_up(name, args, value)
    elif name == "repeat":  # the layout of the first copy
        dims = [out.dim() - value.dim() + dim for dim in range(value.dim())]
    elif (
        name in ops.CONTRACTIONS
        or name in ops.AFFINE_NORMS
        or out.shape != value.shape
        or not (name in ops.ENTRYWISE or name in ops.COPIES or name.startswith("_weight_norm"))
    ):
        return None
    linear, shift, factor = alias.linear, alias.shift, alias.factor
    if name in ops.SUMS and alone:
        numbers = [each for each in args if isinstance(each, (int, float)) and not isinstance(each, bool)]
        shift += (numbers[0] if name.startswith("add") else -numbers[0]) if numbers else 0.0
        linear = linear and bool(numbers)
    elif number is not None:
        linear = linear and (not name.startswith("div") or args[0] is value)
        by = 1 / number if name.startswith("div") and number else number
        shift, factor = shift * by, factor * by
    elif not ((name in ops.COPIES and alone) or name in ops.LOOKUPS or name == "repeat"):
        linear = False
    return Alias(alias.index, carried_to(alias.layout, value, dims, out), linear, shift, factor)


def _is_bias(name: str, args: Any, tensor: Value) -> bool:
    """Return whether ``tensor`` is the bias that a fused attention adds to its logits."""
    return name.startswith("_scaled_dot_product") and not any(each is tensor for each in args[:3])


def _looked_up(name: str, args: Any, tensor: Value) -> list[int | None]:
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
        index: index of the parameter if the tensor stands for one; otherwise None.
        direct: uses (as bits) whose result the tensor is.
        pieces: (sizes, offsets) of each piece, one entry per dim of ``whole``.
    """

    whole: tuple[int, ...]
    index: int | None
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


def cuts(operations: Iterable[Operation], aliases: Aliases, direct: Callable[[Value], int]) -> list[Cut]:
    """Return all tensors that are cut, in the order seen; a tensor may be cut in one step or piece by piece.

    Args:
        operations: the operations of a forward pass.
        aliases: the aliases of parameters.
        direct: returns the uses (as bits) whose result a value is.
    """
    found: dict[tuple[int, tuple[int, ...]], Cut] = {}
    for op in operations:
        whole = op.inputs[0] if op.view else None
        if whole is None or ((alias := aliases.get(whole)) is None and not direct(whole)):
            continue
        for piece in op.outputs:
            # A piece is smaller and has as many dims, which excludes single entries.
            if piece.dim() == whole.dim() and piece.numel() < whole.numel():
                index = None if alias is None else alias.index
                cut = found.setdefault((whole.storage, whole.shape), Cut(whole.shape, index, direct(whole)))
                offset = piece.offset - whole.offset
                steps = zip(whole.strides, whole.shape, strict=True)
                begins = tuple(offset // at % size if at and size else 0 for at, size in steps)
                cut.pieces.add((piece.shape, begins))
    return list(found.values())


def uneven(cut: Iterable[Cut], wider: Iterable[Cut]) -> Iterator[Cut]:
    """Return the tensors that are cut into pieces that grow differently in a wider model's forward pass."""
    return (base for base, wide in zip(cut, wider, strict=False) if base.unevenly(wide))
