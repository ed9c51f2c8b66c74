"""The Python standard library's own source as a corpus of bytes: real text that is on every machine."""

from __future__ import annotations

import hashlib
import platform
import sysconfig

from mutransfer.errors import RequestError

from .reading import existing, read_tree, row, tree_sha256
from .tokens import Tokens, require_tokens

__all__ = ["load"]

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def load(sequence_length: int, root: str | None = None) -> Tokens:
    """Load the ``*.py`` files of the running Python, without its tests and without installed packages.

    One file in ten, chosen by its relative path, is held out whole. The content differs between Python versions;
    so does the hash.

    Args:
        sequence_length: T, tokens (bytes) per sequence.
        root: another folder of Python source than the running Python's.

    Raises:
        RequestError: there is no source on this machine (some embedded Pythons), or too little of it.
    """
    folder = existing(root or sysconfig.get_paths()["stdlib"], "a folder of Python source")
    files = read_tree(folder, _skipped, _is_source)
    if not files:
        raise RequestError(f"{folder} holds no Python source files: give your own text as text:PATH.")
    held_out = {path: content for path, content in files.items() if _is_held_out(path)}
    training_bytes = row(content for path, content in files.items() if path not in held_out)
    held_out_bytes = row(held_out.values())
    require_tokens(folder, training_bytes, held_out_bytes, sequence_length)
    return Tokens(
        name="bytes",
        sha256=tree_sha256(files),
        facts={
            "python": platform.python_version(),
            "path": str(folder),
            "training_files": len(files) - len(held_out),
            "held_out_files": len(held_out),
            "training_tokens": len(training_bytes),
            "held_out_tokens": len(held_out_bytes),
        },
        inputs=256,
        classes=256,
        kind="tokens",
        training=training_bytes,
        held_out=held_out_bytes,
        sequence_length=sequence_length,
    )


def _skipped(folder: str) -> bool:
    return folder in SKIPPED or folder.startswith("config-")  # config-3.x-PLATFORM is generated where Python was built


def _is_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith("_sysconfigdata")  # generated too: the hash would differ


def _is_held_out(path: str) -> bool:
    # By the path and not by position, so that a file keeps its side when another Python version adds files.
    return hashlib.sha256(path.encode(errors="surrogateescape")).digest()[0] < 26
