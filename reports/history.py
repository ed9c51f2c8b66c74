"""The search as it went: every trial's loss against the compute spent so far, and the best one yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mutransfer.errors import RequestError
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.style import GREY, INK, colour, log_loss, styled
from mutransfer.reports.words import number, power_of_ten
from mutransfer.schemas import TRIALS

__all__ = ["HistoryFigure"]

FINISHED = ("COMPLETE", "PRUNED", "FAIL")


@dataclass(frozen=True, eq=False)
class HistoryFigure(ReportFigure):
    """Trials of a study (schema TRIALS) in the order of their numbers.

    Raises:
        RequestError: the frame lacks a column, or no trial has finished.
    """

    trials: pd.DataFrame
    maximize: bool = False
    title = "Search history"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", TRIALS.frame(self.trials))
        if not self.trials["state"].isin(FINISHED).any():
            raise RequestError("no trial has finished yet: run `mutransfer tune EXPERIMENT.yaml` on.")

    def frame(self) -> pd.DataFrame:
        """Return the trials: one row each (schema TRIALS, hyperparameters behind)."""
        return self.trials.copy()

    @property
    def caption(self) -> str:
        """How to read the figure."""
        running = int((~self.trials["state"].isin(FINISHED)).sum())
        cut = int((self.trials["state"].eq("FAIL") & self.trials["steps"].isna()).sum())
        counts = {"not finished yet": running, "interrupted and done again": cut}
        said = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        left_out = f" Not drawn: {said}." if said else ""
        return (
            "Each mark is one trial on the proxy, placed where its compute ends. The line is the best loss so far; the "
            "dotted line is the default recipe (trial 0), so the gap between the two is what the search has gained. "
            "Hollow triangles were pruned (stopped early, at their last loss), × along the top diverged or failed."
            + left_out
        )

    def draw(self) -> Figure:
        """Return the drawing."""
        there = self.trials["state"].isin(FINISHED) & ~(self.trials["state"].eq("FAIL") & self.trials["steps"].isna())
        rows = self.trials[there].sort_values("number")
        # An interrupted trial has failed and noted no compute; the others' places do not depend on it.
        rows = rows.assign(flops=rows["flops"].where(rows["state"].ne("FAIL"), rows["flops"].fillna(0.0)))
        compute = rows["flops"].notna().all() and rows["flops"].sum() > 0
        power = math.floor(math.log10(rows["flops"].sum())) if compute else 0
        rows = rows.assign(x=rows["flops"].cumsum() / 10**power if compute else rows["number"])
        lost = rows["diverged"].fillna(False) | rows["value"].isna() | rows["state"].eq("FAIL")
        full, pruned = rows[rows["state"].eq("COMPLETE") & ~lost], rows[rows["state"].eq("PRUNED") & ~lost]
        with styled():
            figure = Figure(figsize=(7.6, 3.5), layout="constrained")
            axes = figure.subplots()
            _scale(axes, rows["value"].dropna())
            hue = colour("mup")
            quiet: dict[str, Any] = {"linestyle": "", "markersize": 5, "alpha": 0.75}
            axes.plot(full["x"], full["value"], marker="o", color=hue, label="finished", gid="finished", **quiet)
            axes.plot(
                pruned["x"], pruned["value"], marker="v", mfc="none", color=GREY, label="pruned", gid="pruned", **quiet
            )
            top: dict[str, Any] = {
                "transform": axes.get_xaxis_transform(),
                "color": colour("sp"),
                "gid": "lost",
                "markersize": 5,
            }
            axes.plot(rows["x"][lost], [0.965] * lost.sum(), "x", label="diverged or failed", **top)
            if len(full):
                _best(axes, full, float(rows["x"].max()), self.maximize)
            default = full[full["number"] == 0]
            if len(default):
                axes.axhline(
                    default["value"].iloc[0], color=INK, linestyle=":", linewidth=1.3, label="default recipe (trial 0)"
                )
            axes.set_ylabel("validation metric" if self.maximize else "validation loss")
            axes.set_xlabel(
                f"compute spent so far ({power_of_ten(power)} floating point operations)" if compute else "trial"
            )
            axes.margins(x=0.02)
            figure.legend(loc="outside upper left", ncols=5, handlelength=1.6, columnspacing=1.2)
        return figure


def _scale(axes: Axes, values: pd.Series) -> None:
    """Set the y axis around all losses, with room on top for the crosses."""
    if values.empty:
        return
    low, high = float(values.min()), float(values.max())
    if log_loss(axes, values):
        axes.set_ylim(low / (high / low) ** 0.14, high * (high / low) ** 0.14)
    else:
        span = high - low or abs(high) or 1.0
        axes.set_ylim(low - 0.14 * span, high + 0.14 * span)


def _best(axes: Axes, full: pd.DataFrame, end: float, maximize: bool) -> None:
    """Draw the best loss so far as steps, and name the trial that reached it."""
    best = full["value"].cummax() if maximize else full["value"].cummin()
    x, y = [*full["x"], end], [*best, best.iloc[-1]]
    axes.step(x, y, where="post", color=INK, linewidth=1.8, label="best so far", gid="best")
    winner = full.loc[full["value"].idxmax() if maximize else full["value"].idxmin()]
    text = f"trial {winner['number']}: {number(float(winner['value']))}"
    axes.plot(winner["x"], winner["value"], "o", markersize=10, mfc="none", color=INK)
    side = "right" if winner["x"] > 0.6 * end else "left"
    axes.annotate(
        text, (winner["x"], winner["value"]), (0, -10), textcoords="offset points", ha=side, va="top", fontsize=8.5
    )
