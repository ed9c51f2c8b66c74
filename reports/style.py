"""Base class and visual style of all figures: colours, the style file without global state, formats of numbers and names."""

from __future__ import annotations

import functools
import io
import math
import os
import re
import xml.etree.ElementTree as ET  # reads only what matplotlib has just written
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
    NullLocator,
)

from mutransfer.io import write_bytes

__all__ = [
    "DIVERGING",
    "GREY",
    "INK",
    "ORDER",
    "ReportFigure",
    "across",
    "colour",
    "counted",
    "inline",
    "interval",
    "label",
    "literal",
    "log_loss",
    "long_label",
    "lr_axis",
    "number",
    "octaves",
    "ordered",
    "percent",
    "plain",
    "power_of_ten",
    "power_of_two",
    "regret",
    "signed",
    "size_axis",
    "styled",
    "value_axis",
    "width_colours",
]

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
            if (engine := figure.get_layout_engine()) is not None:
                engine.execute(figure)
            # With "none", matplotlib keeps a placeholder, because of which each file is drawn twice.
            figure.set_layout_engine(None)
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


SHORT = {"mup": "µP", "sp": "SP", "ntk": "NTK", "completep": "CompleteP", "umup": "u-µP"}
LONG = {"mup": "maximal update parametrization", "sp": "standard parametrization"}
POWERS = str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹")


def label(parametrization: str) -> str:
    """Return the name that papers use for a parametrization ("mup" → "µP")."""
    return SHORT.get(parametrization, parametrization)


def long_label(parametrization: str) -> str:
    """Return the short name, followed by the long one if there is one."""
    return f"{label(parametrization)}, {LONG[parametrization]}" if parametrization in LONG else label(parametrization)


def ordered(parametrizations: list[str]) -> list[str]:
    """Return the distinct names, with the standard parametrization first so that the others are drawn to its right."""
    return sorted(dict.fromkeys(parametrizations), key=lambda name: name != "sp")


def signed(value: float, digits: int = 2) -> str:
    """Return "+0.50" or "−0.50", with a true minus; rounding to zero gives "0.00" without a sign."""
    text = f"{value:+.{digits}f}".replace("-", "−").replace("inf", "∞")
    return text[1:] if math.isfinite(value) and not float(text[1:]) else text


def interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """Return "+0.50 [+0.41, +0.60]", or the value alone if no interval is known; "–" if there is no value."""
    if not math.isfinite(value):
        return "–"
    if math.isnan(low) or math.isnan(high):
        return signed(value, digits)
    return f"{signed(value, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def percent(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Return a fraction and its interval as percentages."""
    text = interval(100 * value, 100 * low, 100 * high, 1)
    return text if text == "–" else text + "\u00a0%"


def regret(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Return a loss difference with its interval, in the unit of the loss; "diverged" if the difference is infinite."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "diverged"
    return number(value) + ("" if math.isnan(low) or math.isnan(high) else f" [{number(low)}, {number(high)}]")


def octaves(value: float, low: float, high: float) -> str:
    """Return a drift with its interval and unit."""
    return interval(value, low, high) + ("" if not math.isfinite(value) else "\u00a0octaves")


def number(value: object) -> str:
    """Return a count or a float with few digits, large and small ones as 3.1 × 10¹⁵; other values as plain text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}\u00a0×\u00a0{power_of_ten(int(exponent))}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)


def counted(count: int, what: str) -> str:
    """Return "1 trial" or "3 trials"."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def power_of_ten(exponent: int) -> str:
    """Return "10¹⁵"."""
    return f"10{str(exponent).translate(POWERS)}"


def power_of_two(exponent: float) -> str:
    """Return "2⁻⁷" or "2⁻⁶·⁹⁷"; "–" if there is no value."""
    return f"2{f'{round(exponent, 2):g}'.translate(POWERS)}" if math.isfinite(exponent) else "–"


def across(widths: list[int]) -> str:
    """Return "width 64 → 1024"."""
    return f"width {min(widths)} → {max(widths)}"


def plain(name: str, longest: int = 30) -> str:
    """Return a user's name in letters that any font has: others are escaped, and long names are shortened in the middle."""
    text = "".join(c if c.isprintable() else " " for c in name).encode("latin-1", "backslashreplace").decode("latin-1")
    head = longest * 2 // 5
    return text if len(text) <= longest else f"{text[:head]}…{text[head + 1 - longest :]}"


INK = "#1f2430"
GREY = "#7d8390"

# Okabe and Ito's palette: distinguishable with all common types of colour vision, with different lightness where it matters.
FIXED = {"mup": "#0072b2", "sp": "#d55e00", "completep": "#009e73", "ntk": "#cc79a7", "umup": "#56b4e9"}
OTHERS = ("#a6761d", "#5e3c99", "#44616b")

# Viridis without its yellow end, from light to dark: the order remains visible in greyscale.
ORDER = LinearSegmentedColormap.from_list("order", matplotlib.colormaps["viridis"]([0.84, 0.6, 0.4, 0.22, 0.05]))
# Blue below and orange above, both darker with the distance: greyscale shows only the distance, so write the sign as well.
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#084c7c", "#6aa9d6", "#f7f7f7", "#eda268", "#8a3a00"])


def styled() -> AbstractContextManager[None]:
    """Return a context in which matplotlib uses this package's style; the previous settings are restored on exit."""
    return matplotlib.style.context(Path(__file__).with_name("mutransfer.mplstyle"), after_reset=True)


def colour(parametrization: str) -> str:
    """Return the fixed colour of a parametrization; other names share a few colours, chosen by the sum of their letters."""
    return FIXED.get(parametrization) or OTHERS[sum(map(ord, parametrization)) % len(OTHERS)]


def width_colours(widths: Iterable[int]) -> dict[int, str]:
    """Return a colour per width, darker for wider: viridis without its yellow end, so that the order shows in greyscale."""
    ordered = sorted(set(widths))
    steps = max(len(ordered) - 1, 1)
    viridis = matplotlib.colormaps["viridis"]
    return {width: to_hex(viridis(0.80 - 0.75 * i / steps)) for i, width in enumerate(ordered)}


def lr_axis(axes: Axes, low: float, high: float) -> None:
    """Label an x axis of log2 learning rates with powers of two."""
    axes.xaxis.set_major_locator(MultipleLocator(1 if high - low <= 10 else 2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{value:g}}}$"))


def size_axis(axes: Axes, sizes: Iterable[int]) -> None:
    """Make the x axis logarithmic with a tick per measured width or depth; many ticks are thinned, keeping the largest."""
    ordered = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    stride = max(1, -(-len(ordered) // 6))
    shown = ordered[::-1][::stride][::-1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def value_axis(axis: Axis, low: float, high: float, powers: bool = False) -> None:
    """Label an axis of hyperparameter values; a log axis gets a few round numbers, or powers of two if ``powers``."""
    if axis.get_scale() != "log":
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.10g}"))))
        return
    octaves = math.log2(high / low)
    axis.set_minor_locator(NullLocator())
    if powers:
        exponents = np.arange(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)[:: max(1, round(octaves / 4))]
        axis.set_major_locator(FixedLocator([2.0**exponent for exponent in exponents]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{math.log2(value):.0f}}}$"))
        return
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if octaves < 3 else (1.0, 2.0, 5.0) if octaves < 7 else (1.0,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    axis.set_major_locator(FixedLocator(ticks[:: max(1, -(-len(ticks) // 4))]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(float(f"{value:.10g}"))))


def literal(labels: Legend | Iterable[Text]) -> None:
    """Turn off math parsing for the labels of a legend or an axis, because names may contain dollar signs."""
    for text in labels.get_texts() if isinstance(labels, Legend) else labels:
        text.set_parse_math(False)


def log_loss(axes: Axes, values: Iterable[float], ratio: float = 4.0) -> bool:
    """Make the y axis logarithmic if all ``values`` are positive and span more than ``ratio``; return whether it was done."""
    finite = [value for value in values if value == value]
    if not finite or min(finite) <= 0 or max(finite) / min(finite) <= ratio:
        return False
    axes.set_yscale("log")
    wide = max(finite) / min(finite) > 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 3.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True
