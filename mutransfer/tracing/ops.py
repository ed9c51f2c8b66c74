"""Tables of torch operations: labels of parameter axes, which operations preserve a factor, and which are decomposed into sums.

A residual branch written as ``torch.addcmul(x, scale, y)`` is traced as ``x + scale * y``. The decomposed steps are what
runs; their values equal those of the original operation up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
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
    "PRODUCTS",
    "SUMS",
    "Decompositions",
    "TRANSPOSED_CONVOLUTION",
    "UNARY",
    "WEIGHTINGS",
    "WRITES",
    "adds",
]

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


aten = torch.ops.aten
Call = Callable[..., Any]
PIECES = 3  # longest stack whose sum is decomposed; longer stacks hold time steps or the states of all layers


def adds(name: str, args: Any) -> bool:
    """Return whether an operation is a plain sum, of all entries or of some."""
    if name.startswith("index_put"):
        return len(args) > 3 and bool(args[3])  # accumulate
    return name in SUMS or name.startswith(("index_add", "scatter_add"))


class Decompositions:
    """Decompose operations on activations into plain steps; stacked tensors are remembered until they are summed."""

    def __init__(self) -> None:
        self._stacks: list[tuple[torch.Tensor, list[torch.Tensor], int]] = []

    def steps(self, name: str, args: Any, kwargs: dict[str, Any], call: Call, live: Callable[[Any], bool]) -> Any:
        """Return the operation's result, computed by simpler operations, or None if it needs no decomposition.

        Args:
            name: name of the operation.
            args: its positional arguments as dispatched.
            kwargs: its keyword arguments as dispatched.
            call: runs an aten operation under the tracer.
            live: returns whether a tensor is an activation that depends on a parameter.
        """
        if "out" in kwargs or not args:
            return None
        match name:
            case "stack" if len(args[0]) <= PIECES and all(map(live, args[0])):
                dim = (args[1] if len(args) > 1 else 0) % (args[0][0].dim() + 1)
                out = call(aten.cat.default, [call(aten.unsqueeze.default, each, dim) for each in args[0]], dim)
                self._stacks.append((out, list(args[0]), dim))
                return out
            case "sum" | "mean" if len(args) > 1 and args[1] is not None and kwargs.get("dtype") is None:
                return self._summed(name == "mean", call, *args)
            case "add" if (
                live(args[0]) and isinstance(args[1], int | float) and args[1] == 0
            ):  # the start value of Python's sum()
                return call(aten.clone.default, args[0])
            case "rsub" if live(args[0]) and live(args[1]):
                return call(aten.sub.Tensor, args[1], args[0], **kwargs)
        if not live(args[0]) or not name.startswith(("add", "baddbmm", "lerp")):
            return None
        added = _added(name.removesuffix("_"), args, kwargs, call)
        if added is None:
            return None
        stream, inplace = args[0], name.endswith("_")
        if (beta := kwargs.get("beta", 1)) != 1:
            stream = call((aten.mul_ if inplace else aten.mul).Tensor, stream, beta)
        return call((aten.add_ if inplace else aten.add).Tensor, stream, added)

    def _summed(self, mean: bool, call: Call, stacked: torch.Tensor, dims: Any, keepdim: bool = False) -> Any:
        for out, pieces, dim in self._stacks:
            same = storage_id(out) == storage_id(stacked) and out.stride() == stacked.stride()
            if same and out.shape == stacked.shape and [each % out.dim() for each in dims] == [dim]:
                total = pieces[0]
                for piece in pieces[1:]:
                    total = call(aten.add.Tensor, total, piece)
                total = call(aten.div.Tensor, total, len(pieces)) if mean else total
                return call(aten.unsqueeze.default, total, dim) if keepdim else total
        return None


def _added(name: str, args: Any, kwargs: dict[str, Any], call: Call) -> torch.Tensor | None:
    """Return what the operation adds to its first argument, or None if it is not such a sum."""
    factor = kwargs.get("value", kwargs.get("alpha", 1))
    match name:
        case "addcmul":
            added = call(aten.mul.Tensor, *args[1:3])
        case "addcdiv":
            added = call(aten.div.Tensor, *args[1:3])
        case "lerp":
            added = call(aten.mul.Tensor, call(aten.sub.Tensor, args[1], args[0]), args[2])
        case "addmm" | "addmv" | "baddbmm" if kwargs.get("beta", 1) != 0:
            contract = {"addmm": aten.mm, "addmv": aten.mv, "baddbmm": aten.bmm}[name]
            added = call(contract.default, *args[1:3])
        case _:
            return None
    return added if factor == 1 else call(aten.mul.Tensor, added, factor)
