"""A command under a warden: started, read line by line, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mutransfer.io import naming_the_disk

__all__ = ["Ward"]

WARDEN = Path(__file__).with_name("warden.py")
LONGEST = 2**20  # bytes of a line: beyond, it is none that anybody meant to be read
TAIL = 4096  # bytes at the end of what a command said, where the reason is


class Ward:
    """One run of a command in ``folder``, or the current one; its stderr goes to the file ``errors``, appended to what is there.

    It lives in a session of its own: a Ctrl-C at the terminal does not reach it, and it ends when `stop` is called, or when
    this process is gone, however that came.
    """

    def __init__(
        self, words: Sequence[str], errors: Path, grace: float, environment: dict[str, str], folder: str | None = None
    ) -> None:
        with naming_the_disk(errors), errors.open("ab") as file:
            self._errors, self._before = errors, file.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WARDEN), str(grace), *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True, env=environment,
                cwd=folder,
            )  # fmt: skip
        assert self._process.stdout is not None
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._rest = b""

    @property
    def readable(self) -> int | None:
        """The file descriptor to wait for; None once stdout has ended."""
        return None if self._stdout.closed else self._stdout.fileno()

    @property
    def code(self) -> int | None:
        """The exit code, above 128 for a signal; None while anything of the command lives."""
        return self._process.poll()

    def lines(self) -> Iterator[bytes]:
        """Yield the lines that are there, without waiting, and at the end of stdout what follows the last line break."""
        while not self._stdout.closed:
            try:
                read = os.read(self._stdout.fileno(), 2**16)
            except BlockingIOError:
                return
            *whole, self._rest = (self._rest + read).split(b"\n")
            if not read:
                self._stdout.close()
            if self._rest and (not read or len(self._rest) > LONGEST):
                whole, self._rest = [*whole, self._rest], b""
            yield from whole

    def stop(self) -> None:
        """Ask the command to end; it is killed if it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Wait until nothing of the command is left, and let go of it."""
        self.stop()
        self._process.wait()
        self._stdout.close()

    def last_words(self) -> str:
        """Return the end of what it said on stderr, in one line."""
        with self._errors.open("rb") as file:
            file.seek(max(self._before, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
        # Rulers and empty lines say nothing.
        told = [" ".join(line.split()) for line in lines if any(letter.isalnum() for letter in line)]
        return " / ".join(told[-2:])[-300:].rstrip(".")
