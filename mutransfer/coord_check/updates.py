"""Every parameter's own update against what it acts on: the share of a module's input that ΔW turns into output."""

from __future__ import annotations

import pandas as pd

from .measure import ROUNDING

__all__ = ["RELATIVE", "relative_updates", "unit_of", "without_gradient"]

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
