"""Wider is better: the loss at each width, with the learning rate carried over and with that width's own best one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mutransfer.errors import RequestError
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.style import colour, literal, log_loss, size_axis, styled
from mutransfer.reports.words import label, ordered, plain, regret
from mutransfer.schemas import BASINS, OPTIMA

__all__ = ["WiderFigure"]


@dataclass(frozen=True, eq=False)
class WiderFigure(ReportFigure):
    """Loss against width for each parametrization; the gap between its two lines is the regret of carrying over.

    ``basins`` and ``optima`` are frames of the schemas BASINS and OPTIMA. The means are those of ``optima``; the seeds'
    range at each width's own best learning rate comes from ``basins``.

    Raises:
        RequestError: a frame lacks a column, or there is no optimum.
    """

    basins: pd.DataFrame
    optima: pd.DataFrame
    maximize: bool = False
    title = "Wider is better"

    def __post_init__(self) -> None:
        object.__setattr__(self, "basins", BASINS.frame(self.basins))
        object.__setattr__(self, "optima", OPTIMA.frame(self.optima))
        if self.optima.empty:
            raise RequestError("the optima frame is empty, there is no curve to draw: run `mutransfer verify RUN`.")

    def frame(self) -> pd.DataFrame:
        """Return one row per parametrization, width and learning rate ("transferred", "own best"): loss, low, high.

        The interval is the regret's 95% one for "transferred", the seeds' range for "own best".
        """
        rows = []
        for best in self.optima.sort_values(["parametrization", "width"]).itertuples():
            key = {"parametrization": best.parametrization, "width": best.width}
            sign = -1 if self.maximize else 1
            ends = sorted(
                best.transferred_loss + sign * (end - best.regret) for end in (best.regret_low, best.regret_high)
            )
            rows.append({**key, "rate": "transferred", "loss": best.transferred_loss, "low": ends[0], "high": ends[1]})
            seeds = self._seeds_at_best(best.parametrization, best.width)
            rows.append({**key, "rate": "own best", "loss": best.best_loss, "low": seeds.min(), "high": seeds.max()})
        return pd.DataFrame(rows)

    @property
    def caption(self) -> str:
        """How to read the figure."""
        return (
            "Solid: trained with the learning rate carried over from the small proxy, with the 95% interval of its regret. "
            "Dashed: with that width's own best learning rate of the grid, the band from the best seed to the worst. The "
            "number is the regret, what not tuning again costs, in the loss's unit. Where the rule holds the two lines stay "
            "together and fall with width; × on the top edge means the runs at the carried-over learning rate diverged."
        )

    def draw(self) -> Figure:
        """Return the drawing."""
        frame = self.frame()
        frame.insert(2, "diverged", np.isinf(frame["loss"]))  # what is missing was not run, and is not drawn
        frame = frame.replace([np.inf, -np.inf], np.nan)
        with styled():
            figure = Figure(figsize=(6.4, 3.9), layout="constrained")
            axes = figure.subplots()
            log_loss(axes, frame["loss"], ratio=2.5)
            for name in ordered(list(self.optima["parametrization"])):
                rows = frame[frame["parametrization"] == name].set_index("width")
                _curve(axes, name, rows[rows["rate"] == "transferred"], rows[rows["rate"] == "own best"])
            self._regrets(axes)
            size_axis(axes, self.optima["width"])
            axes.margins(x=0.06, y=0.14)
            axes.set_xlabel("width")
            axes.set_ylabel("validation metric" if self.maximize else "validation loss")
            literal(figure.legend(loc="outside upper left", ncols=2, handlelength=3.2))
        return figure

    def _seeds_at_best(self, name: str, width: int) -> pd.Series:
        runs = self.basins[(self.basins["parametrization"] == name) & (self.basins["width"] == width)]
        whole = runs.groupby("log2_lr").filter(lambda group: group["loss"].notna().all())
        runs = whole if len(whole) else runs.dropna(subset="loss")
        means = runs.groupby("log2_lr")["loss"].mean()
        return (
            runs["loss"][runs["log2_lr"] == (-means if self.maximize else means).idxmin()]
            if len(runs)
            else runs["loss"]
        )

    def _regrets(self, axes: Axes) -> None:
        """Write each parametrization's regret right of its last point, higher ones above their point, lower ones below."""
        last = self.optima.sort_values("width").groupby("parametrization").tail(1)
        last = last[np.isfinite(last["transferred_loss"])]
        for rank, row in enumerate(last.sort_values("transferred_loss").itertuples()):
            words = f"{plain(label(row.parametrization), 14)}: regret\n{regret(row.regret, row.regret_low, row.regret_high)}"
            style: dict[str, Any] = {
                "ha": "left",
                "va": "bottom" if rank else "top",
                "parse_math": False,
                "fontsize": 8.5,
            }
            place = (row.width, row.transferred_loss)
            axes.annotate(words, place, (9, 0), textcoords="offset points", color=colour(row.parametrization), **style)


def _curve(axes: Axes, name: str, carried: pd.DataFrame, own: pd.DataFrame) -> None:
    """Draw a parametrization's two lines, and a cross on top where the carried-over learning rate has no loss."""
    hue, short = colour(name), plain(label(name), 16)
    axes.fill_between(own.index, own["low"], own["high"], color=hue, alpha=0.13, linewidth=0)
    axes.plot(own.index, own["loss"], "--", marker="D", markersize=3.5, color=hue, label=f"{short}, own best lr")
    errors = [(carried["loss"] - carried["low"]).clip(lower=0), (carried["high"] - carried["loss"]).clip(lower=0)]
    line: dict[str, Any] = {"marker": "o", "markersize": 5.5, "capsize": 3, "elinewidth": 1.0, "gid": "transferred"}
    axes.errorbar(carried.index, carried["loss"], yerr=errors, color=hue, label=f"{short}, transferred lr", **line)
    lost = carried.index[carried["diverged"]]
    axes.plot(lost, [0.97] * len(lost), "x", color=hue, markersize=7, transform=axes.get_xaxis_transform(), gid="lost")
