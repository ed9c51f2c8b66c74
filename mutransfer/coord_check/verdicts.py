"""The coordinate check's verdict: are the slopes those of width-stable feature learning, and how sure is that?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from ..errors import RequestError, nearest
from ..optimizers.rules import OPTIMIZERS
from ..parametrizations.spec import Band, Table
from ..parametrizations.tables import HEALTHY, HEALTHY_DECAY, HEALTHY_DEPTH, TABLES
from ..schemas import SLOPES, varying
from .diagnosis import cause, missing
from .slopes import beyond, relative_updates, slope, wide_and_narrow, without_gradient

__all__ = ["MARGIN", "Verdict", "verdict"]

MARGIN = 0.15  # finite width bends every slope a little; healthy and broken are 0.3 and more apart
OF_UPDATES = (
    0.1  # more for a single parameter's update, which varies more between seeds; wrong rates are 1/2 and more off
)
BROKEN = 0.3  # a slope so far from its band is no effect of finite width (docs/log.md)
FADING = 0.5  # what training moves and fades more slowly, while its rates are seen to be right, may do so in narrow models alone
TIGHT = 0.05  # half an interval: no number of seeds that one would add moves a slope by more
RETURNING = 0.7  # of the narrow half's distance from the band: a wide half nearer than that is on its way back
FELT = 100.0  # mean |gradient| / epsilon below which epsilon takes part in a step, by 1% and more
ROUNDING = 1e-4  # of the median gradient: below, a gradient is none
Status = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What a coordinate check found.

    ``slopes`` has the columns of `schemas.SLOPES`; ``cause`` says in a sentence what failed, or what is missing; ``fault`` is
    the key of the fault in `faults.FAULTS` that the slopes look like, "epsilon", "one-parameter", or None. ``widen`` says that an
    undecided check waits for wider models, which decide it sooner than more seeds.
    """

    status: Status
    slopes: pd.DataFrame
    cause: str | None
    fault: str | None = None
    widen: bool = False


def verdict(coordinates: pd.DataFrame, margin: float = MARGIN, *, decay_policy: str = "independent") -> Verdict:
    """Judge a coordinates frame of one parametrization against the slopes of width-stable feature learning.

    Per module, statistic and step, the slope of log2(value) against log2(width), or log2(depth) if that is what varies,
    is fitted over seeds and widths with a 95% interval. It passes when the interval lies within the expected band widened by
    ``margin``, fails when it lies wholly outside, and is undecided otherwise; it is undecided, too, where the wider models are
    healthy or on their way there (docs/coordinate-check.md). Judged are activations at the start and changes; of the parameters
    the initial sizes, the update of each on its module's first input, the learning rate that its first step shows, lr · weight
    decay, and gradients against epsilon where epsilon is felt. The other rows of the frame name the cause.

    Args:
        coordinates: as `record` returns it, or a `Recorder`'s frames of several widths.
        margin: how far a slope may be from its band.
        decay_policy: what lr · weight decay does on purpose: independent, coupled or sqrt (docs/rules.md).

    Raises:
        RequestError: two parametrizations in one frame, or fewer than two widths.
    """
    if decay_policy not in HEALTHY_DECAY:
        raise RequestError(f"unknown decay policy {decay_policy!r}: {nearest(decay_policy, HEALTHY_DECAY)}")
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
    column, rules = OPTIMIZERS[str(coordinates["optimizer"].iloc[0])].column, TABLES.get(names[0])
    rows: list[dict[str, object]] = []
    narrow: set[int] = set()
    frame = coordinates
    if axis == "width":
        frame = pd.concat([coordinates[coordinates["statistic"] != "update"], relative_updates(coordinates)])
    judged = frame[_judged(frame, last, axis, rules)]
    # A rate is seen where it is seen at every size; what some runs do not show (other wrappers, half precision) says nothing.
    sizes = judged[judged["statistic"].eq("step")].groupby("module")[axis].nunique()
    stepped = set(sizes[sizes.eq(coordinates[axis].nunique())].index)
    judged = judged[~judged["statistic"].eq("step") | judged["module"].isin(stepped)]
    # Of what does not grow the rate is all there is: what it makes of a few entries is noise at every width.
    finite = set(judged["module"][judged["statistic"].eq("step") & judged["role"].eq("finite")])
    judged = judged[~(judged["statistic"].eq("update") & judged["module"].isin(finite))]
    rounding = ROUNDING * judged[judged["statistic"] == "gradient"]["value"].median()
    for (module, role, statistic, step), group in judged.groupby(["module", "role", "statistic", "step"], sort=False):
        # A key's bias has no gradient but for rounding.
        if statistic == "gradient" and not rounding < group["value"].min() < FELT:
            continue
        value, low, high = slope(group, axis)
        expected = _healthy(axis, str(module), str(statistic), str(role), decay_policy, column, module in stepped)
        allowed = margin + (OF_UPDATES if statistic == "update" and role != "output" else 0.0)
        ok = _judge(group, value, low, high, expected, allowed, may_rest=step < last)
        # Under Adam an update is the rate times the input's alignment, and fades by −½ at most; SGD's gradient may fade as well.
        rates_seen = bool(stepped) if statistic == "change" else column == "sgd" and module in stepped
        if ok is False and axis == "width" and not _stays(group, expected, allowed, rates_seen):
            ok = None
            narrow.add(len(rows))
        if statistic == "gradient" and ok is None and _bend(group, low, high) < margin:
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
                "expected": _words(expected),
                "declared": _words(_declared(rules, axis, column, str(statistic), str(role), expected)),
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
    """Say of every row whether it is judged, or there to name a cause."""
    statistic, step = coordinates["statistic"], coordinates["step"]
    judged = statistic.eq("activation") & step.eq(0) | statistic.eq("change") & step.isin([1, last])
    if axis == "width":
        judged |= statistic.eq("update") & step.isin([1, last])
        # The first step in which a parameter has a gradient; later ones also depend on how gradients follow each other.
        moved = coordinates[statistic.eq("step") & coordinates["value"].gt(0)].groupby("module")["step"].min()
        stepped = statistic.eq("step") & step.eq(coordinates["module"].map(moved))
        judged |= stepped & coordinates["value"].gt(0) & ~coordinates["module"].isin(without_gradient(coordinates))
        judged |= statistic.eq("decay") | statistic.eq("gradient") & step.eq(0)
        if rules is not None:  # a model wired by hand may carry its multipliers where it likes
            judged |= statistic.eq("weight") & step.eq(0)
    return judged


def _healthy(axis: str, module: str, statistic: str, role: str, decay_policy: str, column: str, stepped: bool) -> Band:
    if statistic == "decay":
        return HEALTHY_DECAY[decay_policy]
    role = "attention" if role == "attention vector" else role  # its update is not divided, and may fade as much
    # Adam's step sees no gradient fade.
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
    """Return what the parametrization in force says of itself, where it says anything."""
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


def _on_the_edge(slope: float, low: float, high: float, band: Band, margin: float) -> bool:
    """Say whether a tight interval lies across an end of the band: four times the seeds would hardly tell."""
    to_end = min(abs(slope - (band[0] - margin)), abs(slope - (band[1] + margin)))
    return high - low < 2 * TIGHT and to_end < (high - low) / 4


def _stays(group: pd.DataFrame, band: Band, margin: float, rates_seen: bool) -> bool:
    """Say whether a failing slope is the wide models' as well, and not about to end: finite width bends slopes.

    The wide half's interval has to lie outside too, and unless all of it is `BROKEN`, must not be on its way back. Of what
    training moves, the end of the interval next to the band counts, so that few seeds leave it open. ``rates_seen`` says that
    learning rates have rows of their own: what fades is then no wrong rate, and has to fade by `FADING` to fail.
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
        incoherent = -band[0] if statistic == "change" else 0.0  # what a change may fade by is in its band already
        return -off >= max(FADING - incoherent, BROKEN)
    before = beyond(slope(narrow, "width")[0], band)
    if off * before <= 0:  # no power of the width: a fault that is one is as far off in narrow models
        return abs(off) >= BROKEN or not trained
    return abs(off) >= BROKEN or abs(off) > RETURNING * abs(before)


def _bend(group: pd.DataFrame, low: float, high: float) -> float:
    """Return how far epsilon can bend the slope of a step: a step is r / (1 + r) of its size, r = |gradient| / epsilon."""
    return max(-low, high) / (1 + group["value"].min())


def _words(band: Band) -> str:
    low, high = ("-inf" if math.isinf(end) else f"{end:g}" for end in band)
    return f"{low}..{high}"
