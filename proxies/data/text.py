"""A user's own text, read as bytes: any file or folder of files will do, in any encoding."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np

from mutransfer.errors import RequestError

from .reading import existing, file_sha256, map_tokens, read_tree, row, tree_sha256
from .tokens import Tokens, require_tokens, split_at_the_end

__all__ = ["load"]

FILES_TO_SPLIT_BY_FILE = 10
LAST_TENTH = "last tenth of the bytes"


def load(path: str, sequence_length: int) -> Tokens:
    """Load a file, or all regular files below a folder except hidden ones, as tokens 0 to 255.

    Held out are whole files, about a tenth of the bytes, when a folder has ten files or more that allow it, and else
    the last tenth of the bytes; ``facts["held_out"]`` says which.

    Args:
        path: the file or folder; a file stays on disk, a folder is read into memory.
        sequence_length: T, tokens (bytes) per sequence.

    Raises:
        RequestError: the path is missing, unreadable, empty, or holds too few bytes.
    """
    source = existing(path, "a text file or a folder of text files")
    if source.is_dir():
        files = read_tree(source, _hidden, lambda name: not _hidden(name))
        sha256, count = tree_sha256(files), len(files)
        training, held_out, split = _split(files)
    else:
        sha256, count = file_sha256(source), 1
        training, held_out = split_at_the_end(map_tokens(source, np.uint8))
        split = LAST_TENTH
    if not len(training):
        raise RequestError(f"{source} is empty (0 tokens): give a file or folder with text in it.")
    require_tokens(source, training, held_out, sequence_length)
    return Tokens(
        name="text",
        sha256=sha256,
        facts={
            "path": str(source),
            "files": count,
            "held_out": split,
            "training_tokens": len(training),
            "held_out_tokens": len(held_out),
        },
        inputs=256,
        classes=256,
        kind="tokens",
        training=training,
        held_out=held_out,
        sequence_length=sequence_length,
    )


def _split(files: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray, str]:
    names = _held_out(files) if len(files) >= FILES_TO_SPLIT_BY_FILE else set()
    if not names:
        return *split_at_the_end(row(files.values())), LAST_TENTH
    training = row(content for name, content in files.items() if name not in names)
    return training, row(files[name] for name in sorted(names)), f"{len(names)} files"


def _held_out(files: dict[str, bytes]) -> set[str]:
    """Choose whole files with a tenth of the bytes, or none when the sizes are too uneven for it.

    The order is that of the contents' hashes: copies of one file under two names land on the same side.
    """
    copies: dict[bytes, list[str]] = defaultdict(list)
    for path, content in files.items():
        copies[hashlib.sha256(content).digest()].append(path)
    total, held, chosen = sum(map(len, files.values())), 0, set()
    for _, paths in sorted(copies.items()):
        size = sum(len(files[path]) for path in paths)
        if 0 < size <= total / 5 - held:
            chosen.update(paths)
            held += size
        if held >= total / 10:
            break
    return chosen if held >= total / 20 else set()


def _hidden(name: str) -> bool:
    return name.startswith(".")
