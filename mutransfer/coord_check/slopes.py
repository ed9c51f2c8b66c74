"""Slopes of a statistic on log scales with 95% intervals, and ΔW·x relative to the input of its module."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from .measure import ROUNDING

__all__ = ["RELATIVE", "beyond", "relative_updates", "slope", "unit_of", "wide_and_narrow", "without_gradient"]


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


# A vector's update does not act on what enters its module, and a readout tied to an embedding takes its factor in its input.
RELATIVE = frozenset({"input", "hidden", "bottleneck", "attention", "feature"})
RESOLVED = 1e-5  # of the module's output: a smaller difference of two forward passes in float32 is rounding


def relative_updates(coordinates: pd.DataFrame, *roles: str) -> pd.DataFrame:
    """Return the rows of the statistic "update", those of matrices divided by the size of what enters their module.

    An update acts on the first pass's input, so it is divided by that one, seed by seed. A readout's and a vector's stay as they
    are, and so does that of an embedding, whose input is not floating. Left out are rows that say nothing: an input
    that is exactly 0, a parameter without a gradient or with one of rounding, and a change of the output below rounding.

    Args:
        coordinates: schema COORDINATES.
        roles: further ones whose updates are divided.
    """
    updates = coordinates[coordinates["statistic"].eq("update")].copy()
    if updates.empty:
        return updates
    start = coordinates[coordinates["step"].eq(0)]
    key = ["parametrization", "module", "seed", "width", "depth"]
    given = start[start["statistic"].eq("input")].set_index(key)["value"]
    made = start[start["statistic"].eq("activation")].set_index(key)["value"]
    given, made = (each[~each.index.duplicated()] for each in (given, made))
    modules = set(start["module"][start["statistic"].isin(["input", "activation"])])
    names = {name: unit_of(name, modules) for name in updates["module"].unique()}
    index = pd.MultiIndex.from_frame(updates.assign(module=updates["module"].map(names))[key])
    size = given.reindex(index).to_numpy(dtype=float)
    output = made.reindex(index).to_numpy(dtype=float)
    relative = updates["role"].isin({*RELATIVE, *roles}).to_numpy() & ~pd.isna(size)
    moved = updates["value"].to_numpy(dtype=float)
    kept = ~(relative & (size == 0)) & ~(moved == 0) & ~(moved < RESOLVED * output)
    kept &= ~updates["module"].isin(without_gradient(coordinates)).to_numpy()
    updates.loc[relative, "value"] = moved[relative] / size[relative]
    return updates[kept]


def unit_of(parameter: str, modules: set[str]) -> str | None:
    """Return the module at which a parameter's update was measured: the innermost one around it that was recorded."""
    name = parameter
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return "(model)" if "(model)" in modules else None


def without_gradient(coordinates: pd.DataFrame) -> set[str]:
    """Return the parameters whose gradients are none, or rounding's (schema COORDINATES)."""
    gradients = coordinates[coordinates["statistic"].eq("gradient")]
    if gradients.empty:
        return set()
    largest = gradients.groupby("module")["value"].max()
    return set(largest[largest < ROUNDING * largest.median()].index)
