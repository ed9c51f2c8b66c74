"""Slopes of statistics on log scales with 95% confidence intervals, and ΔW·x relative to the input of its module."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from .measure import ROUNDING

__all__ = ["RELATIVE", "beyond", "relative_updates", "slope", "unit_of", "wide_and_narrow", "without_gradient"]


def slope(group: pd.DataFrame, axis: str) -> tuple[float, float, float]:
    """Return the fitted slope and the ends of its 95% confidence interval.

    All three are NaN if a value is not positive or not finite, or if all sizes are equal; the ends are infinite if there are no
    residual degrees of freedom. The fit is least squares over all seeds and sizes. Widths are weighted by width: the variance of
    a random network between seeds falls as 1/width (measured: docs/explanation/coordinate-check.md), so wide models are
    more informative. Depths have equal weights. Curvature of the true line counts as residual and widens the interval.

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
    """Return the rows of the larger and of the smaller half of the sizes; with an odd number, both contain the middle one."""
    sizes = np.sort(group[axis].unique())
    half = (len(sizes) + 1) // 2
    return group[group[axis] >= sizes[-half]], group[group[axis] <= sizes[half - 1]]


def beyond(value: float, band: tuple[float, float]) -> float:
    """Return how far a slope lies above (positive) or below (negative) its band; 0 inside."""
    return max(value - band[1], 0.0) + min(value - band[0], 0.0)


# Roles whose updates are divided by the size of the module's input. A vector's update does not act on the input, and a readout
# tied to an embedding receives its factor through the input.
RELATIVE = frozenset({"input", "hidden", "bottleneck", "attention", "feature"})
RESOLVED = 1e-5  # fraction of the module's output; a smaller difference of two float32 forward passes is rounding


def relative_updates(coordinates: pd.DataFrame, *roles: str) -> pd.DataFrame:
    """Return the rows of the statistic "update", with those of matrices divided by the size of their module's input.

    An update acts on the first pass's input, so it is divided by the size of that input, seed by seed. Updates of readouts and
    vectors are not divided, nor are those of embeddings, whose input is not floating-point. Uninformative rows are dropped: an
    input that is exactly 0, a parameter whose gradient is absent or rounding, and a change of the output below rounding.

    Args:
        coordinates: schema COORDINATES.
        roles: additional roles whose updates are divided.
    """
    updates = coordinates[coordinates["statistic"].eq("update")].copy()
    if updates.empty:
        return updates
    start = coordinates[coordinates["step"].eq(0)]
    key = ["parametrization", "module", "seed", "width", "depth"]
    entering = start[start["statistic"].eq("input")].set_index(key)["value"]
    produced = start[start["statistic"].eq("activation")].set_index(key)["value"]
    entering, produced = (each[~each.index.duplicated()] for each in (entering, produced))
    modules = set(start["module"][start["statistic"].isin(["input", "activation"])])
    names = {name: unit_of(name, modules) for name in updates["module"].unique()}
    index = pd.MultiIndex.from_frame(updates.assign(module=updates["module"].map(names))[key])
    size = entering.reindex(index).to_numpy(dtype=float)
    output = produced.reindex(index).to_numpy(dtype=float)
    relative = updates["role"].isin({*RELATIVE, *roles}).to_numpy() & ~pd.isna(size)
    moved = updates["value"].to_numpy(dtype=float)
    kept = ~(relative & (size == 0)) & ~(moved == 0) & ~(moved < RESOLVED * output)
    kept &= ~updates["module"].isin(without_gradient(coordinates)).to_numpy()
    updates.loc[relative, "value"] = moved[relative] / size[relative]
    return updates[kept]


def unit_of(parameter: str, modules: set[str]) -> str | None:
    """Return the module at which a parameter's update was measured: the innermost recorded module that contains it."""
    name = parameter
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return "(model)" if "(model)" in modules else None


def without_gradient(coordinates: pd.DataFrame) -> set[str]:
    """Return the parameters whose gradients are zero or rounding, from a frame with schema COORDINATES."""
    gradients = coordinates[coordinates["statistic"].eq("gradient")]
    if gradients.empty:
        return set()
    largest = gradients.groupby("module")["value"].max()
    return set(largest[largest < ROUNDING * largest.median()].index)
