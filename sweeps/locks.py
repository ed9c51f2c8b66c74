"""Holding a folder or a file for this process alone, by locks that the kernel takes back when the process ends or is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from mutransfer.errors import RequestError
from mutransfer.run_dir import RunFolder

__all__ = ["only_one", "only_worker"]


@contextlib.contextmanager
def only_one(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder for this process: a second sweep in it would take the first one's trials for dead.

    Raises:
        RequestError: another process holds it.
    """
    busy = f"another process is at work in {folder.path}: wait for it or use another --out."
    with _held(folder.path / ".lock", busy):
        yield


@contextlib.contextmanager
def only_worker(address: str) -> Iterator[None]:
    """Hold the SQLite file of the URL ``address``: writers wait for each other there, and its locks fail on network disks.

    Raises:
        RequestError: another worker holds it, or it cannot be opened.
    """
    path = urlsplit(address).path.removeprefix("/")
    if not path:  # in memory
        yield
        return
    busy = (
        f"another worker is at work in {address}, and SQLite serves one at a time: name a --storage for many, as journal:FILE "
        "or postgresql://HOST/DATABASE."
    )
    try:
        held = contextlib.ExitStack()
        held.enter_context(_held(Path(f"{path}.lock"), busy))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise RequestError(f"cannot open the storage {address} ({reason}): check its folder and its address.") from None
    with held:
        yield


@contextlib.contextmanager
def _held(path: Path, busy: str) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(busy) from None
        yield
