"""Token files as nanoGPT writes them: a bare row of little-endian uint16, read from disk as it is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mutransfer.errors import RequestError

from .reading import existing, map_tokens, naming_the_file
from .tokens import Tokens, require_tokens, split_at_the_end

__all__ = ["load"]

CHUNK = 1 << 24
HEADED_MAGIC = 20240520  # first int32 of the .bin files of llm.c, which have 1024 bytes before the tokens


def load(path: str, sequence_length: int) -> Tokens:
    """Load a ``.bin`` file, its last tenth held out, or a folder with ``train.bin`` and ``val.bin``.

    The vocabulary is the largest token found plus one: tokens that a tokenizer knows and the files never use
    are not counted, and no ``meta.pkl`` is unpickled to find them.

    Args:
        path: the file or folder.
        sequence_length: T, tokens per sequence.

    Raises:
        RequestError: a file is missing, unreadable, empty, too small, or not a bare row of uint16.
    """
    source = existing(path, "a .bin file of uint16 tokens or a folder with train.bin and val.bin")
    if source.is_dir():
        names = [source / "train.bin", source / "val.bin"]
        for name in names:
            if not name.is_file():
                raise RequestError(f"there is no {name}: give a folder with train.bin and val.bin, or one .bin file.")
        training, held_out = (_map(name) for name in names)
        scans = [_scan(name) for name in names]
        sha256 = hashlib.sha256("".join(digest for digest, _ in scans).encode()).hexdigest()
    else:
        training, held_out = split_at_the_end(_map(source))
        scans = [_scan(source)]
        sha256 = scans[0][0]
    require_tokens(source, training, held_out, sequence_length)
    vocabulary = 1 + max(largest for _, largest in scans)
    return Tokens(
        name="bin",
        sha256=sha256,
        facts={
            "path": str(source),
            "vocabulary": vocabulary,
            "training_tokens": len(training),
            "held_out_tokens": len(held_out),
        },
        inputs=vocabulary,
        classes=vocabulary,
        kind="tokens",
        training=training,
        held_out=held_out,
        sequence_length=sequence_length,
    )


def _map(path: Path) -> np.ndarray:
    with naming_the_file(path):
        size = path.stat().st_size
    if not size:
        raise RequestError(f"{path} is empty (0 tokens): write uint16 tokens to it, as nanoGPT's prepare.py does.")
    if size % 2:
        raise RequestError(f"{path} has {size} bytes, an odd number: it should be a bare row of uint16 tokens.")
    tokens = map_tokens(path, "<u2")
    if size >= 4 and int(tokens[0]) + (int(tokens[1]) << 16) == HEADED_MAGIC:
        raise RequestError(
            f"{path} begins with llm.c's header of 1024 bytes, which would be read as tokens: cut it off, as with "
            f"`tail -c +1025 {path.name} > bare.bin`."
        )
    return tokens


def _scan(path: Path) -> tuple[str, int]:
    """Return the file's SHA-256 and its largest token, in one pass over the disk."""
    digest, largest = hashlib.sha256(), 0
    with naming_the_file(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, "<u2").max()))
    return digest.hexdigest(), largest
