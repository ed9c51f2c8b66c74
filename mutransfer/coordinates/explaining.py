"""A verdict's reason in words: what failed and what it looks like, or what evidence is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from .causes import column_of, few_parameters, nearest_fault, pattern
from .causes import listed as named
from .faults import FAULTS

__all__ = ["cause", "missing"]


def cause(slopes: pd.DataFrame, coordinates: pd.DataFrame, axis: str) -> tuple[str, str | None]:
    """Return why a check fails, in a sentence, and the key of the fault that it looks like.

    Args:
        slopes: schema SLOPES, at least one of them failing.
        coordinates: the frame behind them.
        axis: "width" or "depth".
    """
    failed = slopes[slopes["ok"] == False]  # noqa: E712 - a nullable column: missing is not False
    listed = f"failing: {pattern([*failed['module']])}."
    gone = failed[failed["slope"].isna()]
    if len(gone):
        return f"{gone['module'].iloc[0]} is not finite at some {axis}: lower --lr ({listed})", None
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
        of = _what(shown.loc[shown["slope"].abs().idxmax()], axis, named)
        return (
            f"the {what} of {named(names)} {verb} too {size} by width^{_power(value)}: {of}; {listed}",
            "one-parameter",
        )
    if epsilon or fault is FAULTS["decay"] or (fault is None and settings.all()):
        return _of_settings(failed[settings]) + f"; {listed}", _kind(failed[settings])
    rows = failed[~settings] if (~settings).any() else failed
    # What is wrong at the start was not learned: it comes first.
    at_start = rows[rows["statistic"].eq("activation") & rows["role"].ne("output")]
    if fault is None and len(at_start):
        weights_hold = slopes["statistic"].eq("weight").any() and not failed["statistic"].eq("weight").any()
        if weights_hold and axis == "width":
            first = at_start.iloc[0]
            moves = "grows" if first["slope"] > 0 else "shrinks"
            why = f"all weights start as they should, so a number in the forward pass {moves} with the width"
            return f"{_what(first, axis)}, and {why}; {listed}", "forward"
        rows = at_start
    worst = rows.loc[rows["slope"].abs().idxmax()]
    what = _what(worst, axis)
    if fault is not None:
        return f"{fault.says[column_of(coordinates)]}: {what}; {listed}", fault.name
    return f"{what}, so {_why(worst, axis)}; {listed}", None


def missing(slopes: pd.DataFrame, coordinates: pd.DataFrame, axis: str, narrow: Sequence[int] = ()) -> str:
    """Return what an undecided check lacks; ``narrow`` are the rows that wait for wider models."""
    open_rows = slopes[slopes["ok"].isna()]
    if narrow and len(narrow) == len(open_rows):
        worst = open_rows.loc[open_rows["slope"].abs().idxmax()]
        return (
            f"{_what(worst, axis)} [{worst['low']:+.2f}, {worst['high']:+.2f}]; wider models tell finite width from a fault "
            f"sooner than more seeds do: add widths above {coordinates['width'].max()} (open: {pattern([*open_rows['module']])})."
        )
    still = open_rows[open_rows["slope"].isna()]
    if len(still):
        row = still.iloc[0]
        return (
            f"no slope for the {row['statistic']} of {row['module']}: it is exactly 0 at some {axis} after {row['step']} steps, "
            "so either nothing reaches it, or it gets no gradient: look at what it is connected to."
        )
    worst = open_rows.loc[(open_rows["high"] - open_rows["low"]).idxmax()]
    return (
        f"not enough evidence for {pattern([*open_rows['module']])}: add seeds (now {coordinates['seed'].nunique()}) or "
        f"{axis}s (now {coordinates[axis].nunique()}); {_what(worst, axis)}, [{worst['low']:+.2f}, {worst['high']:+.2f}]."
    )


def _power(value: float) -> str:
    """Return a slope as the power of the width that it is near to, in halves."""
    halves = max(1, round(2 * abs(value)))
    return f"{halves}/2" if halves % 2 else f"{halves // 2}"


def _what(row: pd.Series, axis: str, name: Callable[[list[str]], str] = pattern) -> str:
    kinds = {
        "change": "change",
        "update": "own update",
        "step": "step over µP's",
        "weight": "initial size over µP's",
        "decay": "lr · weight decay",
    }
    what = kinds.get(row["statistic"], row["statistic"])
    return (
        f"the {what} of {name([row['module']])} goes as {axis}^{row['slope']:+.2f} where {row['expected']} is healthy"
    )


def _of_settings(failed: pd.DataFrame) -> str:
    worst = failed.loc[failed["slope"].abs().idxmax()]
    if (failed["statistic"] == "gradient").any():
        worst = failed[failed["statistic"] == "gradient"].iloc[0]
        what = "epsilon is not scaled with the gradients: gradient / epsilon"
    else:
        what = "lr · weight decay is not constant: that"
    return f"{what} of {pattern([worst['module']])} goes as width^{worst['slope']:+.2f}"


def _kind(failed: pd.DataFrame) -> str:
    return "epsilon" if (failed["statistic"] == "gradient").any() else "decay"


def _why(worst: pd.Series, axis: str) -> str:
    if axis == "depth":
        return (
            "its residual branches are not scaled with the depth" if worst["slope"] > 0 else "its layers stop learning"
        )
    if worst["statistic"] in ("change", "update", "step") and worst["slope"] > 0:
        # Logits also follow the features' change through the readout's initial weights.
        own = "or initial weights do not" if worst["role"] == "output" else "does not"
        return f"its learning rate {own} shrink with width"
    if worst["statistic"] in ("change", "update", "step"):
        return "its updates fade with width"
    if worst["slope"] > 0:
        return (
            "its initial weights are not scaled with the fan-in, or a number in the forward pass grows with the width"
        )
    return "its initial weights, or what enters it, shrink too fast"
