"""Data without files: handwritten digits, and sequences from a Markov chain, whose lowest cross-entropy is known exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import entr

from mutransfer.errors import DataError

from .base import (
    VALIDATION_BATCHES,
    Batch,
    Data,
    batches_of,
    check_sequence_length,
    generator,
    next_token,
    validation_batch,
)

__all__ = ["Digits", "Markov", "load_digits", "load_markov"]

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


LARGEST_CONTEXTS = 4096  # the stationary distribution is the solution of a dense linear system of this size


@dataclass(frozen=True, eq=False, kw_only=True)
class Markov(Data):
    """A Markov chain of order k over V symbols; a context is the last k symbols, read as a number in base V.

    Attributes:
        order: k.
        successors: the B symbols that can follow each context, [V**k, B] int64.
        probabilities: probability of each successor, [V**k, B]; rows sum to one.
        stationary: stationary probability of each context, [V**k]; sums to one.
        sequence_length: T, tokens per sequence.
    """

    order: int
    successors: np.ndarray = field(repr=False)
    probabilities: np.ndarray = field(repr=False)
    stationary: np.ndarray = field(repr=False)
    sequence_length: int

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Return ``size`` new sequences: x_NT and y_NT int64, where y is the next token."""
        return next_token(self._sample(size, generator("markov training", seed, step)))

    def validation(self) -> list[Batch]:
        """Return 4 batches from a random stream that training does not use; their size is that of `Tokens.validation`."""
        count = VALIDATION_BATCHES * validation_batch(self.sequence_length)
        return batches_of(self._sample(count, generator("markov held out")))

    def _sample(self, size: int, random: np.random.Generator) -> np.ndarray:
        """Sample tokens [size, T + 1] from the stationary chain."""
        cumulative = np.cumsum(self.probabilities, axis=1)
        cumulative[:, -1] = 1.0  # rounding must not leave a gap below 1
        contexts_N = random.choice(len(self.stationary), size=size, p=self.stationary)
        tokens_NU = np.empty((size, self.sequence_length + 1), dtype=np.int64)
        for place in range(self.order):  # the sequence starts with its first context, oldest symbol first
            tokens_NU[:, place] = contexts_N // self.classes ** (self.order - 1 - place) % self.classes
        for place in range(self.order, self.sequence_length + 1):
            choice_N = (random.random((size, 1)) >= cumulative[contexts_N]).sum(axis=1)
            tokens_NU[:, place] = self.successors[contexts_N, choice_N]
            contexts_N = (contexts_N * self.classes + tokens_NU[:, place]) % len(self.stationary)
        return tokens_NU


def load_markov(
    sequence_length: int, vocabulary: int = 32, order: int = 2, branching: int = 4, language: int = 0
) -> Markov:
    """Return the Markov language with the number ``language``.

    Symbol 0 can follow every context, like a space. A run of k zeros can therefore be reached from every context, and the
    stationary distribution is unique. ``floor`` is the entropy of a sequence given its first symbol, per predicted token: the
    entropy rate, and slightly more for k > 1 because the first k - 1 predictions see fewer than k symbols.

    Args:
        sequence_length: T, tokens per sequence.
        vocabulary: V, number of symbols.
        order: k, number of symbols in a context.
        branching: B, number of symbols that can follow a context.
        language: seed of the successors and their probabilities.

    Raises:
        DataError: if the sizes do not define a language, or give more than 4096 contexts.
    """
    check_sequence_length(sequence_length)
    contexts = vocabulary**order
    if order < 1 or not 2 <= branching <= vocabulary or contexts > LARGEST_CONTEXTS:
        raise DataError(
            f"a Markov language of order {order} with {vocabulary} symbols and {branching} successors cannot be built: "
            f"the order should be at least 1, the successors 2 to {vocabulary}, and the number of contexts ({contexts}) at most "
            f"{LARGEST_CONTEXTS}."
        )
    if sequence_length < order:
        raise DataError(f"sequences of {sequence_length} tokens are shorter than the order {order}: make them longer.")
    random = generator("markov language", language, vocabulary, order, branching)
    others = 1 + np.argsort(random.random((contexts, vocabulary - 1)), axis=1)[:, : branching - 1]
    successors = np.concatenate([np.zeros((contexts, 1), dtype=np.int64), others], axis=1)
    weights = random.integers(1, 10, size=successors.shape)  # integers, so that the hash is the same on every machine
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    stationary = _stationary(successors, probabilities, vocabulary)
    rate = float(stationary @ entr(probabilities).sum(axis=1))
    floor = _entropy_after_first(stationary, rate, vocabulary, order, sequence_length) / sequence_length
    return Markov(
        name="markov",
        sha256=hashlib.sha256(
            f"{vocabulary} {order} ".encode() + successors.astype("<i8").tobytes() + weights.astype("<i8").tobytes()
        ).hexdigest(),
        facts={"vocabulary": vocabulary, "order": order, "branching": branching, "entropy_rate": rate},
        inputs=vocabulary,
        classes=vocabulary,
        kind="tokens",
        floor=floor,
        order=order,
        successors=successors,
        probabilities=probabilities,
        stationary=stationary,
        sequence_length=sequence_length,
    )


def _stationary(successors: np.ndarray, probabilities: np.ndarray, vocabulary: int) -> np.ndarray:
    """Return the solution of πP = π with Σπ = 1, [V**k]; contexts that are never entered get zero."""
    count = len(successors)
    contexts = np.arange(count)[:, None]
    equations = -np.eye(count)
    np.add.at(equations, ((contexts * vocabulary + successors) % count, contexts), probabilities)
    equations[-1] = 1.0  # one balance equation follows from the others
    right = np.zeros(count)
    right[-1] = 1.0
    solution = np.linalg.solve(equations, right).clip(min=0.0)
    return solution / solution.sum()


def _entropy_after_first(stationary: np.ndarray, rate: float, vocabulary: int, order: int, length: int) -> float:
    """Return the entropy in nats of ``length`` tokens given the one before them: H(first k) - H(first) + the rest."""
    first = stationary.reshape(vocabulary, -1).sum(axis=1)
    return float(entr(stationary).sum() - entr(first).sum()) + (length + 1 - order) * rate
