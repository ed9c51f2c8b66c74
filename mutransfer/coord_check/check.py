"""Run a coordinate check: record, judge, and add seeds while the verdict is undecided; also as an assertion for a test suite."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from ..family import Family
from ..optimizers.rules import OPTIMIZERS
from ..parametrizations.tables import table
from ..tracing.observe import observe
from ..tracing.specs import Observation
from .recording import OWN, record
from .verdicts import Verdict, verdict

__all__ = ["Check", "PATIENCE", "assert_coordinates_hold", "judge"]

PATIENCE = 4  # an undecided check adds seeds up to this many times the first ones


@dataclass(frozen=True, eq=False)
class Check:
    """A verdict with the frame behind it (schema COORDINATES), the seeds it took, and the seconds."""

    verdict: Verdict
    coordinates: pd.DataFrame
    seeds: int
    seconds: float


def judge(
    family: Family,
    widths: Sequence[int] = (),
    parametrization: str = "mup",
    optimizer: str = "adamw",
    *,
    seeds: int = 5,
    first: int = 0,
    patience: int = PATIENCE,
    most: int | None = None,
    more: Callable[[int, int, Verdict], None] = lambda done, adding, judged: None,
    **options: Any,
) -> Check:
    """Record ``family`` and judge it; an open verdict adds as many seeds again, up to ``patience`` times the first ones.

    Args:
        family: what to check.
        widths: as in `record`.
        parametrization: as in `record`.
        optimizer: as in `record`.
        seeds: to begin with.
        first: the first seed's number.
        patience: 1 to take what the first seeds say.
        most: seeds in all at most, in place of ``patience``.
        more: called with (seeds so far, seeds to add, the open verdict) before more are added.
        options: further arguments of `record`.

    Raises:
        RequestError: as `record`.
    """
    begun = time.perf_counter()
    tell = options.pop("progress", lambda done, total: None)
    frames: list[pd.DataFrame] = []
    reason = None
    if len(set(widths)) > 1 and parametrization != OWN:
        options["observation"] = options.get("observation") or observe(family)
        reason = _mixed(options["observation"], parametrization, optimizer)
    bound, done, runs = patience * seeds if most is None else most, 0, 0
    while True:
        adding = max(1, min(seeds, bound - done))
        chosen = range(first + done, first + done + adding)
        so_far = partial(lambda before, now, total: tell(before + now, before + total), runs)
        frames.append(record(family, widths, parametrization, optimizer, seeds=chosen, progress=so_far, **options))
        runs += adding * len(frames[-1][["width", "depth"]].drop_duplicates())
        done += adding
        frame = pd.concat(frames, ignore_index=True)
        judged = verdict(frame)
        if reason is not None:
            judged = replace(judged, status="fail", cause=reason, fault="mixed-columns")
        if judged.status != "undecided" or judged.widen or done >= bound:
            break
        more(done, min(seeds, bound - done), judged)
    return Check(judged, frame, done, time.perf_counter() - begun)


def _mixed(seen: Observation, parametrization: str, optimizer: str) -> str | None:
    """Return what is wrong with one ratio for columns of two kinds, which a given role insists on.

    A matrix's update as a whole does not show it: there are more growing columns than fixed ones.
    """
    rows, column = table(parametrization).rows, OPTIMIZERS[optimizer].column if optimizer in OPTIMIZERS else "adam"
    for name, spec in seen.specs.items():
        if not (spec.columns and spec.insisted):
            continue
        growing, fixed = (rows[role].lr(column) for role in (spec.role, spec.role_of_fixed))
        if growing(2.0, 2.0) != fixed(1.0, 2.0):
            return (
                f"the columns of {name} {list(spec.shape)} are of two kinds and have one ratio, as its role is given: "
                f"{spec.describe_columns(spec.shape)}, and a learning rate that is right for the former lets the update of the "
                f"latter fade with the width. Leave the role to be seen, or split the layer in two."
            )
    return None


def assert_coordinates_hold(
    family: Family,
    widths: Sequence[int] = (64, 128, 256, 512),
    parametrization: str = "mup",
    optimizer: str = "adamw",
    **options: Any,
) -> Check:
    """Assert that every module's size, and its change, moves with the width as stable feature learning needs.

    Args:
        family: what to check; its base is where µP changes nothing.
        widths: at least two; the base's family has to build at each. Leave it empty and pass ``depths`` for a check over depths.
        parametrization: as in `record`; "own" for a model that brings its own initialization.
        optimizer: as in `record`.
        options: further arguments of `coordinates.judge`, such as seeds, lr and steps.

    Returns:
        The check, whose ``coordinates`` can be kept.

    Raises:
        AssertionError: the verdict is not "pass": the cause, and the rows that do not hold.
        RequestError: as `record`.
    """
    check = judge(family, widths, parametrization, optimizer, **options)
    found = check.verdict
    if found.status != "pass":
        rows = found.slopes[~found.slopes["ok"].fillna(False).astype(bool)]
        columns = ["module", "role", "statistic", "step", "slope", "low", "high", "expected"]
        text = rows[columns].to_string(index=False, float_format="{:+.2f}".format)
        raise AssertionError(f"the coordinate check of {family.name} is {found.status}: {found.cause}\n{text}")
    return check
