"""The data sources: what a batch depends on, and what the digits are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mutransfer.proxies.data import Data, load_data
from mutransfer.proxies.data.builtin import Digits

from ..helpers.corpora import SOURCES, TOKEN_SOURCES, T, equal

# What a batch is


@pytest.mark.parametrize("name", SOURCES)
def test_shapes_and_dtypes(sources: dict[str, Data], name: str):
    data = sources[name]
    for (x, y), size in [(data.batch(0, 5, seed=0), 5), *((pair, len(pair[0])) for pair in data.validation())]:
        assert y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert int(y.min()) >= 0
        assert int(y.max()) < data.classes
        if name == "digits":
            assert (data.kind, data.inputs, data.classes) == ("images", 1, 10)
            assert (x.dtype, x.shape, y.shape) == (torch.float32, (size, 1, 8, 8), (size,))
        else:
            assert data.kind == "tokens"
            assert data.inputs == data.classes
            assert (x.dtype, x.shape, y.shape) == (torch.int64, (size, T), (size, T))
            assert int(x.max()) < data.inputs


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_depends_on_seed_and_step_only(sources: dict[str, Data], name: str):
    data = sources[name]
    first = data.batch(3, 8, seed=1)
    torch.manual_seed(7)
    np.random.seed(7)
    data.batch(2, 8, seed=1)
    assert equal(first, data.batch(3, 8, seed=1))
    assert not equal(first, data.batch(3, 8, seed=2))
    assert not equal(first, data.batch(4, 8, seed=1))
    # Neighbouring steps of one seed are not neighbouring seeds at one step.
    assert not equal(data.batch(3, 8, seed=4), data.batch(4, 8, seed=3))


@pytest.mark.parametrize("name", SOURCES)
def test_loading_again_gives_the_same_data(sources: dict[str, Data], files: Path, name: str):
    spec = {"text": f"text:{files / 'text.txt'}", "bin": f"bin:{files / 'tokens.bin'}"}.get(name, name)
    again = load_data(spec, sequence_length=T)
    assert again.sha256 == sources[name].sha256
    assert again.facts == sources[name].facts
    assert equal(again.batch(1, 4, seed=0), sources[name].batch(1, 4, seed=0))


@pytest.mark.parametrize("name", SOURCES)
def test_validation_is_fixed_small_and_of_one_size(sources: dict[str, Data], name: str):
    data = sources[name]
    before = data.validation()
    before[0][0].zero_()  # what a caller does to a batch stays with that caller
    data.batch(0, 4, seed=9)
    once, again = data.validation(), data.validation()
    assert not torch.equal(once[0][0], before[0][0])
    assert all(equal(one, other) for one, other in zip(once, again, strict=True))
    assert len({len(x) for x, _ in once}) == 1
    assert sum(len(x) for x, _ in once) <= (512 if data.kind == "images" else max(64, 4 * -(-1024 // T)))


@pytest.mark.parametrize("name", TOKEN_SOURCES)
def test_targets_are_the_inputs_shifted_by_one(sources: dict[str, Data], name: str):
    data = sources[name]
    for x, y in [data.batch(0, 8, seed=0), *data.validation()]:
        assert torch.equal(x[:, 1:], y[:, :-1])
    if name == "text":
        text = Path(str(data.facts["path"])).read_bytes()
        x, y = data.batch(0, 8, seed=0)
        for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
            assert bytes([*inputs, targets[-1]]) in text[:4500]


# Digits


@pytest.mark.parametrize("size", [100, 479, 1437, 2000])
def test_an_epoch_of_digits_is_without_replacement(sources: dict[str, Data], size: int):
    data = sources["digits"]
    count = int(data.facts["training_images"])
    steps = -(-2 * count // size)
    images = np.concatenate([data.batch(step, size, seed=0)[0].numpy() for step in range(steps)])
    assert isinstance(data, Digits)
    everything = {image.tobytes() for image in data.training[0]}
    assert len(everything) == count == 1437
    first, second = images[:count], images[count : 2 * count]
    assert {image.tobytes() for image in first} == everything
    assert {image.tobytes() for image in second} == everything
    assert not np.array_equal(first, second)


def test_digits_labels_belong_to_their_images(sources: dict[str, Data]):
    """A model that only memorizes the training images reads the held-out ones: labels and split are in order."""
    data = sources["digits"]
    x_train, y_train = data.batch(0, 1437, seed=3)
    [(x, y)] = data.validation()
    nearest = torch.cdist(x.flatten(1), x_train.flatten(1)).argmin(dim=1)
    assert float((y_train[nearest] == y).float().mean()) > 0.97
    assert float(torch.cdist(x.flatten(1), x_train.flatten(1)).min()) > 0


def test_digits_are_standardized_by_the_training_part(sources: dict[str, Data]):
    x, _ = sources["digits"].batch(0, 1437, seed=0)
    assert abs(float(x.double().mean())) < 1e-6
    assert abs(float(x.double().std(correction=0)) - 1) < 1e-6
