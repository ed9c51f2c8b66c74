"""Running out of memory: how it shows."""

from __future__ import annotations

import torch

__all__ = ["NOT_FOR_ONE", "is_out_of_memory"]

NOT_FOR_ONE = "there is not enough memory for one trial: lower batch_size or the proxy's width in the experiment."

# What CPU allocators say in a plain RuntimeError.
SAID = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether ``error``, or what caused it, is that there was no memory left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, (RuntimeError, OSError)) and any(words in str(seen) for words in SAID):
            return True
        seen = seen.__cause__
    return False
