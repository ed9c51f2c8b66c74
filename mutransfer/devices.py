"""What differs between devices: memory, precision of matrix products, random number generators, and copies to them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from ._torch_internals import disable_current_modes, tree_map_only

__all__ = [
    "bfloat16_is_slow",
    "bfloat16_slowdown",
    "devices_of",
    "float32_products",
    "is_out_of_memory",
    "keep_freed_memory",
    "limited_threads",
    "random_state_restored",
    "seeded_generators",
    "uploaded",
]

T = TypeVar("T")

# Beginnings of messages in a plain RuntimeError, of the allocators of CPUs and of CUDA, its libraries and other accelerators.
SAID = (
    "can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc", "out of memory",
    "cudaErrorMemoryAllocation", "_STATUS_ALLOC_FAILED", "_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm", "hipErrorOutOfMemory",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error``, one of its causes, or an error that a compiler wrapped in it is an out-of-memory error."""
    pending: list[BaseException | None] = [error]
    known: set[int] = set()
    while pending:
        seen = pending.pop()
        if seen is None or id(seen) in known:
            continue
        known.add(id(seen))
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, (RuntimeError, OSError)) and any(words in str(seen) for words in SAID):
            return True
        pending += [seen.__cause__, None if seen.__suppress_context__ else seen.__context__]
        pending.append(getattr(seen, "inner_exception", None))  # of torch's compiler
        pending += seen.exceptions if isinstance(seen, BaseExceptionGroup) else ()
    return False


# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next allocation, until this process ends; return whether it can.

    Every training step allocates the same tensors again. By default, glibc returns large freed blocks to the system, which
    then has to zero each page before its next use; that takes up to a third of a fused step (docs/log.md).
    The process's memory then stays at its peak. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # -1: never return memory at the top of the heap; 0: no blocks outside the heap; grow it by at least 64 MiB.
    settings = ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_TOP_PAD, 2**26))
    return all(mallopt(name, value) == 1 for name, value in settings)


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


@contextlib.contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` CPU threads inside the context; None leaves the number unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def seeded_generators(seed: int, devices: Iterable[torch.device | str] = ()) -> Iterator[None]:
    """Seed the random number generators of the CPU and of those GPUs that are among ``devices``, and restore them on exit.

    No other GPU is touched, whereas `torch.manual_seed` seeds all of them.
    """
    indices = _gpus(devices)
    with torch.random.fork_rng(indices):
        torch.default_generator.manual_seed(seed)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def random_state_restored(devices: Iterable[torch.device | str] = ()) -> contextlib.AbstractContextManager[None]:
    """Return a context that restores the generators of the CPU and of those GPUs that are among ``devices``, on exit."""
    return torch.random.fork_rng(_gpus(devices))


def uploaded(tensors: T, device: torch.device | str) -> T:
    """Return a pytree with its tensors on ``device``; a GPU copies them from pinned memory, and the host does not wait."""
    if torch.device(device).type != "cuda":
        return tree_map_only(torch.Tensor, lambda each: each.to(device), tensors)
    return tree_map_only(torch.Tensor, lambda each: _pinned(each).to(device, non_blocking=True), tensors)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def devices_of(tensors: Iterable[torch.Tensor]) -> set[torch.device]:
    """Return the devices that hold ``tensors``."""
    return {each.device for each in tensors}


def _gpus(devices: Iterable[torch.device | str]) -> list[int]:
    gpus = [each for each in map(torch.device, devices) if each.type == "cuda"]
    return sorted({torch.cuda.current_device() if each.index is None else each.index for each in gpus})
