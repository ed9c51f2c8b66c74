"""Small corpora, and what tests of the data ask of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mutransfer.errors import RequestError
from mutransfer.proxies.data import Data, load_data
from mutransfer.proxies.data.base import Tokens

T = 16
SOURCES = ["digits", "bytes", "markov", "text", "bin"]
TOKEN_SOURCES = SOURCES[1:]


def equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def rows(data: Data) -> tuple[bytes, bytes]:
    """All training bytes and all held-out bytes."""
    assert isinstance(data, Tokens)
    return data.training.tobytes(), data.held_out.tobytes()


def refusal(spec: str, sequence_length: int = T) -> str:
    with pytest.raises(RequestError) as caught:
        load_data(spec, sequence_length)
    sentence = str(caught.value)
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence
    return sentence


def marked_files(folder: Path, count: int, suffix: str) -> list[bytes]:
    """Write ``count`` files in two folders, each with bytes that occur in no other file."""
    contents = [b"".join(b"%04d-%04d " % (number, line) for line in range(40)) for number in range(count)]
    for number, content in enumerate(contents):
        path = folder / f"part{number % 2}" / f"{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return contents
