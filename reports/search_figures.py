"""Figures of a search: its history, slices, parallel coordinates and hyperparameter importances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from mutransfer.errors import FrameError
from mutransfer.reports.optuna_study import (
    as_losses,
    drawable,
    fence_of,
    hyperparameters,
    importances,
    is_lost,
    positions,
    search_space,
    study_of,
)
from mutransfer.reports.style import (
    GREY,
    INK,
    ORDER,
    ReportFigure,
    colour,
    counted,
    literal,
    log_loss,
    number,
    plain,
    power_of_ten,
    styled,
    value_axis,
)
from mutransfer.schemas import TRIALS

__all__ = ["HistoryFigure", "ImportanceFigure", "ParallelFigure", "SliceFigure"]

FINISHED = ("COMPLETE", "PRUNED", "FAIL")


@dataclass(frozen=True, eq=False)
class HistoryFigure(ReportFigure):
    """History of a search: the trials of a study (schema TRIALS) in the order of their numbers.

    Raises:
        FrameError: if the frame lacks a column, or no trial has finished.
    """

    trials: pd.DataFrame
    maximize: bool = False
    title = "Search history"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", TRIALS.frame(self.trials))
        if not self.trials["state"].isin(FINISHED).any():
            raise FrameError("no trial has finished yet: run `mutransfer tune EXPERIMENT.yaml` to continue the search.")

    def frame(self) -> pd.DataFrame:
        """Return the trials, one row each (schema TRIALS, followed by the hyperparameters)."""
        return self.trials.copy()

    @property
    def caption(self) -> str:
        """How to read the figure."""
        running = int((~self.trials["state"].isin(FINISHED)).sum())
        cut = int((self.trials["state"].eq("FAIL") & self.trials["steps"].isna()).sum())
        counts = {"not finished yet": running, "interrupted and retried": cut}
        hidden = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        left_out = f" Not drawn: {hidden}." if hidden else ""
        return (
            "Each mark is one trial on the proxy, placed at the total compute when it ended. The line is the best loss so far; "
            "the dotted line is the default recipe (trial 0), so the gap between the two is the gain of the search. "
            "Hollow triangles are pruned trials (stopped early, at their last loss); × along the top are trials that diverged or "
            "failed." + left_out
        )

    def draw(self) -> Figure:
        """Return the figure."""
        drawn = self.trials["state"].isin(FINISHED) & ~(self.trials["state"].eq("FAIL") & self.trials["steps"].isna())
        rows = self.trials[drawn].sort_values("number")
        # A failed trial may have no compute recorded; count it as 0, so that it does not affect where the others are drawn.
        rows = rows.assign(flops=rows["flops"].where(rows["state"].ne("FAIL"), rows["flops"].fillna(0.0)))
        compute = rows["flops"].notna().all() and rows["flops"].sum() > 0
        power = math.floor(math.log10(rows["flops"].sum())) if compute else 0
        rows = rows.assign(x=rows["flops"].cumsum() / 10**power if compute else rows["number"])
        bad = rows["diverged"].fillna(False) | rows["value"].isna() | rows["state"].eq("FAIL")
        full, pruned = rows[rows["state"].eq("COMPLETE") & ~bad], rows[rows["state"].eq("PRUNED") & ~bad]
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
            axes.plot(rows["x"][bad], [0.965] * bad.sum(), "x", label="diverged or failed", **top)
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
    """Set the y axis to cover all losses, with room at the top for the crosses."""
    if values.empty:
        return
    low, high = float(values.min()), float(values.max())
    if log_loss(axes, values):
        axes.set_ylim(low / (high / low) ** 0.14, high * (high / low) ** 0.14)
    else:
        span = high - low or abs(high) or 1.0
        axes.set_ylim(low - 0.14 * span, high + 0.14 * span)


def _best(axes: Axes, full: pd.DataFrame, end: float, maximize: bool) -> None:
    """Draw the best loss so far as a step function, and label the trial that reached it."""
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


MOST_PANELS = 8
HEADROOM = 0.1  # fraction of the height, reserved for the crosses


@dataclass(frozen=True, eq=False)
class _SearchFigure(ReportFigure):
    """Base class of the figures of the trials (schema TRIALS), which are drawn as losses also where the metric is maximized."""

    trials: pd.DataFrame
    maximize: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", as_losses(drawable(self.trials), self.maximize))

    def frame(self) -> pd.DataFrame:
        """Return the trials, one row each (schema TRIALS, followed by the hyperparameters)."""
        return as_losses(self.trials, self.maximize)


@dataclass(frozen=True, eq=False)
class SliceFigure(_SearchFigure):
    """Loss of the complete trials (schema TRIALS) against each hyperparameter, with diverged trials along the top.

    Raises:
        FrameError: if the frame lacks a column, or there are too few trials or hyperparameters to compare.
    """

    title = "Loss against each hyperparameter"

    @property
    def names(self) -> list[str]:
        """The hyperparameters that are drawn, in the order of the panels."""
        return sorted(hyperparameters(self.trials))[:MOST_PANELS]

    @property
    def caption(self) -> str:
        """How to read the figure, and what it leaves out."""
        pruned = int((self.trials["state"].eq("PRUNED") & ~is_lost(self.trials)).sum())
        text = (
            "Each dot is one complete trial, darker for later trials; the ring is the best. × along the top are trials that "
            "diverged or failed, at the value that they tried; triangles below them had a loss off the scale. All other "
            "hyperparameters vary as well, so look at the lower edge of the cloud: a minimum inside the range is an optimum, "
            "one at the end of the range calls for a wider range."
        )
        text += f" Not drawn: {counted(pruned, 'pruned trial')}." if pruned else ""
        hidden = len(hyperparameters(self.trials)) - len(self.names)
        return text + (f" In the CSV only: {counted(hidden, 'more hyperparameter')}." if hidden else "")

    def draw(self) -> Figure:
        """Return the figure."""
        bad = is_lost(self.trials)
        values = self.trials["value"].where(self.trials["state"].eq("COMPLETE") & ~bad)
        fence, count, space = fence_of(values), len(self.names), search_space(self.trials)
        order = self.trials["number"].sort_values().index  # later trials are drawn over earlier ones
        losses = values.where(values <= fence)[order]
        with styled():
            figure = Figure(figsize=(max(2.0 * count + 1.2, 5.6), 3.3), layout="constrained")
            panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
            for axes, name in zip(panels, self.names, strict=True):
                x = positions(self.trials, name)
                _value_axis(axes, name, space[name])
                shown = losses.notna() & x[order].notna()
                dots = axes.scatter(
                    x[order][shown], losses[shown], c=self.trials["number"][order][shown], cmap=ORDER, s=20,
                    edgecolor="white", linewidth=0.4, alpha=0.9, gid="complete",
                )  # fmt: skip
                dots.set_clim(*self.trials["number"][order][losses.notna()].agg(["min", "max"]))
                if not math.isnan(at := x[values.idxmin()]):
                    axes.plot([at], [values.min()], "o", markersize=10, mfc="none", color=INK, gid="best")
                _on_top(axes, x[bad], "x", 1 - 0.4 * HEADROOM, "lost")
                _on_top(axes, x[values > fence], "^", 1 - 0.9 * HEADROOM, "beyond")
            panels[0].set_ylabel("negated metric" if self.maximize else "validation loss")
            _height(panels[0], values[values <= fence])
            figure.colorbar(dots, ax=panels, label="trial")
        return figure


def _value_axis(axes: Axes, name: str, space: BaseDistribution) -> None:
    """Label the x axis of a panel: with the categories, or with numbers between the ends of the range."""
    axes.set_xlabel(plain(name, 22), parse_math=False)
    if isinstance(space, CategoricalDistribution):
        axes.set_xticks(range(len(space.choices)), [plain(str(choice), 12) for choice in space.choices])
        axes.set_xlim(-0.6, len(space.choices) - 0.4)
        literal(axes.get_xticklabels())
        return
    assert isinstance(space, FloatDistribution)
    low, high = space.low, space.high
    if space.log:
        axes.set_xscale("log")
        factor = (high / low) ** 0.05
        axes.set_xlim(low / factor, high * factor)
    else:
        pad = 0.05 * (high - low)
        axes.set_xlim(low - pad, high + pad)
    value_axis(axes.xaxis, low, high, powers=name == "lr")


def _on_top(axes: Axes, x: pd.Series, mark: str, height: float, gid: str) -> None:
    """Mark trials that cannot be drawn at their loss, at ``height`` (a fraction of the panel)."""
    at = x.dropna()
    style: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "color": colour("sp"), "markersize": 4.5}
    axes.plot(at, [height] * len(at), mark, mfc="none", gid=gid, **style)


def _height(axes: Axes, values: pd.Series) -> None:
    """Set the y axis to cover the losses that are shown, with room at the top for trials that cannot be drawn at theirs."""
    low, high = float(values.min()), float(values.max())
    if log_loss(axes, values, ratio=2.5):
        axes.set_ylim(low / (high / low) ** 0.07, high * (high / low) ** (0.04 + 1.3 * HEADROOM))
    else:
        span = high - low or abs(high) or 1.0
        axes.set_ylim(low - 0.07 * span, high + (0.04 + 1.3 * HEADROOM) * span)


MOST_AXES = 8
SHELF = 0.08  # height at which diverged trials are drawn above the shown losses, as a fraction of the loss axis


@dataclass(frozen=True, eq=False)
class ParallelFigure(_SearchFigure):
    """Parallel coordinates of the complete trials (schema TRIALS) and the diverged ones: one line per trial.

    Losses above Tukey's fence (the upper quartile plus 1.5 times the interquartile range) are drawn at the fence, because one
    bad trial would compress all others into a line. Diverged trials are drawn above the fence.

    Raises:
        FrameError: if the frame lacks a column, or fewer than two hyperparameters vary.
    """

    title = "All hyperparameters at once"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(hyperparameters(self.trials)) < 2:
            raise FrameError(
                "only one hyperparameter took more than one value, and parallel coordinates need at least two."
            )

    @property
    def names(self) -> list[str]:
        """The hyperparameters that are drawn, in the order of the axes."""
        return sorted(hyperparameters(self.trials))[:MOST_AXES]

    @property
    def clipped(self) -> tuple[pd.Series, float, int]:
        """The height at which each trial is drawn, the fence, and the number of finite losses above the fence."""
        bad = is_lost(self.trials)
        values = self.trials["value"].where(self.trials["state"].eq("COMPLETE") & ~bad)
        fence, low = fence_of(values), float(values.min())
        shelf = fence + SHELF * ((fence - low) or abs(fence) or 1.0)
        return values.clip(upper=fence).mask(bad, shelf), fence, int((values > fence).sum())

    @property
    def caption(self) -> str:
        """How to read the figure, and what it leaves out."""
        _, fence, beyond = self.clipped
        text = (
            "Each line is one trial, from its loss on the left through the values that it tried; darker lines have a lower loss. "
            "Where dark lines cross an axis in a bundle, that hyperparameter matters; where they spread over the whole axis, it "
            "does not."
        )
        if beyond:
            text += f" Drawn at the height of {number(fence)}: {counted(beyond, 'trial')} with a larger loss."
        if self.trials.loc[self.clipped[0].notna(), self.names].isna().any(axis=None):
            text += " A line that ends at “not set” is of a trial without that hyperparameter."
        if is_lost(self.trials).any():
            text += " Dashed lines from the top are trials that diverged or failed."
        hidden = len(hyperparameters(self.trials)) - len(self.names)
        return text + (f" In the CSV only: {counted(hidden, 'more hyperparameter')}." if hidden else "")

    def draw(self) -> Figure:
        """Return the figure."""
        heights, fence, beyond = self.clipped
        drawn = heights.sort_values(
            ascending=False, kind="stable"
        ).dropna()  # the best trials last, on top of the others
        trials, space = self.trials.loc[drawn.index], search_space(self.trials)
        bottom, top = float(drawn.min()), float(drawn.max())
        if bottom == top:
            bottom, top = bottom - (0.05 * abs(bottom) or 0.5), top + (0.05 * abs(top) or 0.5)
        with styled():
            figure = Figure(figsize=(max(1.35 * len(self.names) + 2.4, 6.4), 3.9), layout="constrained")
            main = figure.subplots()
            _frame(main, spine="left")
            main.set_xlim(0, len(self.names))
            main.set_ylim(bottom, top)
            shares = []
            for i, name in enumerate(self.names, 1):
                axes = main.twinx()
                _frame(axes, spine="right", at=i / len(self.names))
                shares.append(_share(axes, name, positions(self.trials, name)[drawn.index], space[name]))
            y = np.column_stack([drawn, *(bottom + (top - bottom) * share for share in shares)])
            x = np.arange(len(self.names) + 1)
            lines = LineCollection([np.column_stack([x, row]) for row in y], array=drawn.to_numpy())
            _restyle(lines, fence)
            main.add_collection(lines)
            main.set_xticks(x, ["−metric" if self.maximize else "loss", *(plain(name, 18) for name in self.names)])
            literal(main.get_xticklabels())
            ticks = [
                tick
                for tick in MaxNLocator(5).tick_values(bottom, fence)
                if bottom <= tick < fence - 0.06 * (fence - bottom)
            ]
            main.set_yticks(
                [*ticks, fence], [*map(number, ticks), ("≥\u00a0" if beyond else "") + number(float(f"{fence:.3g}"))]
            )
            bar = figure.colorbar(lines, ax=main, label="negated metric" if self.maximize else "validation loss")
            if drawn.min() < fence:
                bar.ax.set_ylim(float(drawn.min()), fence)
            if is_lost(trials).any():
                dashes = Line2D(
                    [], [], color=colour("sp"), linestyle=(0, (3, 2)), linewidth=1, label="diverged or failed"
                )
                figure.legend(handles=[dashes], loc="outside upper left")
        return figure


MISSING = 0.08  # height above the lower end of an axis at which its range begins if some trials have no value on it


def _frame(axes: Axes, spine: str, at: float = 0.0) -> None:
    """Show one spine of ``axes``, ``at`` a fraction of its width, and no grid."""
    axes.grid(visible=False)
    for side, line in axes.spines.items():
        line.set_visible(side == spine)
    if spine == "right":
        axes.spines["right"].set_position(("axes", at))
        axes.xaxis.set_visible(False)


def _share(axes: Axes, name: str, x: pd.Series, space: BaseDistribution) -> pd.Series:
    """Label a vertical axis of hyperparameter values, and return the height of each value, from 0 to 1."""
    start = MISSING if x.isna().any() else 0.0
    if isinstance(space, CategoricalDistribution):
        low, high, log = 0.0, len(space.choices) - 1.0, False
        axes.set_ylim(low - start / (1 - start) * (high - low), high)
        axes.set_yticks(range(len(space.choices)), [plain(str(choice), 14) for choice in space.choices])
        literal(axes.get_yticklabels())
    else:
        assert isinstance(space, FloatDistribution)
        low, high, log = space.low, space.high, space.log
        if log:
            axes.set_yscale("log")
            axes.set_ylim(low / (high / low) ** (start / (1 - start)), high)
        else:
            axes.set_ylim(low - start / (1 - start) * (high - low), high)
        value_axis(axes.yaxis, low, high, powers=name == "lr")
        if start and not log:
            axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])
    labels = axes.get_yticklabels()
    if start:
        at = axes.spines["right"].get_position()[1], 0.0
        away: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "va": "center",
            "fontsize": 8,
        }
        labels.append(axes.annotate("not set", at, (4, 0), **away))
    for label in labels:
        label.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.6})
    share = (np.log(x / low) / math.log(high / low)) if log else (x - low) / (high - low)
    return (start + (1 - start) * share).fillna(0.0)


def _restyle(lines: LineCollection, fence: float) -> None:
    """Colour the lines by loss, darker for lower, with a stronger best quarter; diverged trials are dashed in another colour."""
    starts = np.array([segment[0, 1] for segment in lines.get_segments()])
    bad = starts > fence
    best = starts <= np.quantile(starts[~bad], 0.25)
    crowd = min(1.0, 60 / len(starts))  # when there are many lines they have to be faint, or they hide each other
    shades = ORDER.reversed().with_extremes(over=colour("sp"))
    lines.set(cmap=shades, clim=(float(starts.min()), fence), gid="trials")
    lines.set_alpha(np.where(best, 0.6 + 0.3 * crowd, 0.25 + 0.5 * crowd).tolist())
    lines.set_linewidth(np.where(best, 1.4, 0.9).tolist())
    lines.set_linestyle([(0, (3, 2)) if dashed else "-" for dashed in bad])


FEWEST = 20  # minimum number of complete trials: the best tenth has to be more than one trial


@dataclass(frozen=True, eq=False)
class ImportanceFigure(_SearchFigure):
    """Importances of the hyperparameters among the trials (schema TRIALS) that ended with a loss.

    They are those of PED-ANOVA (2304.10255), as Optuna implements it (`optuna.importance`). It ignores diverged trials, so the
    caption gives their number.

    Raises:
        FrameError: if the frame lacks a column, or there are too few trials or hyperparameters to rank.
    """

    title = "Importance of the hyperparameters"

    def __post_init__(self) -> None:
        super().__post_init__()
        losses, count = self.trials["value"][self._complete], len(hyperparameters(self.trials))
        if len(losses) < FEWEST or count < 2 or losses.nunique() < 2:
            raise FrameError(
                f"{len(losses)} complete trials with {losses.nunique()} different losses over {count} hyperparameters are too "
                f"few for importances (at least {FEWEST}, 2 and 2): run `mutransfer tune EXPERIMENT.yaml` to continue the search."
            )

    @property
    def _complete(self) -> pd.Series:
        return self.trials["state"].eq("COMPLETE") & ~is_lost(self.trials)

    @property
    def caption(self) -> str:
        """How to read the figure."""
        bad = int(is_lost(self.trials).sum())
        return (
            "How much more concentrated a hyperparameter's values are among the best tenth of the trials than among all trials, "
            f"as a share of the sum (PED-ANOVA, Optuna's default), over {self._complete.sum()} complete trials"
            + (f"; {bad} that diverged or failed are left out, see the crosses above" if bad else "")
            + ". This is a guide to what to search next, not a measurement: with fewer than a hundred trials the order of "
            "neighbours is a matter of chance, and a hyperparameter whose whole range is good looks unimportant."
        )

    def draw(self) -> Figure:
        """Return the figure."""
        shares = importances(study_of(self.trials, self.trials["value"].where(self._complete)))
        with styled():
            figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(shares)), layout="constrained")
            axes = figure.subplots()
            bars = axes.barh(range(len(shares)), list(shares.values()), height=0.62, color=colour("mup"))
            labels = [f"{share:.0%}" if share >= 0.01 else "under 1%" for share in shares.values()]
            axes.bar_label(bars, labels, padding=4, fontsize=8.5)
            axes.set_yticks(range(len(shares)), [plain(name) for name in shares])
            literal(axes.get_yticklabels())
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel("share of the importance")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlim(0, 1.12 * max(shares.values()))
        return figure
