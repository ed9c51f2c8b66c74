"""Atomic file writes, disk errors that name the path, and passwords masked in files and messages."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import FileError

__all__ = [
    "FULL_DISK",
    "as_json_value",
    "masked",
    "naming_the_disk",
    "read_json",
    "write_bytes",
    "write_json",
    "write_text",
]

# A size limit (ulimit -f, the quota of some file systems) raises EFBIG instead of ENOSPC.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def naming_the_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert the error of a full disk, or of a path that cannot be written, into a `FileError` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise FileError(
                f"no space left to write {path} ({os.strerror(error.errno or 0)}): free some disk space or choose another "
                "--out, then run the same command again; finished work is kept."
            ) from error
        if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}:
            raise FileError(
                f"cannot write {path} ({os.strerror(error.errno or 0)}): choose a writable --out."
            ) from error
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to ``path`` atomically, creating its folders: a reader or a crash sees the old file or the new one.

    Raises:
        FileError: the disk is full or ``path`` cannot be written; no partial file is left.
    """
    path = Path(path)
    with naming_the_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp's mode 0600 would hide a report from other users
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    return path


def write_text(path: str | os.PathLike[str], content: str) -> Path:
    """Write ``content`` as UTF-8 with `write_bytes`."""
    return write_bytes(path, content.encode())


def as_json_value(value: Any) -> Any:
    """Return ``value`` in types that JSON has: NaN, infinities and missing values as null, arrays as lists, paths as text."""
    if isinstance(value, dict):
        return {str(key): as_json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json_value(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and not isinstance(value, str):  # arrays of numpy and torch
        return as_json_value(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return None if type(value).__name__ == "NAType" else value  # pandas's missing value


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write ``content`` as indented JSON with `write_bytes`; the encoder rejects NaN and infinities."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """Return the content of the JSON file ``path``.

    Raises:
        FileError: the file is missing or is not JSON; the message says that ``what`` was expected.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"there is no {path}: expected {what}.") from None
    except IsADirectoryError:
        raise FileError(f"{path} is a folder: expected {what}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not valid JSON ({error}): expected {what}.") from None


# scheme://user:password@host; greedy, because a password that is not percent-encoded may contain / or @.
_IN_ADDRESS = re.compile(r"(://[^:/?#\s@]*):(\S*)@")
_IN_QUERY = re.compile(r"([?&\s](?:password|passwd|sslpassword)=)[^&\s]*", re.IGNORECASE)


def masked(text: str) -> str:
    """Return ``text`` with the password of every URL replaced by ``***``."""
    return _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub(r"\1:***@", text))
