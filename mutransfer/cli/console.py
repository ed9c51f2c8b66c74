"""Shared by all commands: progress on stderr, results on stdout, and the common options."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Annotated, Any

import typer

from ..errors import FileError, RequestError
from ..io import as_json_value, naming_the_disk
from ..printing import results

__all__ = ["AsJson", "Device", "Progress", "Seed", "emit", "numbers", "say", "table"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
# Scripts pass the same options to every command, including those that use no random numbers or no device.
UnusedSeed = Annotated[int, typer.Option("--seed", min=0, help="Accepted by every command; has no effect here.")]
UnusedDevice = Annotated[str, typer.Option("--device", help="Accepted by every command; has no effect here.")]


def device_of(name: str) -> str:
    """Return a torch device for the --device option, and keep freed memory in this process, which is about to train.

    Raises:
        RequestError: the name is unknown, or CUDA is requested but not available.
    """
    import torch

    from ..devices import keep_freed_memory

    keep_freed_memory()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise RequestError(f"--device {name!r} is not known: use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda, but torch sees no GPU: use --device cpu, or see `mutransfer doctor`.")
    return name


def say(text: str) -> None:
    """Print a line for the user to stderr."""
    print(text + "\n", end="", file=sys.stderr, flush=True)  # in one write, which Ctrl-C does not split


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, which a cluster sends before it reclaims a machine, as Ctrl-C, so that unfinished trials are requeued."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the result to stdout, as one JSON object or as text."""
    if (stream := results()) is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = text.encode(encoding, "backslashreplace").decode(encoding)
    if as_json:
        line = json.dumps(as_json_value(result), ensure_ascii=False, allow_nan=False)
        try:
            line.encode(encoding)
        except UnicodeEncodeError:  # a terminal that cannot show µ, or a file name that is not valid text
            line = json.dumps(as_json_value(result), allow_nan=False)
    try:
        with naming_the_disk("the result to standard output"):
            print(line, file=stream, flush=True)
    except (BrokenPipeError, FileError) as error:
        # The rest of the buffer cannot be written at exit either, and Python would then replace the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, FileError):
            raise


def numbers(text: str, flag: str) -> list[int]:
    """Return the numbers of a list such as ``64,128,256``.

    Raises:
        RequestError: an entry is not a positive integer.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise RequestError(
                f"{flag} {text!r}: {part!r} is not a positive whole number, write the list as 64,128,256."
            )
    return [int(part) for part in parts]


def records(frame: Any) -> list[dict[str, Any]]:
    """Return a frame's rows as dictionaries, with None for missing values."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def table(frame: Any, **formats: str) -> str:
    """Return a frame as aligned text; ``formats`` gives a format per column, and missing values show as –.

    The text is the same on a terminal and in a pipe, which `rich.table` does not do, in 1/46 of its time (docs/log.md).
    """
    missing = frame.isna()
    texts = {
        column: [
            "–" if is_missing else format(value, formats.get(str(column), ""))
            for value, is_missing in zip(frame[column], missing[column], strict=True)
        ]
        for column in frame.columns
    }
    widths = {column: max(_width(str(column)), *map(_width, cells), 1) for column, cells in texts.items()}
    right = {column: frame[column].dtype.kind in "if" for column in frame.columns}
    lines = ["  ".join(_pad(str(column), widths[column], right[column]) for column in frame.columns)]
    for i in range(len(frame)):
        lines.append("  ".join(_pad(texts[column][i], widths[column], right[column]) for column in frame.columns))
    return "\n".join(line.rstrip() for line in lines)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    """Return the number of columns that a terminal uses for ``text``: two for each East Asian wide character."""
    if text.isascii():
        return len(text)
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


class Progress:
    """Show the progress of a task and the time left: as a bar on a terminal, as lines in a log.

    Use it as a context manager, and call it with (done, total, text). The time left is estimated from the pieces of work that
    were finished after the last call without a new one, so that the time before the first piece (measuring, starting processes)
    does not count. ``left``, in seconds, replaces this estimate where more is known than this phase, such as the phases to come.
    """

    LINE_EVERY = 10.0  # seconds between lines in a log

    def __init__(self, what: str, left: Callable[[], float] | None = None) -> None:
        self.what, self._left = what, left
        self._begun = self._last = time.monotonic()
        self._first_done: int | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            remaining = (TimeRemainingColumn(),) if self._left is None else ()
            self._bar = Bar(*columns, *remaining, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=None, text=self._known())
        else:
            say(f"{self.what} …{' ' if self._left else ''}{self._known()}")
        return self

    def __call__(self, done: int, total: int, text: str = "", ahead: float | None = None) -> None:
        """Report that ``done`` of ``total`` pieces of work are finished.

        If the pieces differ in cost, ``ahead`` is the ratio of the work left to the work done since the first call.
        """
        if self._bar is not None:
            known = ", ".join(part for part in (self._known(), text) if part)
            self._bar.update(self._task, completed=done, total=total, text=known)
            return
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = done
        fresh = done - self._first_done
        if fresh <= 0:
            self._begun = now
        if now - self._last < self.LINE_EVERY and done < total:
            return
        self._last = now
        left = ""
        if self._left is not None:
            left = f", {self._known()}"
        elif fresh > 0 and done < total:
            ratio = (total - done) / fresh if ahead is None else ahead
            left = f", about {(now - self._begun) * ratio:.0f} s left"
        say(f"{self.what}: {done}/{total}{left}{', ' + text if text else ''}")

    def _known(self) -> str:
        """Return the time left in words if ``left`` was given, else an empty string."""
        return "" if self._left is None else f"about {self._left():.0f} s left in total"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
