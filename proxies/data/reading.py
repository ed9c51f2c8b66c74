"""Reading a user's files: always in the same order, hashed by path and content, and failing with the file's name."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from mutransfer.errors import RequestError

__all__ = ["existing", "file_sha256", "map_tokens", "naming_the_file", "read_tree", "row", "tree_sha256"]


@contextlib.contextmanager
def naming_the_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to read ``path``, or something in it, into a `RequestError` that names it."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RequestError(
            f"cannot read {error.filename or path} ({reason}): make it readable or give another path."
        ) from error


def existing(path: str, expected: str) -> Path:
    """Return ``path`` with ``~`` expanded.

    Raises:
        RequestError: it is neither a regular file nor a folder; ``expected`` says what it should have been.
    """
    if not path or "\0" in path:
        raise RequestError(f"{path!r} is not a path: give {expected}.")
    found = Path(path).expanduser()
    with naming_the_file(found):
        if not found.exists():
            raise RequestError(f"there is no {found}: give {expected}.")
        if not (found.is_file() or found.is_dir()):
            raise RequestError(f"{found} is neither a regular file nor a folder: give {expected}.")
    return found


def read_tree(root: Path, skip_folder: Callable[[str], bool], keep: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the regular files below ``root`` whose name satisfies ``keep``.

    Returns:
        Their content by relative path (with ``/``), sorted by path. Folders whose name satisfies ``skip_folder``
        are not entered, links to folders not followed.

    Raises:
        RequestError: a folder or a file cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error  # os.walk would otherwise leave the folder out, and with it a part of the corpus

    files = {}
    with naming_the_file(root):
        for folder, subfolders, names in os.walk(root, onerror=refuse):
            subfolders[:] = [name for name in subfolders if not skip_folder(name)]
            for path in (Path(folder, name) for name in names if keep(name)):
                with naming_the_file(path):  # a failing read, unlike a failing open, does not carry the name
                    if path.is_file():
                        files[path.relative_to(root).as_posix()] = path.read_bytes()
    return dict(sorted(files.items()))


def tree_sha256(files: dict[str, bytes]) -> str:
    """Hash the paths and the contents; lengths keep ``{"ab": b"c"}`` and ``{"a": b"bc"}`` apart."""
    digest = hashlib.sha256()
    for path, content in files.items():
        name = os.fsencode(path)
        digest.update(b"%d %d " % (len(name), len(content)) + name + content)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file's content without holding it in memory."""
    with naming_the_file(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_tokens(path: Path, dtype: DTypeLike) -> np.ndarray:
    """Map a file as a row of ``dtype``, read from disk as it is used."""
    with naming_the_file(path):
        if not path.stat().st_size:
            return np.empty(0, dtype)  # nothing cannot be mapped
        return np.memmap(path, dtype, mode="r")


def row(contents: Iterable[bytes]) -> np.ndarray:
    """Join contents to one row of bytes, [number of bytes] uint8."""
    return np.frombuffer(b"".join(contents), dtype=np.uint8)
