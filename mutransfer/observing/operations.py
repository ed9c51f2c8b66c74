"""What torch's operations do to the axes of a parameter, and which of them let a factor through."""

from __future__ import annotations

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
    "TRANSPOSED_CONVOLUTION",
    "UNARY",
    "WEIGHTINGS",
    "WRITES",
]

# Axes of each tensor argument, last axes last. "in" is summed over, "out" survives, "gather" is indexed.
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

# The same numbers in another place, type or layout: one value, whoever looks at it.
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
# A new tensor that takes only a shape from its argument.
CREATIONS = {"empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like", "bernoulli"}
CREATIONS |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
LOOKUPS = {"index", "index_select", "gather"}
WRITES = {"copy_", "index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_", "index_put", "index_add"}
WRITES |= {"slice_scatter", "select_scatter", "scatter", "scatter_add"}

# Functions of one entry: they keep the axes and stop a factor.
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
# Where one activation may say how much of another is taken.
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

# Operations through which a factor on every tensor input comes out as the same factor.
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
