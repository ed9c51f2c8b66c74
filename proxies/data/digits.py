"""Scikit-learn's handwritten digits: 1797 real images of 8 × 8 pixels that are installed with the library."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from .base import Batch, Data, generator

__all__ = ["Digits", "load_digits"]

HELD_OUT = 360


@dataclass(frozen=True, eq=False, kw_only=True)
class Digits(Data):
    """Handwritten digits, held in memory.

    Attributes:
        training: (images [M, 1, 8, 8] float32, labels [M] int64).
        held_out: held-out images and labels in the same format.
    """

    training: tuple[np.ndarray, np.ndarray] = field(repr=False)
    held_out: tuple[np.ndarray, np.ndarray] = field(repr=False)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Return the ``size`` images of ``step``: x_NCHW float32 and y_N int64, without replacement within an epoch.

        The permutations of the epochs form one stream, from which step k takes positions k·size to (k + 1)·size - 1. All
        batch sizes therefore see the same images in the same order.
        """
        images_MCHW, labels_M = self.training
        count = len(labels_M)
        positions = np.arange(step * size, (step + 1) * size)
        indices_N = np.empty(size, dtype=np.int64)
        for epoch in np.unique(positions // count):
            here = positions // count == epoch
            permutation = generator("epoch", seed, int(epoch)).permutation(count)
            indices_N[here] = permutation[positions[here] % count]
        return torch.from_numpy(images_MCHW[indices_N]), torch.from_numpy(labels_M[indices_N])

    def validation(self) -> list[Batch]:
        """Return the 360 held-out images as one batch."""
        images_NCHW, labels_N = self.held_out
        return [(torch.from_numpy(images_NCHW.copy()), torch.from_numpy(labels_N.copy()))]


def load_digits() -> Digits:
    """Load the digits with a fixed split, standardized by the mean and standard deviation of the training part."""
    from sklearn.datasets import load_digits  # takes a second, which only this source should cost

    images, labels = load_digits(return_X_y=True)
    pixels = np.ascontiguousarray(images, dtype=np.float32).reshape(-1, 1, 8, 8)  # whole numbers from 0 to 16
    labels = np.ascontiguousarray(labels, dtype=np.int64)

    # The images are ordered by writer: without shuffling, no held-out writer would occur in the training part.
    order = generator("digits split").permutation(len(labels))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    mean = float(pixels[training].mean(dtype=np.float64))
    std = float(pixels[training].std(dtype=np.float64))
    standardized = (pixels - np.float32(mean)) / np.float32(std)
    return Digits(
        name="digits",
        sha256=hashlib.sha256(pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()).hexdigest(),
        facts={"training_images": len(training), "held_out_images": HELD_OUT, "pixel_mean": mean, "pixel_std": std},
        inputs=1,
        classes=10,
        kind="images",
        training=(standardized[training], labels[training]),
        held_out=(standardized[held_out], labels[held_out]),
    )
