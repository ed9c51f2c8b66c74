"""What of a coordinate check is drawn: modules by groups, and the measurements furthest from what is expected."""

from __future__ import annotations

import math
import re

import pandas as pd

from mutransfer.reports.coordinate_panel import expected_range

__all__ = ["column_pairs", "ranked_rows"]

MOST_COLUMNS = 5
ALWAYS = ("activation", "change")  # the other statistics get a column where they do not hold
NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


def ranked_rows(slopes: pd.DataFrame) -> pd.DataFrame:
    """Return the slopes (schema SLOPES) with the ``group`` that each belongs to and its ``excess`` over what is expected."""
    outputs = set(slopes["module"][slopes["statistic"].isin(ALWAYS)])
    groups = [NUMBER.sub(r"\1*", _owner(name, outputs)) for name in slopes["module"]]
    excess = [_excess(row.slope, row.expected, row.ok) for row in slopes.itertuples()]
    return slopes.assign(group=groups, excess=excess)


def _owner(name: str, outputs: set[str]) -> str:
    """Return the module that a weight belongs to, if that module is measured as well; else the name itself."""
    module = name.removesuffix(".weight")
    return module if module in outputs else name


def _excess(slope: float, expected: str, ok: bool | None) -> float:
    """Return how far a slope lies from the middle of what is expected: outside the range, and failing, count much more."""
    low, high = expected_range(expected)
    fails = 0.0 if ok is pd.NA or ok else 1e6
    if math.isnan(slope) or math.isnan(low):
        return fails
    ends = [end for end in (low, high) if math.isfinite(end)]
    outside = max(low - slope, slope - high, 0.0)
    return fails + 100 * outside + (abs(slope - sum(ends) / 2) if len(ends) == 2 else 0.0)


def column_pairs(ranked: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the (statistic, step) pairs to draw: activations, first and last changes, then what holds least."""
    pairs = ranked.groupby(["statistic", "step"])["excess"].max()
    steps = {name: sorted(step for statistic, step in pairs.index if statistic == name) for name, _ in pairs.index}
    ends = [(name, end) for name in ALWAYS if name in steps for end in (steps[name][0], steps[name][-1])]
    holds = ranked["ok"].fillna(False).groupby([ranked["statistic"], ranked["step"]]).all()
    others = [pair for pair in pairs.sort_values(ascending=False).index if pair[0] in ALWAYS or not holds[pair]]
    chosen = list(dict.fromkeys([*ends, *others])) or list(pairs.index)
    order = {name: rank for rank, name in enumerate(ALWAYS)}
    return sorted(chosen[:MOST_COLUMNS], key=lambda pair: (order.get(pair[0], len(order)), pair))
