"""FLOP formulas of torch's operations, and the operations that are not counted (for the convention see `price`).

A formula takes an operation's arguments and ``out_val``, its result, like those of `torch.utils.flop_counter`. Formulas from
there are replaced where they count attention's scores twice in the backward pass, or a grouped convolution's gradient as if it
had one group.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ._torch_internals import argument_schemas, operator_name

__all__ = ["FORMULAS", "HIGHER_ORDER", "Formula", "grouped_mm", "is_free"]

aten = torch.ops.aten
Formula = Callable[..., int]


def _rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // max(1, tensor.shape[-1])


def _product(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return 2 FLOPs per entry of ``a`` (..., m, k) and column of ``b`` (..., k, n)."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _added_product(_: Any, a: torch.Tensor, b: torch.Tensor, *__: Any, **___: Any) -> int:
    return _product(a, b)


def _product_of_transposed(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a product whose right side is stored as (n, k), possibly packed along k."""
    return 2 * a.numel() * b.shape[0]


def _list_of_products(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return sum(_product(a, b) for a, b in zip(left, right, strict=True))


def _grouped_product(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a grouped product: every row, or entry of the contracted axis, belongs to one group."""
    if a.dim() == b.dim() == 3:
        return _product(a, b)
    if a.dim() == 3:  # columns are grouped, (g, m, k) and (k, n)
        return 2 * a.shape[1] * b.numel()
    return _product(a, b)


def grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """Return an uninitialized result; torch's fake version accepts only bfloat16, while its kernels also accept float32."""
    shape = {
        (2, 3): (a.shape[0], b.shape[-1]), (3, 2): (a.shape[-2], b.shape[-1]), (3, 3): (a.shape[0], a.shape[1], b.shape[-1]),
        (2, 2): (len(offs) if offs is not None else 1, a.shape[0], b.shape[-1]),
    }[a.dim(), b.dim()]  # fmt: skip
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    *_: Any, out_val: torch.Tensor, **__: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of applying every weight entry at every position of the result (transposed: of the input)."""
    return _positions(x if transposed else out_val, x.dim() - 2, weight)


def _plain_convolution(x: torch.Tensor, weight: torch.Tensor, *_: Any, out_val: torch.Tensor, **__: Any) -> int:
    return _positions(out_val, weight.dim() - 2, weight)


def _positions(of: torch.Tensor, dims: int, weight: torch.Tensor) -> int:
    shape = of.shape
    batch = shape[0] if len(shape) == dims + 2 else 1
    return 2 * batch * math.prod(shape[len(shape) - dims :]) * weight.numel()


def _convolution_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, mask: Any, **_: Any,
) -> int:  # fmt: skip
    forward = _positions(x if transposed else gradient, x.dim() - 2, weight)
    return (bool(mask[0]) + bool(mask[1])) * forward


def _time_convolution(x: torch.Tensor, weight: torch.Tensor, *_: Any, out_val: torch.Tensor, **__: Any) -> int:
    return 2 * out_val.shape[0] * out_val.shape[1] * weight.numel()  # (time, batch, channels)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of scores and weighted values, (..., heads, T, d) by (..., S, d); shared keys count per query head."""
    return 2 * _rows(query) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(gradient: Any, *args: Any, **_: Any) -> int:
    return 2 * _attention(*args[:3])


def _flex_backward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key, value)


def _lengths_backward(packet: Any) -> Formula:
    """Return a formula for twice torch's forward count; sequences of several lengths are packed along one axis."""

    def formula(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **_: Any) -> int:
        biased = packet is aten._efficient_attention_forward
        rest = (args[0], *args[2:6]) if biased else args[2:6]
        return 2 * int(flop_registry[packet](query, key, value, *rest))

    return formula


def _native_attention(
    query: torch.Tensor, key: torch.Tensor, value: Any, width: int, heads: int, qkv: torch.Tensor, bias: Any,
    out: torch.Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    rows = _rows(query)
    return 2 * rows * (qkv.numel() + out.numel()) + 4 * rows * key.shape[1] * width


def _native_layer(
    x: torch.Tensor, width: int, heads: int, qkv: torch.Tensor, qkv_bias: Any, out: torch.Tensor, *args: Any, **_: Any
) -> int:
    first, second = args[8], args[10]  # after out's bias, the norms and their epsilon
    weights = sum(each.numel() for each in (qkv, out, first, second))
    return 2 * _rows(x) * weights + 4 * _rows(x) * x.shape[1] * width


def _mkldnn_recurrence(x: torch.Tensor, into: torch.Tensor, again: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * (into.numel() + again.numel())


def _recurrence(x: torch.Tensor, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * sum(each.numel() for each in weights if each.dim() > 1)


def _twice(forward: Formula) -> Formula:
    return lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def _trilinear(a: Any, b: Any, c: Any, expand_a: Any, expand_b: Any, expand_c: Any, *_: Any, **__: Any) -> int:
    sides = []
    for tensor, dims in ((a, expand_a), (b, expand_b), (c, expand_c)):
        shape = list(tensor.shape)
        for dim in sorted(dims):
            shape.insert(dim, 1)
        sides.append(torch.Size(shape))
    return 2 * math.prod(torch.broadcast_shapes(*sides))


def _distances(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-2]


def _distances_backward(gradient: Any, *args: Any, **_: Any) -> int:
    return _distances(*args[:2])


def _distances_within(x: torch.Tensor, *_: Any, **__: Any) -> int:
    return x.numel() * (x.shape[0] - 1)


def _distances_within_backward(gradient: Any, x: torch.Tensor, *_: Any, **__: Any) -> int:
    return _distances_within(x)


GIVEN: dict[str, Formula] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm", "_scaled_mm_v2"), _product),
    **dict.fromkeys(
        ("addmm", "addmm_", "_addmm_activation", "baddbmm", "baddbmm_", "addmv", "addmv_", "addbmm", "addbmm_"), _added_product
    ),
    "_weight_int8pack_mm": _product_of_transposed,
    "_foreach_mm": _list_of_products,
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"), _grouped_product),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(
        ("cudnn_convolution", "cudnn_convolution_relu", "cudnn_convolution_add_relu", "miopen_convolution", "mkldnn_convolution",
         "miopen_convolution_relu", "miopen_convolution_add_relu", "miopen_depthwise_convolution", "_slow_conv2d_forward",
         "slow_conv3d_forward", "slow_conv_dilated2d", "slow_conv_dilated3d", "_conv_depthwise2d", "conv_depthwise3d",
         "_nnpack_spatial_convolution"), _plain_convolution
    ),
    "convolution_backward": _convolution_backward,
    "conv_tbc": _time_convolution,
    **dict.fromkeys(
        (f"_scaled_dot_product_{kind}" for kind in (
            "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
            "fused_attention_overrideable",
            "attention_math_for_mps",
        )), _attention
    ),
    **dict.fromkeys(
        (f"_scaled_dot_product_{kind}_backward" for kind in (
            "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
            "fused_attention_overrideable",
        )), _attention_backward
    ),
    "_flash_attention_backward": _lengths_backward(aten._flash_attention_forward),
    "_efficient_attention_backward": _lengths_backward(aten._efficient_attention_forward),
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _native_layer,
    "mkldnn_rnn_layer": _mkldnn_recurrence,
    "mkldnn_rnn_layer_backward": _twice(_mkldnn_recurrence),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _recurrence),
    **dict.fromkeys(("_cudnn_rnn_backward", "miopen_rnn_backward"), _twice(_recurrence)),
    "_trilinear": _trilinear,
    **dict.fromkeys(("_euclidean_dist", "_cdist_forward"), _distances),
    "_cdist_backward": _distances_backward,
    "_pdist_forward": _distances_within,
    "_pdist_backward": _distances_within_backward,
}  # fmt: skip
FORMULAS = {getattr(aten, name): formula for name, formula in GIVEN.items() if hasattr(aten, name)}
HIGHER_ORDER: dict[str, Formula] = {"flex_attention": _attention, "flex_attention_backward": _flex_backward}


# Operations whose work grows no faster than the tensors they read and write. torch tags entrywise operations and reductions, and
# a view is recognized by its schema; this pattern lists the others by name, without leading and trailing underscores. Operations
# that are neither free nor have a formula are reported as uncounted.
FREE = re.compile(
    "|".join(
        (
            # created, sampled, copied, reshaped
            r"(new_)?(empty|zeros?|ones|full|rand|randn|randint|random|randperm)(_.*)?|arange|l?range|(lin|log)space|eye|scalar_tensor",
            r".*_window|tri[lu](_indices)?|complex|polar|fft_r?fftfreq|vander|(sparse_(coo|compressed)|make_per).*tensor.*|from_file",
            r"bernoulli|binomial|cauchy|exponential|geometric|(log_)?normal(_functional)?|uniform|multinomial|poisson|philox.*",
            r"(sample_)?dirichlet.*|standard_gamma.*|.*_copy|copy.*|clone|lazy_clone|lift.*|detach|alias|set|fill.*|efficientzerotensor",
            r"to_.*|.*reshape.*|resize.*|(un)?squeeze|transpose|t|as_strided.*|view.*|(unsafe_)?(view|split.*)|expand.*|diag.*|slice.*|select.*",
            r"pin_memory|record_stream|pad_packed.*|pack_padded.*|.*pad.*_dense.*|jagged.*|nested_.*|mkldnn_(re|tr).*|cudnn_rnn_flatten.*",
            # gathered, scattered, sorted, counted
            r"embedding.*|(unsafe_)?(masked_)?index.*|.*scatter.*|gather|masked_.*|take|put|cat|chunk_cat|stack|block_diag|roll|rot90|flip|repeat.*",
            r"(un)?fold.*|im2col|col2im|(pixel_(un)?|channel_)shuffle|.*(grid_sampler|affine_grid).*|constant_pad.*|(reflection|replication)_pad.*",
            r"sort|topk|kthvalue|(nan)?median|mode|unique.*|bincount|hist.*|bucketize|searchsorted|isin|nonzero.*|segment_reduce.*|.*trace|aminmax",
            r"(log)?cum(max|min|prod|sum|sumexp).*|logcumsumexp|dist|renorm|all(close)?|equal|hash_tensor|linalg_cross|linalg_check_errors|lu_unpack|spdiags",
            # normalized, pooled, resampled, activated, quantized
            r"(native_|cudnn_|miopen_)?(batch|group|layer)_norm.*|native_(dropout|norm)|weight_norm.*|.*(avg|max)_(un)?pool.*|upsample.*",
            r"(safe_|log_|masked_|sparse_)*(soft(max|min|plus|shrink)|sigmoid)(_.*)?|hard(tanh|swish|sigmoid|shrink)(_.*)?|threshold.*|prelu.*|rrelu.*",
            r"(c|ge|g|leaky_re|mi|si|se)?(e?lu|sh)(_.*)?|glu.*|add_relu|thnn_fused_(gru|lstm)_cell.*|.*loss(2d)?(_.*)?|binary_cross_entropy.*",
            r"fake_quantize.*|quantize_.*|dequantize|q_.*|qscheme|int_repr|convert_.*|dyn_quant_pack.*|cslt_compress|transform_bias.*",
            r"fused_(adam|adamw|sgd|adagrad|dropout|rms_norm|moving_avg|sdp_choice).*|foreach_(?!mm$).*|amp_.*",
            r"(abs|eq|ne|ge|gt|le|lt|gcd|lcm|rsub|xlogy|copysign|heaviside|floor_divide)|addr|i[rl]shift",
            # inspected or asserted
            r"local_scalar_dense|.*assert.*|.*sym_constrain.*|(has|is|use)_.*|.*(nnz|dim[IV]|dense_dim|sparse_dim|coalesced?|indices|values)|print",
            r"sparse_(sum|mask|softmax|log_softmax|csr_sum|broadcast|resize).*|validate_.*",
        )
    )
)
FREE_NAMESPACES = {"prim", "prims", "profiler", "c10d", "_c10d_functional", "_dtensor", "fsdp", "rngprims", "streams"}


@functools.cache
def is_free(func: Any) -> bool:
    """Return whether an operation is entrywise, a reduction, a view, a gather or similar, which the price leaves out."""
    namespace, _, name = operator_name(func).partition("::")
    if namespace != "aten":
        return namespace in FREE_NAMESPACES
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in argument_schemas(func))
    tags = {getattr(torch.Tag, tag) for tag in ("pointwise", "reduction") if hasattr(torch.Tag, tag)}
    return views or bool(tags & {*func.tags}) or FREE.fullmatch(name.strip("_")) is not None
