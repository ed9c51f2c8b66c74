"""Paths inside of an experiment: relative to the folder of its file, found from any folder, and after a move of the project.

Results are recorded with the absolute path of everything they were made from, and with its path relative to the record. What is
beside a record now goes first, so that a copy of a project uses its own files; then where it was when it was recorded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from .errors import RequestError

__all__ = ["anchored", "found", "from_here", "path_of", "recorded", "with_path"]

PREFIXES = {"model": ("hf",), "data": ("text", "bin"), "call": ()}  # key of an experiment → what a path may follow
NAMES = {"model": "model", "data": "data", "call": "trainer"}


def path_of(key: str, reference: str) -> str | None:
    """Return the path in what stands for ``key`` (model, data, call); None if it names something built in or installed.

    Paths are those of ``hf:PATH``, ``text:PATH``, ``bin:PATH`` and ``PATH/file.py:name``.
    """
    kind, colon, rest = reference.partition(":")
    if colon and rest and kind in PREFIXES[key]:
        return rest
    if key == "data":
        return None
    where, _, _ = reference.rpartition(":")
    return where if where.endswith(".py") or "/" in where or "\\" in where else None


def with_path(key: str, reference: str, path: str) -> str:
    """Return ``reference`` with another path in place of its own."""
    old = path_of(key, reference)
    if old is None:
        return reference
    if reference.partition(":")[0] in PREFIXES[key]:
        return f"{reference.partition(':')[0]}:{path}"
    return path + reference[len(old) :]


def anchored(key: str, reference: str, folder: str | os.PathLike[str]) -> str:
    """Return ``reference``, whose path leads from the current folder if there is one, with a path that leads from ``folder``."""
    path = path_of(key, reference)
    if path is None or path.startswith("~") or os.path.isabs(path) or not os.path.exists(path):
        return reference
    below = os.path.relpath(path, folder)
    return with_path(key, reference, os.path.abspath(path) if below.startswith(os.pardir) else below)


def from_here(key: str, reference: str, folder: str | os.PathLike[str] | None) -> str:
    """Return ``reference`` for use in the current folder: its path relative to ``folder`` leads from here."""
    path = path_of(key, reference)
    if path is None or path.startswith("~") or folder is None:
        return reference
    whole = os.path.normpath(os.path.join(folder, path))
    below = os.path.relpath(whole)
    # As short as it was typed, where it was typed.
    return with_path(key, reference, whole if os.path.isabs(path) or below.startswith(os.pardir) else below)


def recorded(references: Mapping[str, str], folder: str, beside: str | os.PathLike[str]) -> dict[str, str]:
    """Return absolute → relative to the folder ``beside`` of ``folder`` and of every absolute path in ``references``."""
    paths = [path_of(key, each) for key, each in references.items()]
    home = os.path.realpath(beside)
    whole = sorted({folder, *(path for path in paths if path is not None and os.path.isabs(path))})
    return {path: os.path.relpath(os.path.realpath(path), home) for path in whole}


def found(
    references: Mapping[str, str], folder: str, places: Mapping[str, str], beside: str | os.PathLike[str],
    what: str | None = None,
) -> tuple[dict[str, str], str]:  # fmt: skip
    """Return the references of a record, and the folder that their relative paths lead from, where they are now.

    Args:
        references: by key, as recorded.
        folder: what their relative paths led from when they were recorded.
        places: what `recorded` returned then.
        beside: the folder that holds the record now.
        what: what the record is of, for the sentence; None to let pass what is gone.

    Raises:
        RequestError: a path leads nowhere, neither from the record nor from where it was.
    """
    homes = _candidates(folder, places, beside)
    home = next((each for each in homes if all(_there(key, ref, each) for key, ref in references.items())), folder)
    now = {}
    for key, reference in references.items():
        path = path_of(key, reference)
        now[key] = reference
        if path is None or _there(key, reference, home):
            continue
        choice = (
            _candidates(path, places, beside) if os.path.isabs(path) else [os.path.join(each, path) for each in homes]
        )
        if (there := next(filter(os.path.exists, choice), None)) is not None:
            now[key] = with_path(key, reference, there)
        elif what is not None:
            places_tried = " nor ".join(dict.fromkeys(map(os.path.normpath, choice)))
            raise RequestError(
                f"the {NAMES[key]} of {what} is gone, there is neither {places_tried}: put it back at one of them."
                if len(choice) > 1
                else f"the {NAMES[key]} of {what} is gone, there is no {places_tried}: put it back."
            )
    return now, home


def _candidates(path: str, places: Mapping[str, str], beside: str | os.PathLike[str]) -> list[str]:
    """Where the absolute ``path`` of a record may be now, the likeliest first."""
    moved = [os.path.normpath(os.path.join(os.path.realpath(beside), places[path]))] if path in places else []
    return list(dict.fromkeys([*moved, path]))


def _there(key: str, reference: str, home: str) -> bool:
    """Whether what is named is there; a module that ``home`` does not hold may be installed."""
    path = path_of(key, reference)
    if path is not None:
        return os.path.exists(os.path.join(home, os.path.expanduser(path)))
    top = reference.partition(":")[0].partition(".")[0]
    if key == "data" or ":" not in reference or not top.isidentifier():
        return os.path.isdir(home)
    return os.path.isdir(os.path.join(home, top)) or os.path.isfile(os.path.join(home, f"{top}.py")) or _installed(top)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
