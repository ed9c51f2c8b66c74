"""What a command prints: standard output holds its result and nothing else, whatever else is printed goes to standard error.

A model, a library or a process that they start prints through Python, through C or straight into file descriptor 1, so it is
the descriptor that is turned away. Outside of a command nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ParamSpec, TextIO, TypeVar

__all__ = [
    "in_worker",
    "log_to_stderr",
    "no_tracebacks_of_torch",
    "once",
    "release_at_exit_only",
    "reserved",
    "results",
    "shown_once",
]

P = ParamSpec("P")
R = TypeVar("R")

_results: TextIO | None = None
_until_exit = False
# Of torch's own log: each of these is an attempt that failed, of which the command says what it means or which it works around.
_ATTEMPTS = (
    "torch._subclasses.fake_tensor",
    "torch._subclasses.fake_utils",
    "torch._dynamo.convert_frame",
    "torch._dynamo.symbolic_convert",
    "torch._guards",
    "torch.fx.experimental.recording",
    "torch.fx.experimental.symbolic_shapes",
)
_capturing = threading.Lock()
_shown: set[Hashable] = set()


def results() -> TextIO | None:
    """Return the stream that results are written to; None if the command was started without a standard output."""
    return _results if _results is not None else sys.stdout


def release_at_exit_only() -> None:
    """Let the next `reserved` last until the process ends, so that what is printed at exit is no result either."""
    global _until_exit
    _until_exit = True


@contextlib.contextmanager
def reserved() -> Iterator[None]:
    """Keep standard output for what is written to `results`; all other writes to it arrive at standard error."""
    global _results
    if _results is not None:
        yield
        return
    stream: Any = sys.stdout
    on_descriptor = _descriptor(stream) == 1
    buffered_by_line = getattr(stream, "line_buffering", False)
    flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed by whoever started the command
        kept = None
    if on_descriptor and kept is not None:
        _results = os.fdopen(kept, "w", encoding=stream.encoding, errors=stream.errors, closefd=False)
        stream.reconfigure(line_buffering=True)  # in order with what goes to standard error itself
    else:  # someone who embeds the command reads this stream, or nobody does
        _results = stream if stream is not None else io.StringIO()
        sys.stdout = sys.stderr
    _to_stderr()
    try:
        with no_tracebacks_of_torch():
            yield
    finally:
        if not _until_exit:
            flush()
            if on_descriptor:
                stream.reconfigure(line_buffering=buffered_by_line)
            else:
                sys.stdout = stream
            if kept is not None:
                os.dup2(kept, 1)
                os.close(kept)
            _results = None
            _shown.clear()


def in_worker() -> None:
    """Let `shown_once` work in a worker process, whose standard output its parent has turned away already."""
    global _results
    _results = sys.stderr
    no_tracebacks_of_torch().__enter__()  # for good


class _Lines(logging.Handler):
    """Writes every record as a line on today's standard error, in one write, which a Ctrl-C does not split."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write what this package logs, from INFO on, to standard error: the command line's handler."""
    logger, lines = logging.getLogger("mutransfer"), _Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


class _NoTracebacks(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.exc_info


@contextlib.contextmanager
def no_tracebacks_of_torch() -> Iterator[None]:
    """Keep tracebacks out of torch's log, of attempts that are answered in a sentence; TORCH_LOGS asks for all of it."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    hidden = _NoTracebacks()
    loggers: list[logging.Filterer] = [logging.getLogger(name) for name in _ATTEMPTS]
    places = [*loggers, *logging.getLogger("torch").handlers]
    for place in places:
        place.addFilter(hidden)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(hidden)


@contextlib.contextmanager
def shown_once(*where: Hashable) -> Iterator[None]:
    """Show what is printed inside, unless the command has shown the same before.

    The same is the same text, or at the same place (``where``) a text that differs in numbers alone: times, addresses.
    """
    if _results is None or not _capturing.acquire(blocking=False):
        yield
        return
    texts: list[str] = []  # empty if a Ctrl-C comes before anything is captured
    try:
        with _captured(texts):
            yield
    finally:
        _capturing.release()
        text = "".join(texts)
        same = {text, (*where, re.sub(r"0x[0-9a-fA-F]+|\d+", "0", text))}
        if text and not same & _shown:
            _write(text)
        _shown.update(same)


def once(function: Callable[P, R], *where: Hashable) -> Callable[P, R]:
    """Return ``function`` with what it prints shown once; see `shown_once`."""

    @functools.wraps(function)
    def quietly(*args: P.args, **kwargs: P.kwargs) -> R:
        with shown_once(*where):
            return function(*args, **kwargs)

    return quietly


def _write(text: str) -> None:
    if (stream := sys.stdout) is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()


def flush() -> None:
    """Write out what Python and C hold back for standard output."""
    for stream in {id(each): each for each in (sys.stdout, sys.__stdout__) if each is not None}.values():
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "ctypes" in sys.modules:  # without it nothing compiled that prints has been imported
        with contextlib.suppress(OSError, AttributeError):
            sys.modules["ctypes"].CDLL(None).fflush(None)


@contextlib.contextmanager
def _captured(texts: list[str]) -> Iterator[None]:
    """Add what is written to descriptor 1 and to `sys.stdout` to ``texts`` when the block ends."""
    flush()
    before, stream = os.dup(1), sys.stdout
    ours: Any = None
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            ours = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False, buffering=1)
            sys.stdout = ours
            yield
        finally:
            flush()
            if sys.stdout is ours:  # else the model has put a stream of its own there
                sys.stdout = stream
            with contextlib.suppress(OSError, ValueError, AttributeError):
                ours.flush()
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))


def _to_stderr() -> None:
    try:
        os.dup2(2, 1)
    except OSError:  # standard error is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        if nowhere != 1:
            os.close(nowhere)


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
