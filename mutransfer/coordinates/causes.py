"""What is likely wrong: the slopes of a failed check against the signature of every known fault."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ..names import pattern_of
from ..optimizers.registry import OPTIMIZERS
from .faults import FAULTS, ROLES, Fault, Signature
from .slopes import slope

__all__ = ["column_of", "local_slopes", "nearest_fault", "pattern"]

NEAR = 0.35  # root mean square distance beyond which no signature fits


def nearest_fault(coordinates: pd.DataFrame) -> Fault | None:
    """Return the fault whose signature lies nearest to the slopes, or None when health does, or nothing near.

    Needs the statistics "input" and "update" or "weight" of a check over widths; without them nothing is named.
    """
    column = column_of(coordinates)
    found = local_slopes(coordinates)
    if not any(statistic == "update" for statistic, _ in found):
        return None
    candidates: dict[Fault | None, Signature] = {fault: fault.signature(column) for fault in FAULTS.values()}
    candidates[None] = dict.fromkeys(next(iter(candidates.values())), 0.0)
    distances = {fault: _distance(found, signature) for fault, signature in candidates.items()}
    best = min(distances, key=lambda fault: distances[fault])
    return best if distances[best] <= NEAR else None


def local_slopes(coordinates: pd.DataFrame) -> Signature:
    """Return, by role, the median slope beyond µP's of what a module adds by itself (`faults.Fault.signature`)."""
    statistic, step = coordinates["statistic"], coordinates["step"]
    wanted = statistic.isin(["weight", "activation", "input", "decay"]) & step.eq(0)
    wanted |= statistic.eq("update") & step.isin([1, coordinates["step"].max()])
    keys = ["module", "role", "statistic", "step"]
    groups = coordinates[coordinates["role"].isin(ROLES) & wanted].groupby(keys, sort=False)
    slopes = {key: slope(group, "width")[0] for key, group in groups}
    found: dict[tuple[str, str], list[float]] = {}
    for (module, role, statistic, step), value in slopes.items():
        # What enters an embedding is not floating and has no size.
        given = slopes.get((module, role, "input", 0), 0.0)
        if statistic in ("weight", "decay"):
            found.setdefault((statistic, role), []).append(value)
        elif statistic == "activation":
            found.setdefault(("gain", role), []).append(value - given)
        elif statistic == "update":
            # In the first step a readout that starts at zero lets no gradient through.
            at_once = not math.isnan(slopes.get((module, role, "update", 1), math.nan))
            if at_once == (step == 1):
                found.setdefault(("update", role), []).append(value - given)
    return {
        key: float(np.nanmedian(values))
        for key, values in found.items()
        if key[1] in ROLES and not np.isnan(values).all()
    }


def column_of(coordinates: pd.DataFrame) -> str:
    """Return the tables' column of the optimizer that a frame was recorded with."""
    return OPTIMIZERS[str(coordinates["optimizer"].iloc[0])].column


def pattern(modules: list[str]) -> str:
    """Return modules as their patterns, layer numbers as a star, each once."""
    found = list(dict.fromkeys(map(pattern_of, modules)))
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def _distance(found: Signature, signature: Signature) -> float:
    gaps = [found[key] - expected for key, expected in signature.items() if key in found and not math.isnan(expected)]
    return math.sqrt(sum(gap * gap for gap in gaps) / len(gaps)) if gaps else math.inf
