"""What every source of data offers: batches that depend only on (seed, step, size), and a hash of the content."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

__all__ = ["Batch", "Data", "generator"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Data(ABC):
    """A source of training batches with a fixed held-out part.

    Shapes: N batch size, C channels, H height, W width, T sequence length.

    Attributes:
        name: what the source is called in tables, such as ``"digits"``.
        sha256: hash of the raw content; losses on different hashes are not comparable.
        facts: printable provenance, such as counts and versions.
        inputs: number of channels for images, vocabulary size for tokens.
        classes: number of classes for images, vocabulary size for tokens.
        kind: ``"images"`` (x_NCHW float32, y_N int64) or ``"tokens"`` (x_NT and y_NT int64, y the next token).
        floor: the lowest cross-entropy any model can reach in expectation, in nats per token; None when unknown.
    """

    name: str
    sha256: str
    facts: dict[str, str | int | float]
    inputs: int
    classes: int
    kind: Literal["images", "tokens"]
    floor: float | None = None

    @abstractmethod
    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Return the training batch of ``step`` (from 0) with ``size`` examples.

        A pure function of its arguments, so that a resumed run sees what the uninterrupted one would have seen.
        """

    @abstractmethod
    def validation(self) -> list[Batch]:
        """Return the held-out batches: the same at every call, for every seed, and few enough to evaluate often.

        All are of one size, so that the mean of the batches' mean losses is the mean loss.
        """


def generator(*key: str | int) -> np.random.Generator:
    """Return the random generator of ``key``, independent of every other key's.

    The key is hashed because NumPy's own seed sequences pad with zeros, which lets (1,) and (1, 0) share a stream.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
