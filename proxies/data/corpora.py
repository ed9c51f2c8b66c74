"""Text and token files: the user's text as bytes, nanoGPT's uint16 files, and the Python standard library's source.

Files are always read in the same order and hashed by path and content, and errors name the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from mutransfer.errors import DataError

from .base import Tokens, require_tokens, split_at_the_end

__all__ = [
    "existing",
    "file_sha256",
    "load_standard_library",
    "load_text",
    "load_token_file",
    "map_tokens",
    "naming_the_file",
    "read_tree",
    "row",
    "tree_sha256",
]


@contextlib.contextmanager
def naming_the_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to read ``path``, or a file below it, into a `DataError` that names the file."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"cannot read {error.filename or path} ({reason}): make it readable or give another path."
        ) from error


def existing(path: str, expected: str) -> Path:
    """Return ``path`` with ``~`` expanded.

    Args:
        path: a file or folder.
        expected: description of an acceptable path, for error messages.

    Raises:
        DataError: if ``path`` is neither a regular file nor a folder.
    """
    if not path or "\0" in path:
        raise DataError(f"{path!r} is not a path: give {expected}.")
    found = Path(path).expanduser()
    with naming_the_file(found):
        if not found.exists():
            raise DataError(f"there is no {found}: give {expected}.")
        if not (found.is_file() or found.is_dir()):
            raise DataError(f"{found} is neither a regular file nor a folder: give {expected}.")
    return found


def read_tree(root: Path, skip_folder: Callable[[str], bool], keep: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the regular files below ``root`` whose names satisfy ``keep``.

    Folders whose names satisfy ``skip_folder`` are not entered, and links to folders are not followed.

    Returns:
        The content of each file by its path relative to ``root`` (with ``/``), sorted by path.

    Raises:
        DataError: if a folder or a file cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error  # by default os.walk skips an unreadable folder, and part of the corpus would be missing

    files = {}
    with naming_the_file(root):
        for folder, subfolders, names in os.walk(root, onerror=refuse):
            subfolders[:] = [name for name in subfolders if not skip_folder(name)]
            for path in (Path(folder, name) for name in names if keep(name)):
                with naming_the_file(path):  # the OSError of a failed read, unlike that of open, has no file name
                    if path.is_file():
                        files[path.relative_to(root).as_posix()] = path.read_bytes()
    return dict(sorted(files.items()))


def tree_sha256(files: dict[str, bytes]) -> str:
    """Return the SHA-256 of the paths and contents; hashing lengths distinguishes ``{"ab": b"c"}`` from ``{"a": b"bc"}``."""
    digest = hashlib.sha256()
    for path, content in files.items():
        name = os.fsencode(path)
        digest.update(b"%d %d " % (len(name), len(content)) + name + content)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file without loading it into memory."""
    with naming_the_file(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_tokens(path: Path, dtype: DTypeLike) -> np.ndarray:
    """Memory-map a file as a one-dimensional array of ``dtype``."""
    with naming_the_file(path):
        if not path.stat().st_size:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(path, dtype, mode="r")


def row(contents: Iterable[bytes]) -> np.ndarray:
    """Concatenate contents into one array of bytes, [number of bytes] uint8."""
    return np.frombuffer(b"".join(contents), dtype=np.uint8)


FILES_TO_SPLIT_BY_FILE = 10
LAST_TENTH = "last tenth of the bytes"


def load_text(path: str, sequence_length: int) -> Tokens:
    """Load a file, or all non-hidden regular files below a folder, as byte tokens 0 to 255.

    If a folder has at least ten files and their sizes allow it, whole files with about a tenth of the bytes are held out.
    Otherwise the last tenth of the bytes is held out. ``facts["held_out"]`` records which.

    Args:
        path: the file or folder; a file stays on disk, a folder is read into memory.
        sequence_length: T, tokens (bytes) per sequence.

    Raises:
        DataError: if the path is missing, unreadable, empty, or holds too few bytes.
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
        raise DataError(f"{source} is empty (0 tokens): give a file or folder with text in it.")
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
    """Return the names of whole files with about a tenth of the bytes, or none if the file sizes are too uneven.

    Files are chosen in the order of their content hashes, and copies of a file under several names stay together.
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


SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def load_standard_library(sequence_length: int, root: str | None = None) -> Tokens:
    """Load the ``*.py`` files of the running Python, without its tests and without installed packages.

    One file in ten, chosen by its relative path, is held out. The content and its hash differ between Python versions.

    Args:
        sequence_length: T, tokens (bytes) per sequence.
        root: folder of Python source to use instead of the running Python's.

    Raises:
        DataError: if there is no source on this machine (as with some embedded Pythons), or too little of it.
    """
    folder = existing(root or sysconfig.get_paths()["stdlib"], "a folder of Python source")
    files = read_tree(folder, _skipped, _is_source)
    if not files:
        raise DataError(f"{folder} holds no Python source files: give your own text as text:PATH.")
    held_out = {path: content for path, content in files.items() if _is_held_out(path)}
    training_bytes = row(content for path, content in files.items() if path not in held_out)
    held_out_bytes = row(held_out.values())
    require_tokens(folder, training_bytes, held_out_bytes, sequence_length)
    return Tokens(
        name="bytes",
        sha256=tree_sha256(files),
        facts={
            "python": platform.python_version(),
            "path": str(folder),
            "training_files": len(files) - len(held_out),
            "held_out_files": len(held_out),
            "training_tokens": len(training_bytes),
            "held_out_tokens": len(held_out_bytes),
        },
        inputs=256,
        classes=256,
        kind="tokens",
        training=training_bytes,
        held_out=held_out_bytes,
        sequence_length=sequence_length,
    )


def _skipped(folder: str) -> bool:
    return folder in SKIPPED or folder.startswith("config-")  # config-3.x-PLATFORM is generated where Python was built


def _is_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith("_sysconfigdata")  # also generated: the hash would differ


def _is_held_out(path: str) -> bool:
    # Decided by path, not position: a file stays in the same part when another Python version adds files.
    return hashlib.sha256(path.encode(errors="surrogateescape")).digest()[0] < 26


CHUNK = 1 << 24
HEADED_MAGIC = 20240520  # first int32 of llm.c's .bin files, whose header is 1024 bytes long


def load_token_file(path: str, sequence_length: int) -> Tokens:
    """Load a ``.bin`` file, whose last tenth is held out, or a folder with ``train.bin`` and ``val.bin``.

    The vocabulary size is the largest token found plus one: tokens that the tokenizer has but the files never use are not
    counted, and no ``meta.pkl`` is unpickled to find them.

    Args:
        path: the file or folder.
        sequence_length: T, tokens per sequence.

    Raises:
        DataError: if a file is missing, unreadable, empty, too small, or not a raw array of uint16.
    """
    source = existing(path, "a .bin file of uint16 tokens or a folder with train.bin and val.bin")
    if source.is_dir():
        names = [source / "train.bin", source / "val.bin"]
        for name in names:
            if not name.is_file():
                raise DataError(f"there is no {name}: give a folder with train.bin and val.bin, or one .bin file.")
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
        raise DataError(f"{path} is empty (0 tokens): write uint16 tokens to it, as nanoGPT's prepare.py does.")
    if size % 2:
        raise DataError(f"{path} has {size} bytes, an odd number: it should be a raw array of uint16 tokens.")
    tokens = map_tokens(path, "<u2")
    if size >= 4 and int(tokens[0]) + (int(tokens[1]) << 16) == HEADED_MAGIC:
        raise DataError(
            f"{path} begins with llm.c's header of 1024 bytes, which would be read as tokens: remove it, for example with "
            f"`tail -c +1025 {path.name} > bare.bin`."
        )
    return tokens


def _scan(path: Path) -> tuple[str, int]:
    """Return the SHA-256 and the largest token of a file, reading it once."""
    digest, largest = hashlib.sha256(), 0
    with naming_the_file(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, "<u2").max()))
    return digest.hexdigest(), largest
