"""Base class of all figures: the frame that is drawn, the figure, PNG bytes, and SVG text to embed in a page."""

from __future__ import annotations

import functools
import io
import os
import re
import xml.etree.ElementTree as ET  # reads only what matplotlib has just written
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import pandas as pd
from matplotlib.figure import Figure

from mutransfer.io import write_bytes
from mutransfer.reports.style import styled

__all__ = ["ReportFigure", "inline"]

REFERENCE = re.compile(r"url\(#([^)]+)\)")


class ReportFigure(ABC):
    """Base class of a figure that is drawn from a frame and makes the frame available.

    ``title`` is the heading in a page, and the label for screen readers.
    """

    title: ClassVar[str]

    @abstractmethod
    def frame(self) -> pd.DataFrame:
        """Return a copy of the tidy frame that the figure is drawn from."""

    @abstractmethod
    def draw(self) -> Figure:
        """Return a matplotlib figure that is not registered in any global state."""

    @property
    @abstractmethod
    def caption(self) -> str:
        """How to read the figure, in plain text."""

    def png(self) -> bytes:
        """Return the figure as PNG."""
        return self._saved("png", {"Software": None})

    def svg(self, prefix: str) -> str:
        """Return the figure as an ``<svg>`` element to embed in a page, with ids that start with ``prefix``.

        Figures in the same page need different prefixes.
        """
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        return inline(self._saved("svg", empty).decode(), prefix, self.title)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figure as a PNG file, atomically, and return its path.

        Raises:
            RequestError: if the disk is full or ``path`` cannot be written.
        """
        return write_bytes(path, self.png())

    def _saved(self, kind: str, metadata: dict[str, None]) -> bytes:
        buffer = io.BytesIO()
        with styled():  # the salt of the ids and the fonts are read while saving
            self._laid_out.savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()

    @functools.cached_property
    def _laid_out(self) -> Figure:
        """The figure with its layout computed once, because layout takes most of the time of saving as PNG and as SVG."""
        figure = self.draw()
        with styled():
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure


def inline(svg: str, prefix: str, title: str) -> str:
    """Return a stand-alone SVG as an element for HTML, without prolog, comments, metadata or style sheet.

    Ids that are referenced become ``prefix-1``, ``prefix-2``, …; all others (the names of groups) are removed.
    """
    root = ET.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.attrib = {key.split("}")[-1]: value for key, value in element.attrib.items()}
    used: dict[str, str] = {}
    for element in root.iter():
        for key, value in element.attrib.items():
            targets = REFERENCE.findall(value) + ([value[1:]] if key == "href" and value.startswith("#") else [])
            for target in targets:
                used.setdefault(target, f"{prefix}-{len(used) + 1}")
    for element in root.iter():
        if "id" in element.attrib and element.attrib["id"] not in used:
            del element.attrib["id"]
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, used[value])
            elif key == "href" and value.startswith("#"):
                element.set(key, f"#{used[value[1:]]}")
            elif "url(#" in value:
                element.set(key, REFERENCE.sub(lambda match: f"url(#{used[match[1]]})", value))
    width, height = (root.get(side, "0").removesuffix("pt") for side in ("width", "height"))
    size = float(width)  # in points; min-width keeps the figure readable, max-width keeps it from becoming too large
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.get("viewBox", f"0 0 {width} {height}"),
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": title,
        # The first two are what matplotlib's style sheet, removed above, sets for every element.
        "style": f"stroke-linejoin: round; stroke-linecap: butt; min-width: {0.72 * size:.0f}px; max-width: {1.35 * size:.0f}px",
    }
    return ET.tostring(root, encoding="unicode")
