"""What is likely wrong: the slopes of a failed check against the signature of every known fault."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ..names import pattern_of
from ..optimizers.registry import OPTIMIZERS
from .faults import FAULTS, ROLES, Fault, Signature
from .slopes import beyond, slope
from .updates import relative_updates

__all__ = ["column_of", "few_parameters", "listed", "local_slopes", "nearest_fault", "pattern"]

OFF = 0.25  # beyond its band by more: a parameter is off; faults are powers of 1/2 and more
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
    for fault, signature in candidates.items():
        if not _possible(found, signature):
            distances[fault] = math.inf
    best = min(distances, key=lambda fault: distances[fault])
    return best if distances[best] <= NEAR else None


def few_parameters(slopes: pd.DataFrame, fault: Fault | None) -> tuple[list[str], str, float] | None:
    """Return the parameters that are off while others of their role are not: names, statistic, median slope beyond health.

    The first step's updates follow from the initial weights, so a wrong learning rate shows in its own parameter only; later
    ones are looked at where there is no gradient in the first step. Nothing is named where the start itself is off, but
    for single initial weights.

    Args:
        slopes: schema SLOPES.
        fault: what `nearest_fault` found; where there is none, a learning rate that all parameters of a role share is named too.
    """
    at_start = slopes[slopes["statistic"].isin(["activation", "weight"]) & slopes["role"].ne("output")]
    off_at_start = at_start[at_start["ok"].eq(False).fillna(False)]
    statistic = "update" if off_at_start.empty else "weight"
    rows = slopes[slopes["statistic"].isin(["update", "step"] if statistic == "update" else ["weight"])]
    rows = rows[rows["slope"].notna()]
    # Of a learning rate the step itself says more than what it makes of the features.
    stepped = set(rows["module"][rows["statistic"].eq("step")])
    rows = rows[rows["statistic"].ne("update") | ~rows["module"].isin(stepped)]
    rows = rows.loc[rows.groupby("module")["step"].idxmin()]
    off_by = [beyond(value, band(expected)) for value, expected in zip(rows["slope"], rows["expected"], strict=True)]
    failed = slopes[
        slopes["ok"].eq(False).fillna(False) & slopes["statistic"].isin([*rows["statistic"].unique(), "decay"])
    ]
    rows = rows.assign(off=off_by, failing=rows["module"].isin(failed["module"]))
    chosen: list[str] = []
    for _, members in rows.groupby("role"):
        off = members[members["off"].abs() > OFF]
        if not off["failing"].any():
            continue
        if 2 * len(off) > len(members) and (fault is not None or statistic == "weight"):
            return None
        chosen += [*off["module"]]
    if not chosen:
        return None
    by = rows[rows["module"].isin(chosen)].set_index("module")["off"]
    worst = by[by.abs().idxmax()]
    alike = by[(by * worst > 0) & (by.abs() > abs(worst) / 2)]  # what is further off than all others comes first
    return [str(name) for name in alike.index], statistic, float(np.median(alike))


def local_slopes(coordinates: pd.DataFrame) -> Signature:
    """Return, by role, the median slope beyond µP's of what a module adds by itself (`faults.Fault.signature`)."""
    last = coordinates["step"].max()
    started = coordinates[coordinates["step"].eq(0)]
    started = started[started["statistic"].isin(["weight", "activation", "input", "decay"])]
    updates = relative_updates(coordinates, "output")
    steps = coordinates[coordinates["statistic"].eq("step") & coordinates["step"].eq(1)]
    frame = pd.concat([started, steps, updates[updates["step"].isin([1, last])]])
    keys = ["module", "role", "statistic", "step"]
    groups = frame[frame["role"].isin(ROLES)].groupby(keys, sort=False)
    slopes = {key: slope(group, "width")[0] for key, group in groups}
    found: dict[tuple[str, str], list[float]] = {}
    for (module, role, statistic, step), value in slopes.items():
        # What enters an embedding is not floating and has no size.
        given = slopes.get((module, role, "input", 0), 0.0)
        if statistic in ("weight", "step", "decay"):
            found.setdefault((statistic, role), []).append(value)
        elif statistic == "activation":
            found.setdefault(("gain", role), []).append(value - given)
        elif statistic == "update":
            # In the first step a readout that starts at zero lets no gradient through.
            at_once = not math.isnan(slopes.get((module, role, "update", 1), math.nan))
            if at_once == (step == 1):
                found.setdefault(("update", role), []).append(value)
    return {
        key: float(np.nanmedian(values))
        for key, values in found.items()
        if key[1] in ROLES and not np.isnan(values).all()
    }


def column_of(coordinates: pd.DataFrame) -> str:
    """Return the tables' column of the optimizer that a frame was recorded with."""
    return OPTIMIZERS[str(coordinates["optimizer"].iloc[0])].column


def band(expected: str) -> tuple[float, float]:
    """Return a band from its text in a frame of slopes, such as "-0.5..0"."""
    low, high = expected.split("..")
    return float(low), float(high)


def listed(names: list[str]) -> str:
    """Return up to three names as they are, more as their patterns."""
    return ", ".join(names) if len(names) <= 3 else pattern(names)


def pattern(modules: list[str]) -> str:
    """Return modules as their patterns, layer numbers as a star, each once."""
    found = list(dict.fromkeys(map(pattern_of, modules)))
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def _possible(found: Signature, signature: Signature) -> bool:
    """Return whether a signature has the rates that the first steps show, and blames no initial size that is right."""
    for (statistic, role), value in found.items():
        blamed = statistic == "step" or (statistic == "weight" and abs(value) < OFF)
        if blamed and abs(value - signature[statistic, role]) > OFF:
            return False
    return True


def _distance(found: Signature, signature: Signature) -> float:
    gaps = [found[key] - expected for key, expected in signature.items() if key in found and not math.isnan(expected)]
    return math.sqrt(sum(gap * gap for gap in gaps) / len(gaps)) if gaps else math.inf
