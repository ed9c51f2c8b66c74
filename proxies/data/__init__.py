"""Load training data by name: data sets that come with the dependencies, and the user's own files."""

from __future__ import annotations

from mutransfer.errors import DataError, nearest

from .base import Batch as Batch
from .base import Data as Data

__all__ = ["Batch", "Data", "load_data"]

NAMES = ("digits", "bytes", "markov", "text:PATH", "bin:PATH")


def load_data(spec: str, sequence_length: int = 128) -> Data:
    """Load the data set that ``spec`` names.

    Args:
        spec: ``digits`` (images), ``bytes`` (the Python standard library's source), ``markov`` (a language of known
            entropy), ``text:PATH`` (a text file or folder) or ``bin:PATH`` (nanoGPT's uint16 tokens).
        sequence_length: T, tokens per sequence; ignored for images.

    Raises:
        DataError: if the name is unknown, or the files are missing, unreadable or too small.
    """
    name, colon, path = spec.partition(":")
    known = {choice.partition(":")[0]: choice for choice in NAMES}
    if spec == "none":
        raise DataError(
            "the data is none because the user trainer loads its own: start that trainer with the settings that `mutransfer "
            f"transfer RUN --width W --to pytorch` writes, or name one of {', '.join(NAMES)}."
        )
    if name not in known:
        raise DataError(f"unknown data {spec!r}: {nearest(name, known)}")
    if known[name].endswith(":PATH"):
        if not path:
            raise DataError(f"the data {spec!r} has no path: write {known[name]}.")
    elif colon:
        raise DataError(f"the data {name!r} takes no path, but {spec!r} gives one: write {name}.")

    # Import only the requested source: importing scikit-learn alone takes a second.
    match name:
        case "digits":
            from . import builtin

            return builtin.load_digits()
        case "bytes":
            from . import corpora

            return corpora.load_standard_library(sequence_length)
        case "markov":
            from . import builtin

            return builtin.load_markov(sequence_length)
        case "text":
            from . import corpora

            return corpora.load_text(path, sequence_length)
        case _:
            from . import corpora

            return corpora.load_token_file(path, sequence_length)
