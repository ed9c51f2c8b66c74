"""Frames to figures, and a run folder to one self-contained HTML page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutransfer.reports.basins import BasinFigure as BasinFigure
    from mutransfer.reports.coordinates import CoordinateFigure as CoordinateFigure
    from mutransfer.reports.history import HistoryFigure as HistoryFigure
    from mutransfer.reports.importances import ImportanceFigure as ImportanceFigure
    from mutransfer.reports.page import write_report as write_report
    from mutransfer.reports.parallel import ParallelFigure as ParallelFigure
    from mutransfer.reports.planned import PlanFigure as PlanFigure
    from mutransfer.reports.slices import SliceFigure as SliceFigure
    from mutransfer.reports.wider import WiderFigure as WiderFigure

__all__ = [
    "BasinFigure",
    "CoordinateFigure",
    "HistoryFigure",
    "ImportanceFigure",
    "ParallelFigure",
    "PlanFigure",
    "SliceFigure",
    "WiderFigure",
    "write_report",
]

_HOMES = {
    "BasinFigure": "basins",
    "CoordinateFigure": "coordinates",
    "HistoryFigure": "history",
    "ImportanceFigure": "importances",
    "ParallelFigure": "parallel",
    "PlanFigure": "planned",
    "SliceFigure": "slices",
    "WiderFigure": "wider",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
