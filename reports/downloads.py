"""The data of a report inside its page: every frame and file as a ``data:`` link, as long as the page stays light."""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass

__all__ = ["BUDGET", "Download", "download", "downloads"]

LARGEST_PLAIN = 200_000
BUDGET = 1_400_000  # characters of all links together: a page of 3 MB has to hold the figures and tables as well
KINDS = {"csv": "text/csv;charset=utf-8", "json": "application/json", "yaml": "text/yaml;charset=utf-8"}


@dataclass(frozen=True)
class Download:
    """A file's name and the ``data:`` URI that holds it; an empty one for a file too large for the page."""

    name: str
    uri: str


def download(name: str, content: str) -> Download:
    """Return ``content`` as a link; a long one is compressed, and its name says so."""
    raw, kind = content.encode(), KINDS[name.rpartition(".")[2]]
    if len(raw) > LARGEST_PLAIN:
        raw, name, kind = gzip.compress(raw, mtime=0), f"{name}.gz", "application/gzip"
    return Download(name, f"data:{kind};base64,{base64.b64encode(raw).decode()}")


def downloads(files: dict[str, str], budget: int = BUDGET) -> list[Download]:
    """Return a link per file (name → content) in the order given, the small ones first to get a place in the page.

    A file that does not fit any more has an empty link: it lies in the run folder.
    """
    made = {name: download(name, content) for name, content in files.items()}
    for name in sorted(made, key=lambda name: len(made[name].uri)):
        budget -= len(made[name].uri)
        if budget < 0:
            made[name] = Download(name, "")
    return list(made.values())
