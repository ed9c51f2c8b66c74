"""Verdict of the coordinate check: whether the slopes are those of width-stable feature learning, and how certain that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from ..errors import FrameError, RequestError, nearest
from ..optimizers.rules import OPTIMIZERS
from ..parametrizations.spec import Band, Table
from ..parametrizations.tables import HEALTHY, HEALTHY_DECAY, HEALTHY_DEPTH, TABLES
from ..schemas import SLOPES, varying
from .diagnosis import beyond, cause, missing, relative_updates, slope, wide_and_narrow, without_gradient

__all__ = ["MARGIN", "Verdict", "verdict"]

MARGIN = 0.15  # finite width bends every slope slightly; healthy and broken slopes differ by 0.3 and more
# Additional margin for a single parameter's update, which varies more between seeds; wrong rates are off by 1/2 and more.
OF_UPDATES = 0.1
BROKEN = 0.3  # a slope this far from its band is not an effect of finite width (docs/log.md)
FADING = 0.5  # with learning rates known to be right, a change or update that shrinks more slowly may do so in narrow models only
TIGHT = 0.05  # half-width of a tight interval; no realistic number of additional seeds moves a slope by more
RETURNING = 0.7  # fraction of the narrow half's distance from the band; a wide half nearer than that is returning to it
FELT = 100.0  # mean |gradient| / epsilon below which epsilon affects a step by 1% or more
ROUNDING = 1e-4  # fraction of the median gradient; smaller gradients count as zero
Status = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """Result of a coordinate check.

    ``slopes`` has the columns of `schemas.SLOPES`. ``cause`` is a sentence that explains what failed or what is missing.
    ``fault`` is the key in `diagnosis.FAULTS` of the fault that the slopes resemble, or one of "epsilon", "one-parameter"
    and "mixed-columns"; None if no known fault is near. ``widen`` is True if an undecided check needs wider models, which
    decide it sooner than more seeds.
    """

    status: Status
    slopes: pd.DataFrame
    cause: str | None
    fault: str | None = None
    widen: bool = False


def verdict(coordinates: pd.DataFrame, margin: float = MARGIN, *, decay_policy: str = "independent") -> Verdict:
    """Judge a coordinates frame of one parametrization against the slopes of width-stable feature learning.

    For each module, statistic and step, the slope of log2(value) against log2(width), or against log2(depth) if the depth
    varies, is fitted over seeds and sizes with a 95% confidence interval. A row passes if the interval lies within the expected
    band widened by ``margin`` (and by 0.1 more for updates, except a readout's), fails if it lies entirely outside, and is
    undecided otherwise. A row that fails over all sizes is fitted again over the wider half of them. It remains a fail only if
    this second fit fails too and its slope is not clearly closer to the band than the slope of the narrower half; otherwise it
    is undecided. Where learning rates are judged by themselves, changes and updates that shrink have to shrink fast to fail
    (docs/explanation/coordinate-check.md).

    The verdict judges, for each module, the size of its activations at the start and their changes; and for each parameter:

    - its initial size,
    - the size of ΔW·x, where ΔW is the parameter's update and x what its module received as input before training,
    - the learning rate implied by its first step,
    - lr · weight decay,
    - gradient / epsilon, where epsilon matters.

    The other rows of the frame help to identify the cause.

    Args:
        coordinates: frame from `record`, or the concatenated frames of a `Recorder` at several widths.
        margin: how far a slope may lie outside its band.
        decay_policy: intended scaling of lr · weight decay: independent, coupled or sqrt (docs/explanation/rules.md).

    Raises:
        RequestError: the decay policy is unknown.
        FrameError: the frame contains two parametrizations or fewer than two sizes, or widths and depths both vary.
    """
    if decay_policy not in HEALTHY_DECAY:
        raise RequestError(f"unknown decay policy {decay_policy!r}: {nearest(decay_policy, HEALTHY_DECAY)}")
    names = coordinates["parametrization"].unique()
    if len(names) != 1:
        raise FrameError(f"a verdict covers one parametrization, but the frame holds {sorted(names)}: filter it first.")
    axis = varying(coordinates)
    if coordinates[axis].nunique() < 2:
        raise FrameError("a slope needs at least two widths or depths: record more.")
    if axis == "depth" and coordinates["width"].nunique() > 1:
        raise FrameError("widths and depths both vary, but a slope is fitted along one of them: vary one at a time.")
    last = int(coordinates["step"].max())
    column, rules = OPTIMIZERS[str(coordinates["optimizer"].iloc[0])].column, TABLES.get(names[0])
    rows: list[dict[str, object]] = []
    narrow: set[int] = set()
    frame = coordinates
    if axis == "width":
        frame = pd.concat([coordinates[coordinates["statistic"] != "update"], relative_updates(coordinates)])
    judged = frame[_judged(frame, last, axis, rules)]
    # An implied learning rate is judged only if every size has one; some runs do not (other wrappers, half precision).
    sizes = judged[judged["statistic"].eq("step")].groupby("module")[axis].nunique()
    stepped = set(sizes[sizes.eq(coordinates[axis].nunique())].index)
    judged = judged[~judged["statistic"].eq("step") | judged["module"].isin(stepped)]
    # Parameters that do not grow are judged by their rate alone: with few entries, their update is noise at every width.
    finite = set(judged["module"][judged["statistic"].eq("step") & judged["role"].eq("finite")])
    judged = judged[~(judged["statistic"].eq("update") & judged["module"].isin(finite))]
    rounding = ROUNDING * judged[judged["statistic"] == "gradient"]["value"].median()
    for (module, role, statistic, step), group in judged.groupby(["module", "role", "statistic", "step"], sort=False):
        # A key's bias has no gradient apart from rounding errors.
        if statistic == "gradient" and not rounding < group["value"].min() < FELT:
            continue
        value, low, high = slope(group, axis)
        expected = _healthy(axis, str(module), str(statistic), str(role), decay_policy, column, module in stepped)
        allowed = margin + (OF_UPDATES if statistic == "update" and role != "output" else 0.0)
        ok = _judge(group, value, low, high, expected, allowed, may_be_zero=step < last)
        # Under Adam, an update is the rate times the alignment with the input and shrinks by −½ at most; under SGD the gradient
        # may shrink as well.
        rates_seen = bool(stepped) if statistic == "change" else column == "sgd" and module in stepped
        if ok is False and axis == "width" and not _holds_for_wide(group, expected, allowed, rates_seen):
            ok = None
            narrow.add(len(rows))
        if statistic == "gradient" and ok is None and _epsilon_bend(group, low, high) < margin:
            continue
        if ok is None and axis == "width" and _on_the_edge(value, low, high, expected, allowed):
            narrow.add(len(rows))
        rows.append(
            {
                "parametrization": names[0],
                "module": module,
                "role": role,
                "statistic": statistic,
                "step": step,
                "slope": value,
                "low": low,
                "high": high,
                "expected": _format_band(expected),
                "declared": _format_band(_declared(rules, axis, column, str(statistic), str(role), expected)),
                "ok": ok,
            }
        )
    slopes = SLOPES.frame(rows)
    if (slopes["ok"] == False).any():  # noqa: E712 - a nullable column: missing is not False
        return Verdict("fail", slopes, *cause(slopes, coordinates, axis))
    if slopes["ok"].isna().any():
        waiting = slopes["ok"].isna()
        widen = bool(narrow) and all(i in narrow for i in slopes.index[waiting])
        return Verdict("undecided", slopes, missing(slopes, coordinates, axis, sorted(narrow)), widen=widen)
    return Verdict("pass", slopes, None)


def _judged(coordinates: pd.DataFrame, last: int, axis: str, rules: Table | None) -> pd.Series:
    """Return, for every row, whether it is judged; the others only help to identify a cause."""
    statistic, step = coordinates["statistic"], coordinates["step"]
    judged = statistic.eq("activation") & step.eq(0) | statistic.eq("change") & step.isin([1, last])
    if axis == "width":
        judged |= statistic.eq("update") & step.isin([1, last])
        # Use the first step in which a parameter has a gradient; later steps also depend on how successive gradients relate.
        moved = coordinates[statistic.eq("step") & coordinates["value"].gt(0)].groupby("module")["step"].min()
        stepped = statistic.eq("step") & step.eq(coordinates["module"].map(moved))
        judged |= stepped & coordinates["value"].gt(0) & ~coordinates["module"].isin(without_gradient(coordinates))
        judged |= statistic.eq("decay") | statistic.eq("gradient") & step.eq(0)
        if rules is not None:  # a hand-written parametrization may place its multipliers anywhere
            judged |= statistic.eq("weight") & step.eq(0)
    return judged


def _healthy(axis: str, module: str, statistic: str, role: str, decay_policy: str, column: str, stepped: bool) -> Band:
    if statistic == "decay":
        return HEALTHY_DECAY[decay_policy]
    # The update of an attention vector is not divided by an input, and may shrink as much as that of a matrix.
    role = "attention" if role == "attention vector" else role
    # Adam's step does not depend on a shrinking gradient.
    if column == "adam" and (role == "finite" or (statistic == "update" and role == "attention")):
        role = "feature"
    if statistic == "update" and stepped and role not in ("attention", "gain"):
        role = "stepped"
    if statistic == "step":
        role = "feature"
    kind = role if role == "output" or (axis == "width" and (statistic, role) in HEALTHY) else "feature"
    if axis == "depth" and statistic == "change" and "first" in module.split("."):
        kind = "first"
    return (HEALTHY if axis == "width" else HEALTHY_DEPTH)[statistic, kind]


def _declared(rules: Table | None, axis: str, column: str, statistic: str, role: str, expected: Band) -> Band:
    """Return the band that the parametrization in force declares, or ``expected`` if it declares none."""
    if rules is None or axis == "depth":
        return expected
    kind = {"output": "output", "input": "first"}.get(role, "feature")
    if statistic == "update":
        if role in ("attention", "attention vector", "stream", "finite", "gain"):
            return expected
        kind = "first" if role == "vector" else kind
        derived = float(rules.derived(column, "change", kind))
        return derived, derived
    if statistic == "step":
        derived = float((rules.rows[role].lr(column) / TABLES["mup"].rows[role].lr(column)).total)
        return derived, derived
    if statistic == "weight":
        derived = float((rules.rows[role].init / TABLES["mup"].rows[role].init).total)
        return derived, derived
    if statistic == "activation" and kind == "first":
        kind = "feature"
    return rules.declared.get((column, statistic, kind), expected)


def _judge(
    group: pd.DataFrame, slope: float, low: float, high: float, band: Band, margin: float, may_be_zero: bool
) -> bool | None:
    if not np.isfinite(group["value"]).all():
        return False
    if math.isnan(slope):
        # Zero-initialized parameters (a readout, LoRA's B) give zeros at the start, and a zero readout passes no gradient back in
        # the first step; by the last step everything must have moved.
        return True if (group["value"] == 0).all() and may_be_zero else None
    if band[0] - margin <= low and high <= band[1] + margin:
        return True
    return False if high < band[0] - margin or low > band[1] + margin else None


def _on_the_edge(slope: float, low: float, high: float, band: Band, margin: float) -> bool:
    """Return whether a tight interval straddles an end of the band, so that even four times the seeds would hardly decide."""
    to_end = min(abs(slope - (band[0] - margin)), abs(slope - (band[1] + margin)))
    return high - low < 2 * TIGHT and to_end < (high - low) / 4


def _holds_for_wide(group: pd.DataFrame, band: Band, margin: float, rates_seen: bool) -> bool:
    """Return whether a failing slope also holds for the wide models and is not vanishing, because finite width bends slopes.

    The interval of the wide half must lie outside the band too and, unless it is `BROKEN`, must not be returning to it. For
    changes and updates, the end of the interval nearest to the band counts, so that few seeds leave the row undecided.
    ``rates_seen`` is True if learning rates are judged in separate rows: a shrinking slope then does not indicate a wrong rate,
    and must shrink by `FADING` to fail.
    """
    values = group["value"].to_numpy(dtype=float)
    if group["width"].nunique() < 3 or not np.isfinite(values).all():
        return True
    wide, narrow = wide_and_narrow(group, "width")
    value, low, high = slope(wide, "width")
    if not (high < band[0] - margin or low > band[1] + margin):
        return False
    statistic = group["statistic"].iloc[0]
    trained = statistic in ("change", "update")
    off = beyond((high if value < band[0] else low) if trained else value, band)
    if trained and rates_seen and off < 0:
        incoherent = -band[0] if statistic == "change" else 0.0  # a change's band already allows for this
        return -off >= max(FADING - incoherent, BROKEN)
    before = beyond(slope(narrow, "width")[0], band)
    if off * before <= 0:  # not a power of the width: a fault would be as far off in narrow models
        return abs(off) >= BROKEN or not trained
    return abs(off) >= BROKEN or abs(off) > RETURNING * abs(before)


def _epsilon_bend(group: pd.DataFrame, low: float, high: float) -> float:
    """Return how far epsilon can bend the slope of a step, which is r / (1 + r) of its full size, r = |gradient| / epsilon."""
    return max(-low, high) / (1 + group["value"].min())


def _format_band(band: Band) -> str:
    low, high = ("-inf" if math.isinf(end) else f"{end:g}" for end in band)
    return f"{low}..{high}"
