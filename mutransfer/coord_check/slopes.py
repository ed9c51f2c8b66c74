"""The slope of a statistic against the width or the depth on log scales, with its 95% interval."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

__all__ = ["beyond", "slope", "wide_and_narrow"]


def slope(group: pd.DataFrame, axis: str) -> tuple[float, float, float]:
    """Return the fitted slope with its 95% interval; NaN when a value is zero or not finite, infinite ends without a residual.

    Least squares over all seeds and widths, weighted by width: the fluctuations of a random network between seeds have a
    variance of 1/width (measured: docs/coordinate-check.md), so the wide models say more; depths count alike. Curvature
    of the true line counts as residual and widens the interval.

    Args:
        group: rows of one module, statistic and step (schema COORDINATES).
        axis: the column of sizes, "width" or "depth".
    """
    size, value = group[axis].to_numpy(dtype=float), group["value"].to_numpy(dtype=float)
    if not np.isfinite(value).all() or (value <= 0).any():
        return math.nan, math.nan, math.nan
    x, y, weight = np.log2(size), np.log2(value), size / size.mean() if axis == "width" else np.ones_like(size)
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    spread = weight @ (x * x)
    if not spread > 0:
        return math.nan, math.nan, math.nan
    fitted = float(weight @ (x * y) / spread)
    freedom = len(value) - 2
    if freedom < 1:
        return fitted, -math.inf, math.inf
    error = math.sqrt(weight @ (y - fitted * x) ** 2 / freedom / spread)
    half = float(stats.t.ppf(0.975, freedom)) * error
    return fitted, fitted - half, fitted + half


def wide_and_narrow(group: pd.DataFrame, axis: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of the greater half of the sizes, and those of the smaller half; of an odd number both hold the middle."""
    sizes = np.sort(group[axis].unique())
    half = (len(sizes) + 1) // 2
    return group[group[axis] >= sizes[-half]], group[group[axis] <= sizes[half - 1]]


def beyond(value: float, band: tuple[float, float]) -> float:
    """Return how far a slope is above (positive) or below (negative) its band; 0 inside."""
    return max(value - band[1], 0.0) + min(value - band[0], 0.0)
