"""Mixed columns: an axis that a parameter sums over and that consists of growing and fixed pieces.

Where h (width entries) and a (6 entries) are concatenated before a matrix, the columns that meet h are hidden ones, with the
ratio of their own number, and those that meet a are input ones (TP-V 2203.03466, Table 3). Every axis of an activation
therefore records the pieces that it was joined from, by cat, stack, padding or writes into a part of a buffer, and a
comparison of two widths shows which of the pieces grow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..param_names import pattern_of
from . import ops as ops
from .aliases import Aliases, Axis
from .dataflow import Uses
from .ops import Operation, Value

__all__ = ["Columns", "Joins", "Piece", "mixed_columns"]

Labels = NDArray[np.int64]  # for each entry along a dim, which pieces it belongs to, as numbered by `Joins`
Dims = list[Labels | None]  # for each dim of a tensor, or None if all its entries are alike
Site = tuple[str, str, frozenset[Any]]  # module, operation, and what the pieces are made by

PADS = {"constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"}
REDUCTIONS = {
    "sum": 1,
    "mean": 1,
    "amax": 1,
    "amin": 1,
    "max": 1,
    "min": 1,
    "var": 1,
    "std": 1,
    "var_mean": 1,
    "prod": 1,
}
REDUCTIONS |= {"logsumexp": 1, "linalg_vector_norm": 2, "norm": 2, "argmax": 1, "argmin": 1, "any": 1, "all": 1}


class Piece(NamedTuple):
    """One of the pieces joined by the ``number``-th operation at a ``site``; ``kind`` is what it was made by."""

    site: Site
    number: int
    place: int
    kind: frozenset[str]


@dataclass(frozen=True)
class Columns:
    """Entries ``begin`` to ``end`` of the axis ``axis`` of a parameter at base size, and whether their number grows."""

    axis: int
    begin: int
    end: int
    grows: bool


class Joins:
    """Tracks which pieces the axes of activations are joined from, in one forward pass.

    Pieces are tracked by storage and stride, so views need no rules. A piece's kind is what it was made by, as name patterns.

    Attributes:
        arities: site → number of pieces that each of its operations joins.
        met: for each use of a parameter and each of its axes, the labels that the axis meets; empty if unknown.
    """

    def __init__(self, aliases: Aliases, uses: Uses, names: Sequence[str]) -> None:
        self._aliases, self._uses, self._names = aliases, uses, names
        self._at: dict[int, dict[tuple[int, int], Labels]] = {}  # storage → (stride, length) of a dim → labels along it
        self._whole: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # storage → original shape and strides
        self._sets: list[frozenset[Piece]] = [frozenset()]
        self._numbers: dict[frozenset[Piece], int] = {frozenset(): 0}
        self._kinds: dict[tuple[int, int], frozenset[str]] = {}
        self.arities: dict[Site, list[int]] = defaultdict(list)
        self.met: list[tuple[Labels, ...]] = []
        for op in aliases.operations:
            if op.created:
                self._create(op.outputs)
            elif not op.view:
                self._follow(op)
                while len(self.met) < len(uses.sites) and uses.sites[len(self.met)][0].out is op.out:
                    self.met.append(self._met_by(*uses.sites[len(self.met)]))

    def made_of(self, label: int) -> frozenset[Piece]:
        """Return the pieces that a label stands for."""
        return self._sets[label]

    def _create(self, tensors: Sequence[Value]) -> None:
        """Record tensors in new storage: what is later written into a part of one is a piece of it."""
        for each in tensors:
            self._whole.setdefault(each.storage, (each.shape, each.strides))

    def _follow(self, op: Operation) -> None:
        """Record an operation whose result is in new storage or in that of its first argument."""
        name, args, inputs, out, module = op.name, op.args, op.inputs, op.out, op.module
        key = out.storage
        fresh = key not in {each.storage for each in inputs}
        if fresh:
            self._create([out])
        joins = name in {"cat", "stack", "slice_scatter", "select_scatter"} or name in PADS
        partial = not fresh and key in self._whole and out.numel() < int(np.prod(self._whole[key][0]))
        if not (joins or partial or any(each.storage in self._at for each in inputs)):
            return
        found = self._result(name, args, op.kwargs, inputs, out, module)
        found = (
            [None if each is None or len(each) != size else each for each, size in zip(found, out.shape, strict=True)]
            if len(found) == out.dim()
            else [None] * out.dim()
        )
        if fresh:
            self._put(out, found)
        else:
            piece = self._piece((module, name, frozenset()), out, 1)(0, self._kind_of(inputs[1:])) if partial else 0
            self._write(out, found, piece)

    def dims(self, tensor: Value) -> Dims:
        """Return the labels along each dim of a tensor."""
        known = self._at.get(tensor.storage)
        if not known:
            return [None] * tensor.dim()
        offset = tensor.offset
        found: Dims = []
        for stride, size in zip(tensor.strides, tensor.shape, strict=True):
            labels: Labels | None = None
            for (step, length), along in known.items() if size > 1 and stride > 0 else ():
                labels = self._both(labels, along[(offset + stride * np.arange(size)) // step % length])
            found.append(_telling(labels))
        return found

    def _put(self, out: Value, found: Dims) -> None:
        for stride, size, labels in zip(out.strides, out.shape, found, strict=True):
            if labels is not None and size > 1 and stride > 0:
                self._at.setdefault(out.storage, {})[stride, size] = labels

    def _write(self, out: Value, found: Dims, piece: int) -> None:
        """Record a write into a view of a larger tensor; where it does not fill a dim, it becomes a ``piece`` of its own."""
        key = out.storage
        if key not in self._whole:
            return
        for size, stride in zip(*self._whole[key], strict=True):
            if size == 1 or stride < 1:
                continue
            index, labels = self._places(((stride, size),), size, out, found)
            if len(index) < size:
                labels = self._union(labels, np.full(len(index), piece))
            if labels.any():
                along = self._at.setdefault(key, {}).setdefault((stride, size), np.zeros(size, np.int64))
                along[index] = self._union(along[index], labels)

    def _places(self, axis: Axis, size: int, view: Value, found: Dims) -> tuple[Labels, Labels]:
        """Return which entries of a storage's axis a view holds, and their labels from the labels ``found`` of its dims."""
        stride = axis[0][0]
        index, labels = np.array([view.offset // stride % size]), np.zeros(1, np.int64)
        for (at, length), along in zip(zip(view.strides, view.shape, strict=True), found, strict=True):
            if length == 1 or at < 1:
                continue
            if stride <= at < stride * size and at % stride == 0:
                steps = at // stride * np.arange(min(length, stride * size // at))
                here = np.zeros(len(steps), np.int64) if along is None else along[: len(steps)]
            elif at < stride < at * length and stride % at == 0:
                steps = np.arange(min(at * length // stride, size))
                here = np.zeros(len(steps), np.int64) if along is None else along[steps * (stride // at)]
            else:
                continue
            labels = self._union(np.repeat(labels, len(steps)), np.tile(here, len(index)))
            index = (index[:, None] + steps).ravel()
        inside = index < size
        return index[inside], labels[inside]

    def _along(self, axis: Axis, size: int, view: Value, found: Dims, site: Site, kind: frozenset[str]) -> Labels:
        """Return the labels that the ``size`` entries of a parameter's axis meet through a view of it.

        The label is −1 where an entry meets none.
        """
        labels = np.full(size, -1, np.int64)
        if len(axis) != 1:
            return np.zeros(size, np.int64)
        index, here = self._places(axis, size, view, found)
        if len(index) < size:
            here = self._union(here, np.full(len(here), self._piece(site, view, 1)(0, kind)))
        labels[index] = here
        return labels

    def _piece(self, site: Site, out: Value, arity: int) -> Callable[[int, frozenset[str]], int]:
        """Return a function that labels each piece of one more operation at a site."""
        site = pattern_of(site[0]), *site[1:]
        number = len(self.arities[site])
        self.arities[site].append(arity)
        return lambda index, kind: self._label(frozenset({Piece(site, number, index, kind)}))

    def _label(self, pieces: frozenset[Piece]) -> int:
        if pieces not in self._numbers:
            self._numbers[pieces] = len(self._sets)
            self._sets.append(pieces)
        return self._numbers[pieces]

    def _union(self, a: Labels, b: Labels) -> Labels:
        if a is b or not b.any():
            return a
        if not a.any():
            return b
        pairs, back = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
        return np.array([self._label(self._sets[x] | self._sets[y]) for x, y in pairs.T], np.int64)[back.reshape(-1)]

    def _both(self, a: Labels | None, b: Labels | None) -> Labels | None:
        return a if b is None else b if a is None else self._union(a, b)

    def _kind(self, value: Value) -> frozenset[str]:
        """Return the parameters that a value was computed from, as name patterns."""
        key = self._uses.direct(value), self._aliases.depends(value)
        if key not in self._kinds:
            names = self._uses.parameters(key[0])
            names = names or frozenset(each for i, each in enumerate(self._names) if key[1] >> i & 1)
            self._kinds[key] = frozenset(map(pattern_of, names))
        return self._kinds[key]

    def _kind_of(self, tensors: Iterable[Value]) -> frozenset[str]:
        return frozenset().union(*(self._kind(each) for each in tensors))

    def _result(self, name: str, args: Any, kwargs: Any, inputs: Sequence[Value], out: Value, module: str) -> Dims:
        """Return the labels along each dim of an operation's result."""
        rank = out.dim()
        if name in {"cat", "stack"}:
            return self._joined(name, args, kwargs, out, module)
        if name in PADS:
            return self._padded(args, module, out)
        if name in {"slice_scatter", "select_scatter"}:
            return self._scattered(name, args, kwargs, module)
        if name in ops.MATMULS or name == "_grouped_mm":
            a, b = (self.dims(each) for each in args[ops.MATMULS.get(name, 0) :][:2])
            batch = [self._both(x, y) for x, y in zip(a[:-2], b[:-2], strict=False)]
            return [*batch, *a[-2:-1], *b[-1:]][:rank] if len(b) > 1 else a[:-1]
        if name == "linear":
            return [*self.dims(args[0])[:-1], self.dims(args[1])[0]]
        if name == "embedding":
            return [*self.dims(args[1]), *self.dims(args[0])[1:]]
        if name == "convolution":
            shown = _sized(args[0], self.dims(args[0]), out)
            return [None if dim == 1 else labels for dim, labels in enumerate(shown)]
        if name.startswith("_scaled_dot_product"):
            q, v = self.dims(args[0]), self.dims(args[2])
            return [*(self._both(x, y) for x, y in zip(q[:-2], v[:-2], strict=True)), q[-2], v[-1]]
        first = self.dims(args[0]) if args and isinstance(args[0], Value) else []
        if name in REDUCTIONS:
            return _reduced(args, kwargs, REDUCTIONS[name], first, rank)
        if name in ops.LOOKUPS and first:
            return _looked_up(name, args, first, out)
        if name in {"flip", "roll", "repeat", "im2col", "pixel_shuffle"} and first:
            return _rearranged(name, args, first, out)
        found: Dims = [None] * rank
        for each in inputs:
            if each.dim() <= rank:
                shown = _sized(each, self.dims(each), out)
                found = [self._both(x, y) for x, y in zip(found, [*[None] * (rank - len(shown)), *shown], strict=True)]
        return found

    def _joined(self, name: str, args: Any, kwargs: Any, out: Value, module: str) -> Dims:
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(1, out.dim())
        pieces = [each for each in args[0] if each.dim() == out.dim() - (name == "stack")]
        kinds = [self._kind(each) for each in pieces]
        label = self._piece((module, name, frozenset(kinds)), out, len(pieces))
        found: Dims = [None] * out.dim()
        joined = []
        for i, (each, kind) in enumerate(zip(pieces, kinds, strict=True)):
            labels = self.dims(each)
            if name == "stack":
                labels.insert(dim, None)
            size = 1 if name == "stack" else int(each.shape[dim])
            piece = np.full(size, label(i, kind))
            joined.append(piece if labels[dim] is None else self._union(piece, labels[dim]))
            found = [
                None if at == dim else self._both(x, y) for at, (x, y) in enumerate(zip(found, labels, strict=True))
            ]
        found[dim] = np.concatenate(joined) if joined else None
        return found

    def _padded(self, args: Any, module: str, out: Value) -> Dims:
        tensor, pads = args[0], [int(each) for each in args[1]]
        kind, found = self._kind(tensor), self.dims(tensor)
        for i, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            dim = tensor.dim() - 1 - i
            if before or after:
                label = self._piece((module, "pad", frozenset({kind})), out, 1)
                body = np.full(int(tensor.shape[dim]), label(0, kind))
                body = body if found[dim] is None else self._union(body, found[dim])
                body = body[max(0, -before) : len(body) - max(0, -after)]
                ends = (np.full(max(0, n), label(j, kind)) for j, n in ((1, before), (2, after)))
                found[dim] = np.concatenate([next(ends), body, next(ends)])
        return found

    def _scattered(self, name: str, args: Any, kwargs: Any, module: str) -> Dims:
        whole, written = args[:2]
        options = dict(
            zip(
                ("dim", "start", "end", "step") if name == "slice_scatter" else ("dim", "start"), args[2:], strict=False
            )
        )
        options = {**options, **({"start": kwargs["index"]} if "index" in kwargs else {}), **kwargs}
        dim, size = options.get("dim", 0) % whole.dim(), int(whole.shape[options.get("dim", 0)])
        end = options.get("end") if name == "slice_scatter" else (options["start"] % size) + 1
        index = np.arange(size)[slice(options.get("start"), end, options.get("step"))]
        found, labels = self.dims(whole), self.dims(written)
        if name == "select_scatter":
            labels.insert(dim, None)
        label = self._piece((module, name, frozenset()), whole, 1)(0, self._kind(written))
        along = np.zeros(size, np.int64) if found[dim] is None else found[dim].copy()
        inner = np.zeros(len(index), np.int64) if labels[dim] is None else labels[dim]
        along[index] = self._union(np.full(len(index), label), inner)
        found = [self._both(x, y) for x, y in zip(found, labels, strict=True)]
        found[dim] = along
        return found

    def _met_by(self, op: Operation, value: Value) -> tuple[Labels, ...]:
        """Return, for each axis of a parameter, the pieces that the entries it is combined with come from."""
        alias = self._aliases.get(value)
        if alias is None or not (op.name in ops.CONTRACTIONS or op.name in {"mul", "mul_"}):
            return ()
        found = self._met(op.name, op.args, op.inputs, value)
        kind = self._kind_of(each for each in op.inputs if self._aliases.get(each) is None)
        site = self._names[alias.index], "use", frozenset({kind})
        axes = zip(alias.layout, self._aliases.shape(alias), strict=True)
        return tuple(self._along(axis, size, value, found, site, kind) for axis, size in axes)

    def _met(self, name: str, args: Any, inputs: Sequence[Value], tensor: Value) -> Dims:
        """Return the labels along the dims of ``tensor`` of the operand that it is summed over or multiplied with."""
        found: Dims = [None] * tensor.dim()
        if name in ops.MATMULS or name == "_grouped_mm":
            a, b = args[ops.MATMULS.get(name, 0) :][:2]
            if tensor is b and b.dim():
                found[max(0, b.dim() - 2)] = self.dims(a)[-1]
            elif tensor is a:
                found[-1] = self.dims(b)[max(0, b.dim() - 2)]
        elif name == "linear" and tensor is args[1]:
            found[1] = self.dims(args[0])[-1]
        elif name == "convolution" and tensor is args[1]:
            along, groups = self.dims(args[0])[1], int(args[8])
            if args[6] or along is None:
                found[0 if args[6] else 1] = along
            else:
                for group in along.reshape(groups, -1):
                    found[1] = self._both(found[1], group)
        elif name in {"mul", "mul_"}:
            for each in inputs:
                if each is not tensor:
                    theirs = self.dims(each)
                    for back in range(1, min(len(theirs), tensor.dim()) + 1):
                        if each.shape[-back] == tensor.shape[-back]:
                            found[-back] = self._both(found[-back], theirs[-back])
        return found


def _telling(labels: Labels | None) -> Labels | None:
    return None if labels is None or bool((labels == labels[0]).all()) else labels


def _sized(tensor: Value, found: Dims, out: Value) -> Dims:
    """Return the labels of the dims whose sizes agree with those of ``out``, counted from the last."""
    sizes = out.shape[out.dim() - tensor.dim() :]
    return [labels if size == new else None for labels, size, new in zip(found, tensor.shape, sizes, strict=True)]


def _reduced(args: Any, kwargs: Any, at: int, first: Dims, rank: int) -> Dims:
    dims = args[at] if len(args) > at else kwargs.get("dim")
    listed = [dims] if isinstance(dims, int) else dims if isinstance(dims, list | tuple) else []
    gone = {each % len(first) for each in listed if isinstance(each, int)} or set(range(len(first)))
    if len(first) == rank:
        return [None if dim in gone else labels for dim, labels in enumerate(first)]
    return [labels for dim, labels in enumerate(first) if dim not in gone][:rank]


def _looked_up(name: str, args: Any, first: Dims, out: Value) -> Dims:
    """Return the labels of an indexed tensor.

    An index with as many entries as the dim is taken to be a permutation, of which only the counts matter.
    """
    if name != "index":
        if len(first) != out.dim():
            return [None] * out.dim()
        return [
            labels if labels is None or len(labels) == size else None
            for labels, size in zip(first, out.shape, strict=True)
        ]
    chosen = [i for i, each in enumerate(args[1]) if each is not None]
    if len(chosen) != 1:
        return [None] * out.dim()
    at, more = chosen[0], args[1][chosen[0]].dim()
    along = first[at]
    kept = along if more == 1 and along is not None and len(along) == int(args[1][at].numel()) else None
    return [*first[:at], *([kept] if more == 1 else [None] * more), *first[at + 1 :]][: out.dim()]


def _rearranged(name: str, args: Any, first: Dims, out: Value) -> Dims:
    found = list(first)
    if name == "repeat":
        counts = [int(each) for each in args[1]]
        found = [*[None] * (len(counts) - len(first)), *first]
        return [None if each is None else np.tile(each, n) for each, n in zip(found, counts, strict=True)]
    if name == "im2col":  # (N, C, H, W) → (N, C·k·k, L)
        kernel = int(np.prod(args[1]))
        return [first[0], None if first[1] is None else np.repeat(first[1], kernel), None]
    if name == "pixel_shuffle":
        within = int(args[1]) ** 2
        return [*first[:-3], None if first[-3] is None else first[-3][::within], None, None]
    shifts = args[1] if name == "roll" else [0] * len(args[1])
    dims = (args[2] if len(args) > 2 else []) if name == "roll" else args[1]
    for dim, shift in zip(dims, shifts, strict=False):
        along = found[dim]
        if along is not None:
            found[dim] = np.roll(along, int(shift)) if name == "roll" else along[::-1]
    return found


def mixed_columns(
    axis: int, base: tuple[Joins, Sequence[Labels]], wide: tuple[Joins, Sequence[Labels]]
) -> tuple[Columns, ...]:
    """Return the runs of an axis that grow and those that do not; empty if all of it does one or the other.

    Args:
        axis: axis of the parameter.
        base: the joins observed at base size, and each use's labels along the axis.
        wide: the same at a larger width.
    """
    before, after = base[0].arities, wide[0].arities
    alike = {site: before[site] == after.get(site) for site in before}

    def key(piece: Piece) -> Any:
        """Return an equal key for the same piece in both passes; where one has more of them, for all pieces of a kind."""
        return piece[:3] if alike.get(piece.site, False) else (piece.site, piece.kind)

    def signatures(joins: Joins, uses: Sequence[Labels]) -> list[Any]:
        known: dict[tuple[int, ...], Any] = {}
        stacked = np.stack(uses).T
        for row in map(tuple, np.unique(stacked, axis=0)):
            met = [joins.made_of(label) for label in row if label >= 0]
            known[row] = frozenset(key(piece) for each in met for piece in each) if met else None
        return [known[tuple(row)] for row in stacked]

    narrow, wider = signatures(*base), signatures(*wide)
    counts, more = Counter(narrow), Counter(wider)
    grows: Mapping[Any, bool] = {each: more.get(each, count + 1) != count for each, count in counts.items()}
    if counts.keys() != more.keys():
        runs, wide_runs = _runs(narrow), _runs(wider)
        if len(runs) == len(wide_runs):
            return _described(
                axis,
                [
                    (begin, end, end - begin != wide_end - wide_begin)
                    for (begin, end), (wide_begin, wide_end) in zip(runs, wide_runs, strict=True)
                ],
            )
    return _described(
        axis, [(begin, end, grows[narrow[begin]]) for begin, end in _runs(narrow) if narrow[begin] is not None]
    )


def _runs(each: Sequence[Any]) -> list[tuple[int, int]]:
    starts = [i for i, one in enumerate(each) if i == 0 or one != each[i - 1]]
    return list(zip(starts, [*starts[1:], len(each)], strict=True))


def _described(axis: int, runs: Sequence[tuple[int, int, bool]]) -> tuple[Columns, ...]:
    if len({grows for *_, grows in runs}) < 2:
        return ()
    joined: list[Columns] = []
    for begin, end, grows in runs:
        if joined and joined[-1].grows == grows and joined[-1].end == begin:
            joined[-1] = Columns(axis, joined[-1].begin, end, grows)
        else:
            joined.append(Columns(axis, begin, end, grows))
    return tuple(joined)
