"""Diagnosis of failed checks: fitted slopes, known scaling faults as data, and the fault with the nearest signature.

A fault multiplies initial weights and learning rates by powers of the width, by role, on top of µP's factors. Its effect on the
sizes that a check measures (`Fault.signature`) follows from the power counting of TP-V 2203.03466, Appendix J.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ..optimizers.rules import OPTIMIZERS
from ..param_names import pattern_of
from ..planning.plan import ParameterPlan, Plan
from .measure import ROUNDING

__all__ = [
    "FAULTS",
    "RELATIVE",
    "Fault",
    "Signature",
    "beyond",
    "cause",
    "column_of",
    "few_parameters",
    "listed",
    "local_slopes",
    "missing",
    "nearest_fault",
    "pattern",
    "plant",
    "plant_in",
    "relative_updates",
    "slope",
    "unit_of",
    "wide_and_narrow",
    "without_gradient",
]


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
# that is tied to an embedding has its multiplier on the input.
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


HALF = Fraction(1, 2)
ROLES = ("input", "hidden", "output")
Powers = Mapping[str, Fraction | int]
Signature = dict[tuple[str, str], float]


@dataclass(frozen=True, eq=False)
class Fault:
    """A scaling fault: powers of the width by role, on top of µP's.

    Args:
        name: key in `FAULTS`.
        says: optimizer column ("adam" or "sgd") → text that describes the fault.
        init: powers on the initial weights.
        adam: powers on the learning rate of Adam-like optimizers.
        sgd: powers on the learning rate of SGD-like optimizers.
        forward: powers on a multiplier in the forward pass, by the role of the module whose output it multiplies.
        decay: optimizer column → powers on the weight decay.
    """

    name: str
    says: Mapping[str, str]
    init: Powers = field(default_factory=dict)
    adam: Powers = field(default_factory=dict)
    sgd: Powers = field(default_factory=dict)
    forward: Powers = field(default_factory=dict)
    decay: Mapping[str, Powers] = field(default_factory=dict)

    def lr(self, column: str) -> Powers:
        """Return the powers on the learning rate for an optimizer column."""
        return self.adam if column == "adam" else self.sgd

    def signature(self, column: str) -> Signature:
        """Return the local slopes, relative to µP's, that the fault implies; NaN where it does not determine the slope.

        ("weight", role): initial weights. ("step", role): the learning rate. ("gain", role): a module's output relative to its
        input. ("update", role): ΔW·x relative to the module's input after one step; under SGD it follows the gradient, and
        therefore the readout's weights. ("decay", role): lr · weight decay.
        """
        found: Signature = {}
        for role in ROLES:
            init, forward = float(self.init.get(role, 0)), float(self.forward.get(role, 0))
            found["weight", role] = init
            found["step", role] = float(self.lr(column).get(role, 0))
            # With a wrong learning rate, lr · weight decay says nothing: it depends on the rate for which the decay was chosen.
            wrong_lr = bool(self.lr(column).get(role, 0))
            found["decay", role] = math.nan if wrong_lr else float(self.decay.get(column, {}).get(role, 0))
            # The gain (output relative to input) shows no fault of a readout or of small initial weights: the layer's bias, which
            # does not shrink with width, is then the larger part of its output.
            found["gain", role] = math.nan if role == "output" or init else forward
            found["update", role] = float(self.lr(column).get(role, 0)) + forward
            if column == "sgd" and role != "output":
                found["update", role] += float(self.init.get("output", 0))
            # The size of a hidden layer's output changes the gradients by an amount that depends on the normalization layers in
            # between; without these, it saturates the loss.
            if column == "sgd" and (self.init.get("hidden") or (self.forward and role != "output")):
                found["update", role] = math.nan
        return found


def both(text: str) -> dict[str, str]:
    """Return the same text for both optimizer columns."""
    return {"adam": text, "sgd": text}


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "hidden-lr",
            {"adam": "hidden lr not divided by the width", "sgd": "hidden lr divided by the width, which only Adam needs"},
            adam={"hidden": 1},
            sgd={"hidden": -1},
        ),
        Fault(
            "hidden-lr-root",
            both("hidden lr off by the square root of the width"),
            adam={"hidden": HALF},
            sgd={"hidden": -HALF},
        ),
        Fault(
            "input-lr",
            {"adam": "input lr divided by the width, as if the layer were hidden", "sgd": "input lr not multiplied by the width"},
            adam={"input": -1},
            sgd={"input": -1},
        ),
        Fault("readout-lr", both("readout lr not divided by the width"), adam={"output": 1}, sgd={"output": 1}),
        Fault("readout-init", both("readout's initial weights shrink as width^-1/2, not as 1/width"), init={"output": HALF}),
        Fault(
            "readout-twice",
            both("logits divided by the width twice"),
            init={"output": -1},
            adam={"output": -1},
            sgd={"output": -2},
        ),
        Fault("hidden-init", both("hidden initial weights do not shrink as width^-1/2"), init={"hidden": HALF}),
        Fault("hidden-init-small", both("hidden initial weights shrink as 1/width, not as width^-1/2"), init={"hidden": -HALF}),
        Fault("input-init", both("input's initial weights shrink with the width"), init={"input": -HALF}),
        Fault(
            "one-lr",
            both("one learning rate for all parameters"),
            adam={"hidden": 1, "output": 1},
            sgd={"input": -1, "output": 1},
        ),
        Fault(
            "standard",
            both("the standard parametrization: one learning rate for all, and the readout's initial weights as width^-1/2"),
            init={"output": HALF},
            adam={"hidden": 1, "output": 1},
            sgd={"input": -1, "output": 1},
        ),
        Fault(
            "decay",
            both("lr · weight decay is not constant, as the weight decay does not compensate for the learning rate's factor"),
            decay={"adam": {"hidden": -1, "output": -1}, "sgd": {"input": 1, "output": -1}},
        ),
        Fault("forward", both("a number after the input layer grows with the width"), forward={"input": HALF}),
    )
}  # fmt: skip


def plant(fault: Fault, planner: Callable[..., Plan], column: str) -> Callable[..., Plan]:
    """Return a planner whose plans contain ``fault``, except for its powers on the forward pass, which belong to the model."""

    def planned(*args: Any, **kwargs: Any) -> Plan:
        plan = planner(*args, **kwargs)
        ratio = plan.scale.width / plan.base.width

        def wrong(row: ParameterPlan) -> ParameterPlan:
            role = row.role if len(row.shape) > 1 else ""
            lr = row.lr * ratio ** float(fault.lr(column).get(role, 0))
            # Keep lr · weight decay unchanged so that it does not reveal the fault.
            decay = row.weight_decay * row.lr / lr * ratio ** float(fault.decay.get(column, {}).get(role, 0))
            init = row.init.scaled(ratio ** float(fault.init.get(role, 0)))
            return replace(row, init=init, lr=lr, weight_decay=decay)

        return replace(plan, rows=tuple(map(wrong, plan.rows)))

    return planned


def plant_in(parameter: str, power: float, planner: Callable[..., Plan]) -> Callable[..., Plan]:
    """Return a planner that multiplies one parameter's lr by a power of the width and keeps its lr · weight decay."""

    def planned(*args: Any, **kwargs: Any) -> Plan:
        plan = planner(*args, **kwargs)
        ratio = plan.scale.width / plan.base.width
        assert any(row.name == parameter for row in plan.rows), parameter

        def wrong(row: ParameterPlan) -> ParameterPlan:
            return replace(row, lr=row.lr * ratio**power, weight_decay=row.weight_decay * ratio**-power)

        return replace(plan, rows=tuple(wrong(row) if row.name == parameter else row for row in plan.rows))

    return planned


OFF = 0.25  # a parameter is off if its slope is further beyond the band than this; faults are powers of 1/2 and more
NEAR = 0.35  # a signature fits if its root mean square distance is at most this


def nearest_fault(coordinates: pd.DataFrame) -> Fault | None:
    """Return the fault whose signature is nearest to the slopes, or None if no fault is near or a healthy model is nearer.

    Requires the statistic "update" of a check over widths (None without it), and uses "input" and "weight" where recorded.
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
    """Return the parameters that are off while others of their role are not: names, statistic, median slope beyond the band.

    The updates of the first step follow from the initial weights, so a wrong learning rate shows only in the parameter it
    belongs to. Later steps are used for parameters that have no gradient in the first one. If sizes at initialization are off,
    only individual initial weights are named.

    Args:
        slopes: schema SLOPES.
        fault: result of `nearest_fault`; if None, a wrong learning rate shared by all parameters of a role is named as well.
    """
    at_start = slopes[slopes["statistic"].isin(["activation", "weight"]) & slopes["role"].ne("output")]
    off_at_start = at_start[at_start["ok"].eq(False).fillna(False)]
    statistic = "update" if off_at_start.empty else "weight"
    rows = slopes[slopes["statistic"].isin(["update", "step"] if statistic == "update" else ["weight"])]
    rows = rows[rows["slope"].notna()]
    # The step itself is more direct evidence of a learning rate than the effect of the step on the features.
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
    alike = by[(by * worst > 0) & (by.abs() > abs(worst) / 2)]  # report only those about as far off as the worst
    return [str(name) for name in alike.index], statistic, float(np.median(alike))


def local_slopes(coordinates: pd.DataFrame) -> Signature:
    """Return the measured local slopes, relative to µP's, as medians by role (compare `Fault.signature`)."""
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
        # The input of an embedding is not floating-point and has no size.
        input_slope = slopes.get((module, role, "input", 0), 0.0)
        if statistic in ("weight", "step", "decay"):
            found.setdefault((statistic, role), []).append(value)
        elif statistic == "activation":
            found.setdefault(("gain", role), []).append(value - input_slope)
        elif statistic == "update":
            # A readout that is initialized to zero passes no gradient back in the first step.
            moves_at_once = not math.isnan(slopes.get((module, role, "update", 1), math.nan))
            if moves_at_once == (step == 1):
                found.setdefault(("update", role), []).append(value)
    return {
        key: float(np.nanmedian(values))
        for key, values in found.items()
        if key[1] in ROLES and not np.isnan(values).all()
    }


def column_of(coordinates: pd.DataFrame) -> str:
    """Return the column of the tables ("adam" or "sgd") for the optimizer that a frame was recorded with."""
    return OPTIMIZERS[str(coordinates["optimizer"].iloc[0])].column


def band(expected: str) -> tuple[float, float]:
    """Parse a band as written in a frame of slopes, such as "-0.5..0"."""
    low, high = expected.split("..")
    return float(low), float(high)


def listed(names: list[str]) -> str:
    """Return up to three names joined by commas, or more names as patterns."""
    return ", ".join(names) if len(names) <= 3 else pattern(names)


def pattern(modules: list[str]) -> str:
    """Return the distinct patterns of module names, with layer numbers replaced by a star; up to six are listed."""
    found = list(dict.fromkeys(map(pattern_of, modules)))
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def _possible(found: Signature, signature: Signature) -> bool:
    """Return whether a signature agrees with the measured first steps, and with the initial sizes that are right."""
    for (statistic, role), value in found.items():
        blamed = statistic == "step" or (statistic == "weight" and abs(value) < OFF)
        if blamed and abs(value - signature[statistic, role]) > OFF:
            return False
    return True


def _distance(found: Signature, signature: Signature) -> float:
    gaps = [found[key] - expected for key, expected in signature.items() if key in found and not math.isnan(expected)]
    return math.sqrt(sum(gap * gap for gap in gaps) / len(gaps)) if gaps else math.inf


def cause(slopes: pd.DataFrame, coordinates: pd.DataFrame, axis: str) -> tuple[str, str | None]:
    """Return a sentence that explains why a check fails, and the key of the fault that it resembles, or None.

    Args:
        slopes: schema SLOPES, with at least one failing row.
        coordinates: the frame from which the slopes were fitted.
        axis: "width" or "depth".
    """
    failed = slopes[slopes["ok"] == False]  # noqa: E712 - a nullable column: missing is not False
    failing = f"failing: {pattern([*failed['module']])}."
    not_finite = failed[failed["slope"].isna()]
    if len(not_finite):
        return f"{not_finite['module'].iloc[0]} is not finite at some {axis}: lower --lr ({failing})", None
    settings = failed["statistic"].isin(["decay", "gradient"])
    fault = nearest_fault(coordinates) if axis == "width" else None
    epsilon = failed["statistic"].eq("gradient").any()
    if fault is FAULTS["decay"] and not settings.any():
        fault = None
    if axis == "width" and not epsilon and (few := few_parameters(slopes, fault)) is not None:
        names, statistic, value = few
        what = "learning rate" if statistic == "update" else "initial size"
        verb = "are" if names[1:] and statistic != "update" else "is"
        size = "large" if value > 0 else "small"
        measured = [statistic, "step"] if statistic == "update" else [statistic]
        shown = slopes[slopes["module"].isin(names) & slopes["statistic"].isin(measured)]
        evidence = _describe_row(shown.loc[shown["slope"].abs().idxmax()], axis, listed)
        return (
            f"the {what} of {listed(names)} {verb} too {size} by width^{_power(value)}: {evidence}; {failing}",
            "one-parameter",
        )
    if epsilon or fault is FAULTS["decay"] or (fault is None and settings.all()):
        return _describe_settings(failed[settings]) + f"; {failing}", _settings_fault(failed[settings])
    rows = failed[~settings] if (~settings).any() else failed
    # Report errors at initialization first: training did not cause them.
    at_start = rows[rows["statistic"].eq("activation") & rows["role"].ne("output")]
    if fault is None and len(at_start):
        weights_hold = slopes["statistic"].eq("weight").any() and not failed["statistic"].eq("weight").any()
        if weights_hold and axis == "width":
            first = at_start.iloc[0]
            moves = "grows" if first["slope"] > 0 else "shrinks"
            why = f"all initial weights have the right size, so a number in the forward pass {moves} with the width"
            return f"{_describe_row(first, axis)}, and {why}; {failing}", "forward"
        rows = at_start
    worst = rows.loc[rows["slope"].abs().idxmax()]
    what = _describe_row(worst, axis)
    if fault is not None:
        return f"{fault.says[column_of(coordinates)]}: {what}; {failing}", fault.name
    return f"{what}, so {_likely_reason(worst, axis)}; {failing}", None


def missing(slopes: pd.DataFrame, coordinates: pd.DataFrame, axis: str, narrow: Sequence[int] = ()) -> str:
    """Return a sentence on what an undecided check lacks; ``narrow`` holds the rows that only wider models can decide."""
    open_rows = slopes[slopes["ok"].isna()]
    if narrow and len(narrow) == len(open_rows):
        worst = open_rows.loc[open_rows["slope"].abs().idxmax()]
        return (
            f"{_describe_row(worst, axis)} [{worst['low']:+.2f}, {worst['high']:+.2f}]; wider models distinguish an effect of "
            "finite width from a fault sooner than more seeds do: add widths above "
            f"{coordinates['width'].max()} (undecided: {pattern([*open_rows['module']])})."
        )
    still = open_rows[open_rows["slope"].isna()]
    if len(still):
        row = still.iloc[0]
        return (
            f"no slope for the {row['statistic']} of {row['module']}: it is exactly 0 at some {axis} after {row['step']} steps, "
            "so it either receives no signal or gets no gradient: check what it is connected to."
        )
    worst = open_rows.loc[(open_rows["high"] - open_rows["low"]).idxmax()]
    return (
        f"not enough evidence for {pattern([*open_rows['module']])}: add seeds (now {coordinates['seed'].nunique()}) or "
        f"{axis}s (now {coordinates[axis].nunique()}); {_describe_row(worst, axis)}, [{worst['low']:+.2f}, {worst['high']:+.2f}]."
    )


def _power(value: float) -> str:
    """Return the power of the width nearest to a slope, as a multiple of one half."""
    halves = max(1, round(2 * abs(value)))
    return f"{halves}/2" if halves % 2 else f"{halves // 2}"


def _describe_row(row: pd.Series, axis: str, name: Callable[[list[str]], str] = pattern) -> str:
    kinds = {
        "change": "change",
        "update": "update",
        "step": "step relative to µP's",
        "weight": "initial size relative to µP's",
        "decay": "lr · weight decay",
    }
    what = kinds.get(row["statistic"], row["statistic"])
    return (
        f"the {what} of {name([row['module']])} goes as {axis}^{row['slope']:+.2f} where {row['expected']} is healthy"
    )


def _describe_settings(failed: pd.DataFrame) -> str:
    worst = failed.loc[failed["slope"].abs().idxmax()]
    if (failed["statistic"] == "gradient").any():
        worst = failed[failed["statistic"] == "gradient"].iloc[0]
        what = "epsilon is not scaled with the gradients: gradient / epsilon"
    else:
        what = "lr · weight decay is not constant: that"
    return f"{what} of {pattern([worst['module']])} goes as width^{worst['slope']:+.2f}"


def _settings_fault(failed: pd.DataFrame) -> str:
    return "epsilon" if (failed["statistic"] == "gradient").any() else "decay"


def _likely_reason(worst: pd.Series, axis: str) -> str:
    if axis == "depth":
        return (
            "its residual branches are not scaled with the depth" if worst["slope"] > 0 else "its layers stop learning"
        )
    if worst["role"] == "bottleneck" and worst["statistic"] in ("change", "update") and 0 < worst["slope"] < 1:
        return (
            "either its learning rate does not shrink with width, or its fixed number of outputs is the cause, over which "
            "updates do not average out in the first steps (docs/explanation/models.md)"
        )
    if worst["statistic"] in ("change", "update", "step") and worst["slope"] > 0:
        # The change of the features also reaches the logits, through the readout's initial weights.
        phrase = "or initial weights do not" if worst["role"] == "output" else "does not"
        return f"its learning rate {phrase} shrink with width"
    if worst["statistic"] in ("change", "update", "step"):
        return "its updates shrink with width"
    if worst["slope"] > 0:
        return (
            "its initial weights are not scaled with the fan-in, or a number in the forward pass grows with the width"
        )
    return "its initial weights or its input shrink too fast"
