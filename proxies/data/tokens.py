"""Windows from two long rows of tokens: random ones to train on, evenly spaced ones to validate on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from mutransfer.errors import RequestError

from .base import Batch, Data, generator

__all__ = [
    "VALIDATION_SEQUENCES",
    "Tokens",
    "batches_of",
    "check_sequence_length",
    "require_tokens",
    "split_at_the_end",
]

VALIDATION_SEQUENCES = 64
VALIDATION_BATCH = 16


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens(Data):
    """A corpus of tokens, in memory or on disk.

    Attributes:
        training: row of tokens of any integer dtype, [number of tokens].
        held_out: the same for the held-out part.
        sequence_length: T, tokens per sequence.
    """

    training: np.ndarray = field(repr=False)
    held_out: np.ndarray = field(repr=False)
    sequence_length: int

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Return ``size`` windows drawn uniformly, with replacement: x_NT and y_NT int64, y the next token."""
        starts_N = generator("windows", seed, step).integers(len(self.training) - self.sequence_length, size=size)
        return next_token(_windows(self.training, starts_N, self.sequence_length))

    def validation(self) -> list[Batch]:
        """Return at most 64 held-out windows, evenly spaced and without overlap, in batches of one size."""
        count = min(VALIDATION_SEQUENCES, len(self.held_out) // (self.sequence_length + 1))
        if count > VALIDATION_BATCH:
            count -= count % VALIDATION_BATCH
        starts_N = np.linspace(0, len(self.held_out) - self.sequence_length - 1, count).astype(np.int64)
        return batches_of(_windows(self.held_out, starts_N, self.sequence_length))


def next_token(windows_NU: np.ndarray) -> Batch:
    """Split windows of U = T + 1 tokens into inputs x_NT and targets y_NT, both int64 and contiguous."""
    tokens_NU = torch.from_numpy(windows_NU.astype(np.int64))
    return tokens_NU[:, :-1].contiguous(), tokens_NU[:, 1:].contiguous()


def batches_of(windows_NU: np.ndarray) -> list[Batch]:
    """Cut windows of T + 1 tokens into validation batches."""
    starts = range(0, len(windows_NU), VALIDATION_BATCH)
    return [next_token(windows_NU[start : start + VALIDATION_BATCH]) for start in starts]


def split_at_the_end(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first nine tenths and the last tenth of ``tokens``, as views."""
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:]


def check_sequence_length(sequence_length: int) -> None:
    """Raise `RequestError` unless a sequence has at least one token."""
    if sequence_length < 1:
        raise RequestError(f"the sequence length is {sequence_length}: it should be at least 1 token.")


def require_tokens(where: object, training: np.ndarray, held_out: np.ndarray, sequence_length: int) -> None:
    """Raise `RequestError` unless either part has 2·(sequence_length + 1) tokens, which is two windows."""
    check_sequence_length(sequence_length)
    part, found = min(("training", len(training)), ("held-out", len(held_out)), key=lambda pair: pair[1])
    needed = 2 * (sequence_length + 1)
    if found < needed:
        longest = found // 2 - 1
        shorter = f" or a sequence length of at most {longest}" if longest >= 1 else ""
        raise RequestError(
            f"{where} has {found} tokens in its {part} part, and sequences of {sequence_length} tokens need at least "
            f"{needed}: give a larger corpus{shorter}."
        )


def _windows(tokens: np.ndarray, starts_N: np.ndarray, sequence_length: int) -> np.ndarray:
    return np.asarray(tokens[starts_N[:, None] + np.arange(sequence_length + 1)])
