"""Keep standard output for a command's result, and redirect everything else that is printed to standard error.

A model, a library or a process that they start may print through Python, through C or directly to file descriptor 1, so the
descriptor itself is redirected. Outside of a command, nothing here has any effect.
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
# Loggers of torch that report failed attempts. The command explains what such a failure means, or works around it.
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
    """Return the stream for results, or None if the command was started without a standard output."""
    return _results if _results is not None else sys.stdout


def release_at_exit_only() -> None:
    """Make the next `reserved` last until the process ends, so that output printed at exit does not mix with the result."""
    global _until_exit
    _until_exit = True


@contextlib.contextmanager
def reserved() -> Iterator[None]:
    """Reserve standard output for what is written to `results`; redirect all other writes to standard error."""
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
    except OSError:  # standard output was closed when the command started
        kept = None
    if on_descriptor and kept is not None:
        _results = os.fdopen(kept, "w", encoding=stream.encoding, errors=stream.errors, closefd=False)
        stream.reconfigure(line_buffering=True)  # keeps the order relative to direct writes to standard error
    else:  # an embedding program has replaced the stream, or there is none
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
    """Enable `shown_once` in a worker process, whose standard output its parent has already redirected."""
    global _results
    _results = sys.stderr
    no_tracebacks_of_torch().__enter__()  # until the process ends


class _StderrHandler(logging.Handler):
    """Write every record as a line to the current `sys.stderr`, in one write, which Ctrl-C does not split."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Write this package's log records of level INFO and above to standard error, as the command line does."""
    logger, lines = logging.getLogger("mutransfer"), _StderrHandler()
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
    """Hide tracebacks in torch's log of failed attempts, which mutransfer reports in a sentence; TORCH_LOGS shows them."""
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
    """Show the output of the block, unless the command has shown the same output before.

    Output is the same if the text is identical, or if it comes from the same place (``where``) and differs only in numbers,
    such as times or addresses.
    """
    if _results is None or not _capturing.acquire(blocking=False):
        yield
        return
    texts: list[str] = []  # stays empty if Ctrl-C comes before anything is captured
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
    """Return ``function`` with its output shown once; see `shown_once`."""

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
    """Flush the buffers of Python and C for standard output."""
    for stream in {id(each): each for each in (sys.stdout, sys.__stdout__) if each is not None}.values():
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "ctypes" in sys.modules:  # otherwise no compiled code that prints has been imported
        with contextlib.suppress(OSError, AttributeError):
            sys.modules["ctypes"].CDLL(None).fflush(None)


@contextlib.contextmanager
def _captured(texts: list[str]) -> Iterator[None]:
    """Capture writes to descriptor 1 and to `sys.stdout`, and append the text to ``texts`` when the block ends."""
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
            if sys.stdout is ours:  # otherwise the model has replaced the stream
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
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        if devnull != 1:
            os.close(devnull)


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
