"""What torch's operations do to the axes of a parameter, and which of them let a factor through."""

from __future__ import annotations

__all__ = ["AFFINE_NORMS", "CONTRACTIONS", "ENTRYWISE", "LINEAR", "PRODUCTS", "TRANSPOSED_CONVOLUTION"]

# Axes of each tensor argument, last axes last. "in" is summed over, "out" survives, "gather" is indexed.
CONTRACTIONS: dict[str, dict[int, tuple[str, ...]]] = {
    "mm": {0: ("out", "in"), 1: ("in", "out")},
    "mv": {0: ("out", "in"), 1: ("in",)},
    "dot": {0: ("in",), 1: ("in",)},
    "addmm": {0: ("each", "each"), 1: ("out", "in"), 2: ("in", "out")},
    "bmm": {0: ("each", "out", "in"), 1: ("each", "in", "out")},
    "baddbmm": {0: ("each", "each", "each"), 1: ("each", "out", "in"), 2: ("each", "in", "out")},
    "linear": {1: ("out", "in"), 2: ("each",)},
    "embedding": {0: ("gather", "out")},
    "convolution": {1: ("out", "in", "in", "in", "in"), 2: ("each",)},
}
TRANSPOSED_CONVOLUTION = {1: ("in", "out", "in", "in", "in"), 2: ("each",)}
ENTRYWISE = {
    "add",
    "add_",
    "sub",
    "sub_",
    "rsub",
    "mul",
    "mul_",
    "div",
    "div_",
    "neg",
    "where",
    "expand",
    "cat",
    "stack",
}
AFFINE_NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "_fused_rms_norm"}
AFFINE_NORMS |= {
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "rms_norm",
    "_native_batch_norm_legit_functional",
}

# Operations through which a factor on every tensor input comes out as the same factor.
PRODUCTS = {"mul", "mul_", "div", "div_"}
LINEAR = ENTRYWISE - PRODUCTS - {"where", "rsub"}
LINEAR |= {"view", "_unsafe_view", "reshape", "transpose", "permute", "t", "slice", "select", "unsqueeze", "squeeze"}
LINEAR |= {"clone", "_to_copy", "alias", "detach", "split", "split_with_sizes", "unbind", "chunk", "narrow", "index"}
LINEAR |= {"gather", "mean", "sum", "as_strided", "contiguous", "roll", "flip", "constant_pad_nd", "avg_pool2d"}
