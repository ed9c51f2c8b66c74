"""A study's journal in one file, which any number of processes may write and be killed or interrupted in.

Optuna's own locks are files: they outlive a killed process, are then waited for (half a minute, or without end where the
path is relative), and turn a Ctrl-C during their release into a FileNotFoundError. The kernel takes back an `flock` with the
process that held it. It works on local disks, and on NFS and Lustre where these are mounted with locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from mutransfer.errors import RequestError
from mutransfer.io import naming_the_disk

__all__ = ["Journal"]

BLOCK = 65536  # bytes looked back at a time for the last newline
FIRST = b'{"op_code":'  # how a journal begins, Optuna's own as well


class Journal(JournalFileBackend):
    """The journal ``path``, created if there is none, cut back to its last whole line.

    A process killed in a write, or a full disk, leaves half a line, which is fatal to the next reader once more follows it.
    Nobody has been told that such a line is written, so it is cut off: here, and before every line that is added.

    Raises:
        RequestError: the file holds something else, or its file system has no locks.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        with self._held():
            pass

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add ``logs``, one line each, and return when they are on the disk.

        Raises:
            RequestError: the disk is full, or cannot be written.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with naming_the_disk(self._file_path), self._held() as file:
            # What a failure leaves of a line is not taken back here: a whole one may have been read by others already.
            while lines:
                lines = lines[os.write(file, lines) :]
            os.fsync(file)

    @contextlib.contextmanager
    def _held(self) -> Iterator[int]:
        """The healed file, open at its end, for this process alone."""
        file = os.open(self._file_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:
                    raise
                raise RequestError(
                    f"the file system of {self._file_path} has no locks, without which workers would write over each other: "
                    "mount it with locks, or name a --storage on a server, as postgresql://HOST/DATABASE."
                ) from None
            begin = os.pread(file, len(FIRST), 0)
            if not FIRST.startswith(begin):  # to be cut off as well: it may be anyone's file
                raise RequestError(f"{self._file_path} is no journal of a study: name another --storage or --out.")
            whole = _end_of_last_line(file)
            if whole < os.fstat(file).st_size:
                os.ftruncate(file, whole)
            yield file
        finally:
            os.close(file)  # and with it the lock


def _end_of_last_line(file: int) -> int:
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - BLOCK)
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
