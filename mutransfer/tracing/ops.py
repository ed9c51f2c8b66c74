"""Recorded operations of a forward pass, tables of what torch's operations do, and decompositions into plain sums.

A residual branch written as ``torch.addcmul(x, scale, y)`` is analysed as ``x + scale * y``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._torch_internals import storage_id

__all__ = [
    "AFFINE_NORMS",
    "CONTRACTIONS",
    "COPIES",
    "CREATIONS",
    "ENTRYWISE",
    "LINEAR",
    "LOOKUPS",
    "MATMULS",
    "PRODUCTS",
    "SUMS",
    "Decompositions",
    "Operation",
    "TRANSPOSED_CONVOLUTION",
    "UNARY",
    "Value",
    "WEIGHTINGS",
    "WRITES",
    "adds",
]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor as one operation saw it. Later operations may write to its storage or change its shape in place.

    Strides, the offset and ``entries`` count real numbers, so that a tensor and its complex view are comparable.

    Attributes:
        storage: key of the storage, which all views share.
        version: number of the storage's contents; every write makes a new version.
        shape: its shape.
        strides: its strides.
        offset: offset of its first entry in the storage.
        entries: number of entries that the storage holds.
        numeric: whether it holds real or complex numbers; other tensors are indices and masks.
        complex: whether it holds complex numbers.
    """

    storage: int
    version: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    entries: int
    numeric: bool = True
    complex: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor, version: int = 0) -> Value:
        """Return the value of ``tensor``, whose storage holds contents ``version``."""
        storage, is_complex = tensor.untyped_storage(), tensor.is_complex()
        reals = 2 if is_complex else 1
        return cls(
            storage_id(storage),
            version,
            tuple(map(int, tensor.shape)),
            tuple(reals * int(each) for each in tensor.stride()),
            reals * int(tensor.storage_offset()),
            int(storage.nbytes()) * reals // tensor.element_size(),
            is_complex or tensor.is_floating_point(),
            is_complex,
        )

    def dim(self) -> int:
        """Return the number of dims."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a forward pass, after torch has decomposed it; ``args`` and ``kwargs`` hold values for tensors.

    Attributes:
        name: name of the aten operator, without overload.
        args: positional arguments.
        kwargs: keyword arguments.
        outputs: its results; those it writes have a new version.
        module: qualified name of the module that runs it.
        fresh: whether the results are in new storage.
        view: whether the results are views of its first input, which it does not change.
        created: whether it creates tensors without reading any entries.
        derived: whether its first result stands for a parameter, as it is computed from that parameter alone.
        numbers: for each argument, the number that it is or that all its entries hold; None if unknown (see `Scalars`).
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    module: str
    fresh: bool = True
    view: bool = False
    created: bool = False
    derived: bool = False
    numbers: tuple[float | None, ...] = ()
    inputs: tuple[Value, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(_values((*self.args, *self.kwargs.values()))))

    @property
    def out(self) -> Value:
        """The first result."""
        return self.outputs[0]

    @property
    def computes(self) -> bool:
        """Whether it computes a value from activations, and not only a view, an empty tensor or an alias of a parameter."""
        return not (self.view or self.created or self.derived)


def _values(args: Any) -> Iterator[Value]:
    for each in args:
        if isinstance(each, Value):
            yield each
        elif isinstance(each, list | tuple):
            yield from _values(each)


# Labels for the axes of each tensor argument, aligned at the last axis (for a convolution, at the first): "in" is summed
# over, "out" survives, "gather" is indexed, "each" is combined entry by entry.
CONTRACTIONS: dict[str, dict[int, tuple[str, ...]]] = {
    "mm": {0: ("out", "in"), 1: ("in", "out")},
    "mv": {0: ("out", "in"), 1: ("in",)},
    "dot": {0: ("in",), 1: ("in",)},
    "addmm": {0: ("each", "each"), 1: ("out", "in"), 2: ("in", "out")},
    "bmm": {0: ("each", "out", "in"), 1: ("each", "in", "out")},
    "baddbmm": {0: ("each", "each", "each"), 1: ("each", "out", "in"), 2: ("each", "in", "out")},
    "_grouped_mm": {0: ("each", "out", "in"), 1: ("each", "in", "out")},
    "linear": {1: ("out", "in"), 2: ("each",)},
    "embedding": {0: ("gather", "out")},
    "_embedding_bag": {0: ("gather", "out")},
    "convolution": {1: ("out", "in", "in", "in", "in"), 2: ("each",)},
}
# Position of the left side among the arguments of a matrix product.
MATMULS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "addmv": 1, "baddbmm": 1}
TRANSPOSED_CONVOLUTION = {1: ("in", "out", "in", "in", "in"), 2: ("each",)}

# Operations that copy the same numbers to another place, dtype or layout; the result counts as the same value.
COPIES = {
    "_to_copy",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "native_dropout",
    "_conj",
}
# Operations that create a tensor and take only the shape from their argument.
CREATIONS = {"empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "bernoulli"}
CREATIONS |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
LOOKUPS = {"index", "index_select", "gather"}
WRITES = {"copy_", "index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_", "index_put", "index_add"}
WRITES |= {"slice_scatter", "select_scatter", "scatter", "scatter_add"}

# Entrywise functions of one argument: they keep the axes, but a factor on the input is not a factor on the output.
UNARY = {"exp", "neg", "log", "sigmoid", "tanh", "softplus", "softplus_backward", "silu", "gelu", "relu", "abs", "sqrt"}
UNARY |= {
    "rsqrt",
    "pow",
    "reciprocal",
    "square",
    "clamp",
    "expm1",
    "log1p",
    "hardtanh",
    "elu",
    "leaky_relu",
    "sin",
    "cos",
}
UNARY |= {
    "clamp_",
    "clamp_min_",
    "clamp_max_",
    "clamp_min",
    "clamp_max",
    "mish",
    "hardsigmoid",
    "hardswish",
    "relu_",
    "silu_",
    "exp_",
    "log_sigmoid_forward",
}

PRODUCTS = {"mul", "mul_", "div", "div_"}
# Operations in which one activation may weight another.
WEIGHTINGS = PRODUCTS | {"mm", "bmm", "baddbmm", "lerp", "addcmul", "addcmul_"}
SUMS = {"add", "add_", "sub", "sub_"}
ENTRYWISE = (
    PRODUCTS | SUMS | UNARY | {"rsub", "where", "expand", "cat", "stack", "maximum", "minimum", "lerp", "addcmul"}
)
ENTRYWISE |= {
    "_prelu_kernel",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "atan2",
    "xlogy",
    "remainder",
    "fmod",
    "fmax",
    "fmin",
}
ENTRYWISE |= {"copysign"}
AFFINE_NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "_fused_rms_norm"}
AFFINE_NORMS |= {
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "rms_norm",
    "_native_batch_norm_legit_functional",
}

# Operations for which the same factor on every tensor input is that factor on the output.
LINEAR = SUMS | COPIES | WRITES | LOOKUPS | {"neg", "expand", "cat", "stack", "mean", "sum", "cumsum", "masked_fill"}
LINEAR |= {"view", "_unsafe_view", "reshape", "transpose", "permute", "t", "slice", "select", "unsqueeze", "squeeze"}
LINEAR |= {
    "split",
    "split_with_sizes",
    "unbind",
    "chunk",
    "narrow",
    "as_strided",
    "roll",
    "flip",
    "avg_pool2d",
    "avg_pool1d",
}
LINEAR |= {
    "constant_pad_nd",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "upsample_nearest2d",
    "unfold",
    "repeat",
    "masked_scatter",
}
LINEAR |= {"complex", "real", "imag", "conj_physical", "_fft_r2c", "_fft_c2c", "_fft_c2r"}
LINEAR |= {"upsample_bilinear2d", "upsample_bicubic2d", "pixel_shuffle", "masked_fill_", "im2col", "col2im"}


PIECES = 3  # longest stack whose sum is decomposed; longer stacks hold time steps or the states of all layers


def adds(name: str, args: Any) -> bool:
    """Return whether an operation is a plain sum, of all entries or of some."""
    if name.startswith("index_put"):
        return len(args) > 3 and bool(args[3])  # accumulate
    return name in SUMS or name.startswith(("index_add", "scatter_add"))


class Decompositions:
    """Decompose operations on activations into plain steps; stacked tensors are remembered until they are summed.

    The steps are analysed only; what ran is the operation itself.
    """

    def __init__(self) -> None:
        self._stacks: list[tuple[Value, list[Value], int]] = []
        self._numbers = itertools.count(1)

    def steps(self, op: Operation, live: Callable[[Any], bool]) -> list[Operation]:
        """Return the steps that an operation consists of: itself, if it needs no decomposition.

        Args:
            op: the operation.
            live: returns whether a value is an activation that depends on a parameter.
        """
        name, args = op.name, op.args
        if "out" in op.kwargs or not args or op.view or op.created:
            return [op]
        match name:
            case "stack" if len(args[0]) <= PIECES and all(map(live, args[0])):
                dim = (args[1] if len(args) > 1 else 0) % (args[0][0].dim() + 1)
                self._stacks.append((op.out, list(args[0]), dim))
                return [replace(op, name="cat", args=([_unsqueezed(each, dim) for each in args[0]], dim), kwargs={})]
            case "sum" | "mean" if len(args) > 1 and args[1] is not None and op.kwargs.get("dtype") is None:
                return self._summed(op, *args) or [op]
            case "add" if live(args[0]) and isinstance(args[1], int | float) and args[1] == 0:
                return [replace(op, name="clone", args=args[:1], kwargs={})]  # the start value of Python's sum()
            case "rsub" if live(args[0]) and live(args[1]):
                return [replace(op, name="sub", args=(args[1], args[0], *args[2:]))]
        numbers = op.kwargs.get("alpha", 1), op.kwargs.get("beta", 1)
        scaled = numbers != (1, 1) and name.removesuffix("_") in ("addmm", "addmv", "baddbmm")
        if (live(args[0]) or scaled) and name.startswith(("add", "baddbmm", "lerp")):
            return self._added(op, name.removesuffix("_")) or [op]
        return [op]

    def _summed(self, op: Operation, stacked: Value, dims: Any, keepdim: bool = False) -> list[Operation]:
        for out, pieces, dim in self._stacks:
            same = (out.storage, out.strides, out.shape) == (stacked.storage, stacked.strides, stacked.shape)
            if same and [each % out.dim() for each in dims] == [dim]:
                result = _squeezed(op.out, dim) if keepdim else op.out
                steps, total = [], pieces[0]
                for piece in pieces[1:]:
                    steps.append(self._step(op, "add", total, piece))
                    total = steps[-1].out
                if op.name == "mean":
                    steps.append(self._step(op, "div", total, len(pieces)))
                return [*steps[:-1], replace(steps[-1], outputs=(result,))] if steps else []
        return []

    def _added(self, op: Operation, name: str) -> list[Operation]:
        """Return the steps of ``stream + factor * added``; empty if the operation is not such a sum."""
        stream, a, b = (*op.args, None, None)[:3]
        beta, factor = op.kwargs.get("beta", 1), op.kwargs.get("value", op.kwargs.get("alpha", 1))
        steps: list[Operation] = []
        match name:
            case "addcmul":
                steps = [self._step(op, "mul", a, b, numbers=op.numbers[1:3])]
            case "addcdiv":
                steps = [self._step(op, "div", a, b, numbers=op.numbers[1:3])]
            case "lerp":
                steps = [self._step(op, "sub", a, stream)]
                steps.append(self._step(op, "mul", steps[0].out, b, numbers=(None, *op.numbers[2:3])))
            case "addmm" | "addmv" | "baddbmm":
                contract = {"addmm": "mm", "addmv": "mv", "baddbmm": "bmm"}[name]
                steps = [self._step(op, contract, a, b)]
            case _:
                return []
        if factor != 1:
            steps.append(self._step(op, "mul", steps[-1].out, factor))
        if beta == 0:
            return [*steps[:-1], replace(steps[-1], outputs=op.outputs)]
        added, suffix = steps[-1].out, "_" if op.name.endswith("_") else ""
        if beta != 1:
            scaled = self._step(op, "mul", stream, beta)
            if suffix:
                written = replace(stream, version=scaled.out.version)
                scaled = replace(scaled, name="mul_", outputs=(written,), fresh=False)
            steps.append(scaled)
            stream = scaled.out
        return [*steps, replace(op, name=f"add{suffix}", args=(stream, added), kwargs={}, numbers=())]

    def _step(
        self, op: Operation, name: str, a: Value, b: Any, numbers: tuple[float | None, ...] | None = None
    ) -> Operation:
        """Return a step of ``op`` on ``a`` and ``b``, whose result is in new storage."""
        shape: tuple[int, ...] = a.shape
        if name in ("mm", "bmm"):
            shape = (*a.shape[:-1], b.shape[-1])
        elif name == "mv":
            shape = a.shape[:-1]
        elif isinstance(b, Value):
            shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
        number = next(self._numbers)
        reals = 2 if op.out.complex else 1
        strides = tuple(reals * math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        out = Value(-number, -number, shape, strides, 0, reals * math.prod(shape), complex=op.out.complex)
        known = (None, float(b)) if isinstance(b, int | float) else ()
        return Operation(name, (a, b), {}, (out,), op.module, numbers=known if numbers is None else numbers)


def _unsqueezed(value: Value, dim: int) -> Value:
    """Return a view of ``value`` with one more dim of size 1."""
    stride = value.shape[dim] * value.strides[dim] if dim < value.dim() else 1
    return replace(
        value,
        shape=(*value.shape[:dim], 1, *value.shape[dim:]),
        strides=(*value.strides[:dim], stride, *value.strides[dim:]),
    )


def _squeezed(value: Value, dim: int) -> Value:
    """Return a view of ``value`` without dim ``dim``, whose size is 1."""
    return replace(
        value,
        shape=(*value.shape[:dim], *value.shape[dim + 1 :]),
        strides=(*value.strides[:dim], *value.strides[dim + 1 :]),
    )
