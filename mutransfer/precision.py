"""Precision of matrix products: how fast bfloat16 is on this machine, and whether a GPU may use TF32."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import torch

from ._torch_internals import disable_current_modes

__all__ = ["bfloat16_is_slow", "bfloat16_slowdown", "float32_products"]

SIZE = 128  # large enough to show the gap (0.1 ms against 10 ms), small enough to cost almost nothing
REPEATS = 5
SLOW = 4.0  # CPUs with bfloat16 instructions or AVX-512 stay within a factor of 2; with AVX2 alone it is 60 to 90


@functools.cache
def bfloat16_slowdown() -> float:
    """Return the time of a bfloat16 product relative to a float32 product on this CPU (128 x 128, fastest of 5).

    torch has no vectorized bfloat16 product for CPUs with AVX2 alone, which includes most desktops and older servers.
    """
    # An active fake or tracing mode would record the products instead of computing them.
    with disable_current_modes(), torch.no_grad():
        exact = torch.ones(SIZE, SIZE, dtype=torch.float32, device="cpu")
        return _seconds(exact.to(torch.bfloat16)) / _seconds(exact)


def bfloat16_is_slow(device: torch.device | str) -> bool:
    """Return whether bfloat16 products on ``device`` take over four times as long as float32 ones; only a CPU can be slow."""
    return torch.device(device).type == "cpu" and bfloat16_slowdown() > SLOW


@contextlib.contextmanager
def float32_products(device: torch.device | str, tf32: bool) -> Iterator[None]:
    """Context in which a GPU computes float32 products and convolutions in TF32 (10 bits of mantissa), or else exactly.

    By default torch uses TF32 for convolutions only. Nothing changes on a CPU.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _seconds(matrix: torch.Tensor) -> float:
    matrix @ matrix  # the first product may create the kernel
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)
