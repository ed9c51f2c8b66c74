"""The coordinate check's verdict: are the slopes those of width-stable feature learning, and how sure is that?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import RequestError
from ..frames import SLOPES, varying
from ..optimizers.registry import OPTIMIZERS
from ..tables import HEALTHY, HEALTHY_DEPTH, TABLES, Band

__all__ = ["MARGIN", "Verdict", "verdict"]

MARGIN = 0.15  # finite width bends every slope a little; healthy and broken are 0.3 and more apart
Status = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What a coordinate check found.

    ``slopes`` has the columns of `frames.SLOPES`; ``cause`` says in a sentence what failed, or what is missing.
    """

    status: Status
    slopes: pd.DataFrame
    cause: str | None


def verdict(coordinates: pd.DataFrame, margin: float = MARGIN) -> Verdict:
    """Judge a coordinates frame of one parametrization against the slopes of width-stable feature learning.

    Per module, statistic and step, the slope of log2(value) against log2(width), or log2(depth) if that is what varies,
    is fitted over seeds and widths with a
    95% interval. It passes when the interval lies within the expected band widened by ``margin``, fails when it lies
    wholly outside, and is undecided otherwise. Changes are judged after the first and the last step.

    Raises:
        RequestError: two parametrizations in one frame, or fewer than two widths.
    """
    names = coordinates["parametrization"].unique()
    if len(names) != 1:
        raise RequestError(
            f"one verdict judges one parametrization, and the frame holds {sorted(names)}: filter it first."
        )
    axis = varying(coordinates)
    if coordinates[axis].nunique() < 2:
        raise RequestError("a slope needs at least two widths or depths: record more.")
    if axis == "depth" and coordinates["width"].nunique() > 1:
        raise RequestError("widths and depths both vary, and a slope is along one of them: record one at a time.")
    last = int(coordinates["step"].max())
    judged = coordinates[coordinates["step"].isin([0, 1, last])]
    column = OPTIMIZERS[str(judged["optimizer"].iloc[0])].column
    rows = []
    first_module = judged["module"].iloc[0]
    for (module, role, statistic, step), group in judged.groupby(["module", "role", "statistic", "step"], sort=False):
        slope, low, high = _slope(group, axis)
        expected = _healthy(axis, str(module), str(statistic), str(role))
        declared_role = "first" if role == "feature" and statistic == "change" and module == first_module else str(role)
        claims = TABLES[names[0]].declared if axis == "width" else {}
        declared = claims.get((column, str(statistic), declared_role), expected)
        rows.append(
            {
                "parametrization": names[0],
                "module": module,
                "role": role,
                "statistic": statistic,
                "step": step,
                "slope": slope,
                "low": low,
                "high": high,
                "expected": _words(expected),
                "declared": _words(declared),
                "ok": _judge(group, slope, low, high, expected, margin, may_rest=step < last),
            }
        )
    slopes = SLOPES.frame(rows)
    if (slopes["ok"] == False).any():  # noqa: E712 - a nullable column: missing is not False
        return Verdict("fail", slopes, _cause(slopes, axis))
    if slopes["ok"].isna().any():
        return Verdict("undecided", slopes, _undecided(slopes, coordinates, axis))
    return Verdict("pass", slopes, None)


def _healthy(axis: str, module: str, statistic: str, role: str) -> Band:
    if axis == "depth" and statistic == "change" and "first" in module.split("."):
        role = "first"
    return (HEALTHY if axis == "width" else HEALTHY_DEPTH)[statistic, role]


def _slope(group: pd.DataFrame, axis: str) -> tuple[float, float, float]:
    """Fitted slope with its 95% interval; NaN when a value is zero or not finite, infinite ends without a residual.

    Least squares over all seeds and widths, weighted by width: the fluctuations of a random network between seeds have a
    variance of 1/width (measured: docs/coordinate-check.md), so the wide models say more; depths count alike. Curvature
    of the true line counts as residual and widens the interval.
    """
    size, value = group[axis].to_numpy(dtype=float), group["value"].to_numpy(dtype=float)
    if not np.isfinite(value).all() or (value <= 0).any():
        return math.nan, math.nan, math.nan
    x, y, weight = np.log2(size), np.log2(value), size / size.mean() if axis == "width" else np.ones_like(size)
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    spread = weight @ (x * x)
    slope = float(weight @ (x * y) / spread)
    freedom = len(value) - 2
    if freedom < 1:
        return slope, -math.inf, math.inf
    error = math.sqrt(weight @ (y - slope * x) ** 2 / freedom / spread)
    half = float(stats.t.ppf(0.975, freedom)) * error
    return slope, slope - half, slope + half


def _judge(
    group: pd.DataFrame, slope: float, low: float, high: float, band: Band, margin: float, may_rest: bool
) -> bool | None:
    if not np.isfinite(group["value"]).all():
        return False
    if math.isnan(slope):
        # What is zero-initialized (a readout, LoRA's B) starts at zero, and such a readout lets no gradient through in the
        # first step; at the last one all must have moved.
        return True if (group["value"] == 0).all() and may_rest else None
    if band[0] - margin <= low and high <= band[1] + margin:
        return True
    return False if high < band[0] - margin or low > band[1] + margin else None


def _cause(slopes: pd.DataFrame, axis: str) -> str:
    failed = slopes[slopes["ok"] == False]  # noqa: E712
    modules = list(dict.fromkeys(failed["module"]))
    listed = ", ".join(modules[:6]) + (f" and {len(modules) - 6} more" if len(modules) > 6 else "")
    worst = failed.loc[failed["slope"].abs().fillna(math.inf).idxmax()]
    if math.isnan(worst["slope"]):
        return f"{worst['module']} is not finite or zero at some {axis}: lower --lr (fails in {listed})."
    what = f"the {worst['statistic']} of {worst['module']} goes as {axis}^{worst['slope']:+.2f}"
    if axis == "depth":
        why = (
            "its residual branches are not scaled with the depth" if worst["slope"] > 0 else "its layers stop learning"
        )
    elif worst["statistic"] == "change" and worst["slope"] > 0:
        # Logits also follow the features' change through the readout's initial weights.
        own = "does not" if worst["role"] == "feature" else "or initial weights do not"
        why = f"its learning rate {own} shrink with width"
    elif worst["statistic"] == "change":
        why = "its updates fade with width"
    elif worst["slope"] > 0:
        why = "its initial weights are not scaled with the fan-in, or a number in the forward pass grows with the width"
    else:
        why = "its initial weights, or what enters it, shrink too fast"
    return f"{what} where {worst['expected']} is healthy, so {why}; failing: {listed}."


def _undecided(slopes: pd.DataFrame, coordinates: pd.DataFrame, axis: str) -> str:
    modules = list(dict.fromkeys(slopes[slopes["ok"].isna()]["module"]))
    return (
        f"not enough evidence for {', '.join(modules[:6])}: add seeds (now {coordinates['seed'].nunique()}) or {axis}s "
        f"(now {coordinates[axis].nunique()})."
    )


def _words(band: Band) -> str:
    low, high = ("-inf" if math.isinf(end) else f"{end:g}" for end in band)
    return f"{low}..{high}"
