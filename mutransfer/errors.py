"""One way to say that a request is wrong: a sentence that names the thing and the next move."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["RequestError", "describe", "nearest"]


class RequestError(ValueError):
    """The request cannot be met as it stands.

    The message is one sentence for a person: it names the parameter, key or file with its value, what was expected,
    and the next move. The command line prints it without a traceback and exits with 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the known word most like ``word``, or all the known words when none is like it."""
    choices = sorted(known)
    folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return f"did you mean {folded[close[0]]!r}?" if close else f"known are {', '.join(choices)}."


def describe(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
