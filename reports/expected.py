"""What loss the target should reach, as far as the losses at smaller widths can tell, and what that assumes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mutransfer.reports.words import number

__all__ = ["Expected", "expected_loss"]

FEWEST_WIDTHS = 3  # two give one pace, and no sign whether it holds


@dataclass(frozen=True)
class Expected:
    """A validation loss with the interval for one run; all NaN where it cannot be told. ``words`` say how or why not."""

    loss: float
    low: float
    high: float
    words: str

    @property
    def known(self) -> bool:
        """Whether there is a number at all."""
        return math.isfinite(self.loss)


def expected_loss(basins: pd.DataFrame, transferred: float, target: dict[str, Any]) -> Expected:
    """Return the loss to expect of ``target`` (target.json) from the runs at the transferred learning rate.

    A measured width needs no model. Beyond the widest one the loss is taken to fall on at the pace of the last two widths;
    the low end takes the best pace between any two neighbours, the high end no gain at all, and each is moved out by the
    95% interval of a single run over seeds. The paces are powers of the width, and their error grows with the distance.
    Nothing is told when the target also changes depth, batch or duration: widths hold no evidence for that.

    Args:
        basins: runs (schema BASINS); those of the target's parametrization at ``transferred`` count.
        transferred: log2 of the learning rate that is carried over.
        target: a target config as JSON data.
    """
    width = target["scale"]["width"]
    mine = basins[(basins["parametrization"] == target["parametrization"]) & np.isclose(basins["log2_lr"], transferred)]
    if reason := _incomparable(target, mine) or _unusable(mine, width):
        return _unknown(reason)
    logs = {int(size): np.log(rows["loss"].to_numpy(float)) for size, rows in mine.groupby("width")}
    spread, freedom = _seed_spread(logs)
    if width in logs:
        losses = np.exp(logs[width])
        middle, count = math.log(losses.mean()), len(losses)  # the mean that every table shows
        half = _half(freedom) * spread * math.sqrt(1 + 1 / count)
        return _of(
            middle,
            middle - half,
            middle + half,
            f"the mean of {count} seeds measured at this width, with the 95% interval of one more run on a new seed: wider than "
            "the interval of the mean",
        )
    return _beyond(logs, width, spread, freedom)


def _beyond(logs: dict[int, np.ndarray], width: int, spread: float, freedom: int) -> Expected:
    """Continue from the widest measured width; losses are natural logarithms."""
    sizes = list(logs)
    widest, count = sizes[-1], min(map(len, logs.values()))
    start, ahead = float(logs[widest].mean()), math.log(width / widest)
    ends = []
    for small, large in itertools.pairwise(sizes):
        step = math.log(large / small)
        pace = float(logs[large].mean() - logs[small].mean()) / step
        # The widest mean's error enters twice: where the line starts, and how steep it is.
        error = spread * math.sqrt(1 + (1 + ahead / step) ** 2 / count + (ahead / step) ** 2 / count)
        ends.append((start + pace * ahead, start + pace * ahead - _half(freedom) * error))
    middle, last = ends[-1][0], sizes[-2]
    if middle >= start:
        return _unknown(f"the loss does not fall from width {last} to {widest}, so no pace can be continued")
    low, high = min(end for _, end in ends), start + _half(freedom) * spread * math.sqrt(1 + 1 / count)
    return _of(
        middle,
        low,
        high,
        f"if the pace from width {last} to {widest} goes on to {width}, a factor of {number(width / widest)} beyond what was "
        f"measured. Low end: the best pace between any two widths goes on; high end: nothing is gained beyond {widest}; each "
        "with the 95% interval of one run on a new seed. Assumes that gains do not speed up with width",
    )


def _incomparable(target: dict[str, Any], mine: pd.DataFrame) -> str:
    """Return what else than the width differs between the target and the measured runs, if anything."""
    if mine.empty:
        return "no run of the target's parametrization at the transferred learning rate"
    proxy = target.get("provenance", {}).get("proxy", {})
    depths = set(mine["depth"])
    changes = {
        "depth": (target["scale"].get("depth"), depths.pop() if len(depths) == 1 else None),
        "batch": (target.get("batch_size"), proxy.get("batch")),
        "duration": (target.get("steps"), proxy.get("steps")),
    }
    changed = [name for name, (wanted, measured) in changes.items() if wanted != measured]
    return (
        f"the target's {' and '.join(changed)} differ from the measured runs', which only vary the width"
        if changed
        else ""
    )


def _unusable(mine: pd.DataFrame, width: int) -> str:
    """Return why the runs at the transferred learning rate say nothing about ``width``, if they do not."""
    counts = mine.groupby("width").size()
    if mine["loss"].isna().any() or mine["diverged"].fillna(False).any():
        return "a run at the transferred learning rate diverged"
    if counts.min() < 2:
        return "one seed tells no interval: add `--seeds`"
    if (mine["loss"] <= 0).any():
        return "a loss is not positive, so it is no power of the width"
    if width in counts.index:
        return ""
    if width < counts.index.max():
        return f"width {width} lies between those measured: add it to `mutransfer verify --widths`"
    enough = len(counts) >= FEWEST_WIDTHS
    return "" if enough else f"not enough widths ({len(counts)}, at least {FEWEST_WIDTHS}): add `--widths`"


def _seed_spread(logs: dict[int, np.ndarray]) -> tuple[float, int]:
    """Return the standard deviation between seeds, pooled over widths, and its degrees of freedom."""
    freedom = sum(len(values) - 1 for values in logs.values())
    return math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in logs.values()) / freedom), freedom


def _half(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def _of(middle: float, low: float, high: float, words: str) -> Expected:
    return Expected(math.exp(middle), math.exp(low), math.exp(high), words)


def _unknown(words: str) -> Expected:
    return Expected(math.nan, math.nan, math.nan, words)
