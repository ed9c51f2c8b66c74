"""Draw result frames as figures, and write the report of a run folder as one self-contained HTML page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutransfer.reports.coord_check_figure import CoordinateFigure as CoordinateFigure
    from mutransfer.reports.page import write_report as write_report
    from mutransfer.reports.search_figures import HistoryFigure as HistoryFigure
    from mutransfer.reports.search_figures import ImportanceFigure as ImportanceFigure
    from mutransfer.reports.search_figures import ParallelFigure as ParallelFigure
    from mutransfer.reports.search_figures import SliceFigure as SliceFigure
    from mutransfer.reports.transfer_figures import BasinFigure as BasinFigure
    from mutransfer.reports.transfer_figures import PlanFigure as PlanFigure
    from mutransfer.reports.transfer_figures import WiderFigure as WiderFigure

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
    "BasinFigure": "transfer_figures",
    "CoordinateFigure": "coord_check_figure",
    "HistoryFigure": "search_figures",
    "ImportanceFigure": "search_figures",
    "ParallelFigure": "search_figures",
    "PlanFigure": "transfer_figures",
    "SliceFigure": "search_figures",
    "WiderFigure": "transfer_figures",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
