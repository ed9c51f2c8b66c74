"""What every figure offers: the frame it draws, the drawing, PNG bytes, and SVG text that can stand inside a page."""

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
    """A figure that is made of a frame, and hands that frame out again.

    ``title`` is the heading in a page, and what a screen reader says of the picture.
    """

    title: ClassVar[str]

    @abstractmethod
    def frame(self) -> pd.DataFrame:
        """Return a copy of the tidy frame that is drawn."""

    @abstractmethod
    def draw(self) -> Figure:
        """Return the drawing as a matplotlib figure that no global state knows of."""

    @property
    @abstractmethod
    def caption(self) -> str:
        """How to read the figure, in plain text."""

    def png(self) -> bytes:
        """Return the figure as PNG."""
        return self._saved("png", {"Software": None})

    def svg(self, prefix: str) -> str:
        """Return the figure as an ``<svg>`` element to stand in a page, every id starting with ``prefix``.

        Two figures of one page need two prefixes.
        """
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        return inline(self._saved("svg", empty).decode(), prefix, self.title)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figure as PNG, whole or not at all.

        Raises:
            RequestError: the disk is full or ``path`` cannot be written.
        """
        return write_bytes(path, self.png())

    def _saved(self, kind: str, metadata: dict[str, None]) -> bytes:
        buffer = io.BytesIO()
        with styled():  # the ids' salt and the fonts are read while saving
            self._laid_out.savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()

    @functools.cached_property
    def _laid_out(self) -> Figure:
        """The drawing with its layout computed once: that is most of the time of saving it as PNG and as SVG."""
        figure = self.draw()
        with styled():
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure


def inline(svg: str, prefix: str, title: str) -> str:
    """Return a stand-alone SVG as an element for HTML: no prolog, comments, metadata, style sheet or foreign id.

    Ids that something refers to become ``prefix-1``, ``prefix-2``, …; the others, names of groups, go.
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
    size = float(width)  # in points; scaled between what can still be read and what would be too large
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.get("viewBox", f"0 0 {width} {height}"),
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": title,
        # The first two are what matplotlib's style sheet says for every element.
        "style": f"stroke-linejoin: round; stroke-linecap: butt; min-width: {0.72 * size:.0f}px; max-width: {1.35 * size:.0f}px",
    }
    return ET.tostring(root, encoding="unicode")
