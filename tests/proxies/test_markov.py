"""The Markov language: its floor, its start and its validation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mutransfer.errors import RequestError
from mutransfer.proxies.data import Data, builtin

from ..helpers.corpora import T

# The Markov language


def transition_matrix(language: builtin.Markov) -> np.ndarray:
    """Dense [contexts, contexts], written out by loops."""
    V, k = language.classes, language.order
    contexts = list(itertools.product(range(V), repeat=k))
    row = {context: number for number, context in enumerate(contexts)}
    P = np.zeros((len(contexts), len(contexts)))
    for context in contexts:
        pairs = zip(language.successors[row[context]], language.probabilities[row[context]], strict=True)
        for symbol, probability in pairs:
            P[row[context], row[(*context[1:], int(symbol))]] += probability
    return P


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_markov_floor_is_the_entropy_of_a_sequence(order: int):
    """Oracle: power iteration for the stationary distribution, and every sequence of the language enumerated."""
    V, length = 5, 4
    language = builtin.load_markov(length, vocabulary=V, order=order, branching=3)
    P = transition_matrix(language)
    assert np.allclose(P.sum(axis=1), 1)
    occupation = np.full(len(P), 1 / len(P))
    for _ in range(2000):
        occupation = occupation @ P
    rate = -sum(occupation[i] * p * np.log(p) for i, row in enumerate(P) for p in row if p > 0)
    assert language.facts["entropy_rate"] == pytest.approx(rate, rel=1e-9)

    contexts = list(itertools.product(range(V), repeat=order))
    sequences = {context: occupation[number] for number, context in enumerate(contexts)}
    for _ in range(length + 1 - order):
        longer: dict[tuple[int, ...], float] = {}
        for sequence, probability in sequences.items():
            context = contexts.index(sequence[-order:])
            for symbol, p in zip(language.successors[context], language.probabilities[context], strict=True):
                longer[(*sequence, int(symbol))] = probability * p
        sequences = longer
    joint = -sum(p * np.log(p) for p in sequences.values() if p > 0)
    firsts = [sum(p for sequence, p in sequences.items() if sequence[0] == symbol) for symbol in range(V)]
    first = -sum(p * np.log(p) for p in firsts if p > 0)
    assert language.floor == pytest.approx((joint - first) / length, rel=1e-9)
    if order == 1:
        assert language.floor == pytest.approx(rate, rel=1e-9)
    else:
        assert language.floor is not None
        assert language.floor > rate


@pytest.mark.parametrize("order", [1, 2])
def test_the_true_distribution_reaches_the_markov_floor(order: int):
    """The best model there is scores the floor on sampled batches: sampler, targets and floor belong together."""
    language = builtin.load_markov(64, order=order)
    P = transition_matrix(language).reshape(len(language.stationary), -1)
    V = language.classes
    x, y = (tensor.numpy() for tensor in language.batch(0, 4000, seed=0))
    sequences = np.concatenate([x, y[:, -1:]], axis=1)
    total = 0.0
    for place in range(1, 65):
        if place < order:  # order 2 and one symbol seen: average over the symbol before it
            pairs = language.stationary.reshape(V, V)
            total += -np.log((pairs / pairs.sum(axis=1, keepdims=True))[sequences[:, 0], sequences[:, 1]]).sum()
            continue
        context = sum(sequences[:, place - order + j] * V ** (order - 1 - j) for j in range(order))
        following = sum(sequences[:, place - order + 1 + j] * V ** (order - 1 - j) for j in range(order))
        total += -np.log(P[context, following]).sum()
    assert total / y.size == pytest.approx(language.floor, rel=0.01)
    assert language.floor is not None
    assert language.floor < 0.5 * np.log(V)


def test_the_markov_chain_starts_stationary(sources: dict[str, Data]):
    language = sources["markov"]
    x, y = language.batch(0, 20000, seed=0)
    first = torch.bincount(x[:, 0], minlength=32) / len(x)
    last = torch.bincount(y[:, -1], minlength=32) / len(y)
    assert float((first - last).abs().max()) < 0.015


def test_markov_validation_is_a_stream_of_its_own(sources: dict[str, Data]):
    held_out = {tuple(row) for x, _ in sources["markov"].validation() for row in x.tolist()}
    assert len(held_out) == 4 * 1024 // sources["markov"].sequence_length
    training = {tuple(r) for step in range(20) for r in sources["markov"].batch(step, 64, seed=0)[0].tolist()}
    assert len(training) == 20 * 64
    assert not held_out & training


@pytest.mark.parametrize(
    ("changed", "words"), [({"order": 0}, "order 0"), ({"order": 3}, "32768"), ({"branching": 1}, "1 successors")]
)
def test_impossible_languages_are_refused(changed: dict[str, int], words: str):
    with pytest.raises(RequestError, match="cannot be built") as caught:
        builtin.load_markov(T, **changed)
    assert words in str(caught.value)
