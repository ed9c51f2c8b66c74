"""Optuna's own matplotlib plots, drawn on a figure of ours: no pyplot, no global style, no window."""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import matplotlib
import optuna
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["plotted"]

# Where each plot finds its `plt`.
HOMES = {
    "plot_slice": "optuna.visualization.matplotlib._slice",
    "plot_param_importances": "optuna.visualization.matplotlib._param_importances",
    "plot_parallel_coordinate": "optuna.visualization.matplotlib._parallel_coordinate",
}
_LOCK = threading.Lock()


class _Pyplot:
    """The little of pyplot that Optuna's plots use.

    pyplot itself would choose a backend for the whole process (a window system's, where there is one) and keep every
    figure; and the plots would set the style "ggplot" for everything drawn afterwards.
    """

    def __init__(self) -> None:
        self.style = SimpleNamespace(use=lambda name: None)
        self.figure = Figure()

    def subplots(self, *shape: int, figsize: Any = None, **options: Any) -> tuple[Figure, Any]:
        self.figure = Figure(figsize=figsize, layout="constrained")
        FigureCanvasAgg(self.figure)  # bar labels are measured while they are drawn
        return self.figure, self.figure.subplots(*shape, **options)

    def get_cmap(self, name: str) -> Any:
        return matplotlib.colormaps[name]

    def xticks(self, ticks: Sequence[float], labels: Sequence[str], **style: Any) -> None:
        self.figure.axes[0].set_xticks(ticks, labels, **style)


def plotted(name: str, study: optuna.Study, **options: Any) -> Figure:
    """Return what ``optuna.visualization.matplotlib``'s function ``name`` draws of ``study``, on a figure of its own."""
    with _on(_Pyplot(), HOMES[name]) as pyplot, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        getattr(optuna.visualization.matplotlib, name)(study, **options)
    return pyplot.figure


@contextlib.contextmanager
def _on(pyplot: _Pyplot, home: str) -> Iterator[_Pyplot]:
    """Let one of Optuna's modules draw on ``pyplot``, one thread at a time."""
    module: Any = importlib.import_module(home)
    with _LOCK:
        theirs, module.plt = module.plt, pyplot
        try:
            yield pyplot
        finally:
            module.plt = theirs
