"""Run a coordinate check, adding seeds while the verdict is undecided; also available as an assertion for test suites."""

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

__all__ = ["Check", "PATIENCE", "assert_coordinates_hold", "judge_coordinates"]

PATIENCE = 4  # an undecided check uses up to this many times the initial number of seeds


@dataclass(frozen=True, eq=False)
class Check:
    """A verdict, the frame it is based on (schema COORDINATES), the number of seeds used, and the time taken in seconds."""

    verdict: Verdict
    coordinates: pd.DataFrame
    seeds: int
    seconds: float


def judge_coordinates(
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
    """Record the coordinates of ``family`` and judge them; while the verdict is undecided, add ``seeds`` more seeds.

    No seeds are added if wider models would decide the verdict sooner.

    Args:
        family: the model family to check.
        widths: as in `record`.
        parametrization: as in `record`.
        optimizer: as in `record`.
        seeds: number of seeds to start with.
        first: the first seed.
        patience: limit on the total number of seeds, in multiples of ``seeds``; 1 accepts the first verdict.
        most: limit on the total number of seeds, in place of ``patience``.
        more: called with (seeds so far, seeds to add, the undecided verdict) before seeds are added.
        options: further arguments of `record`.

    Raises:
        RequestError: as `record`.
    """
    started = time.perf_counter()
    report_progress = options.pop("progress", lambda done, total: None)
    frames: list[pd.DataFrame] = []
    reason = None
    if len(set(widths)) > 1 and parametrization != OWN:
        options["observation"] = options.get("observation") or observe(family)
        reason = _mixed_columns(options["observation"], parametrization, optimizer)
    bound, done, runs = patience * seeds if most is None else most, 0, 0
    while True:
        adding = max(1, min(seeds, bound - done))
        chosen = range(first + done, first + done + adding)
        so_far = partial(lambda before, now, total: report_progress(before + now, before + total), runs)
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
    return Check(judged, frame, done, time.perf_counter() - started)


def _mixed_columns(seen: Observation, parametrization: str, optimizer: str) -> str | None:
    """Return an error message if an explicit role forces one ratio on both growing and fixed columns, else None.

    The update of the matrix as a whole does not reveal this, because growing columns outnumber fixed ones.
    """
    rows, column = table(parametrization).rows, OPTIMIZERS[optimizer].column if optimizer in OPTIMIZERS else "adam"
    for name, spec in seen.specs.items():
        if not (spec.columns and spec.insisted):
            continue
        growing, fixed = (rows[role].lr(column) for role in (spec.role, spec.role_of_fixed))
        if growing(2.0, 2.0) != fixed(1.0, 2.0):
            return (
                f"the columns of {name} {list(spec.shape)} are of two kinds but share one ratio, because its role was set "
                f"explicitly: {spec.describe_columns(spec.shape)}, and with a learning rate that is right for the former, the "
                f"updates of the latter shrink as the width grows. Leave the role to be inferred, or split the layer in two."
            )
    return None


def assert_coordinates_hold(
    family: Family,
    widths: Sequence[int] = (64, 128, 256, 512),
    parametrization: str = "mup",
    optimizer: str = "adamw",
    **options: Any,
) -> Check:
    """Assert that outputs, their changes and the parameters' updates have the scaling that stable feature learning requires.

    Args:
        family: the model family to check; µP changes nothing at its base.
        widths: at least two; the family must build at each. Pass an empty sequence and ``depths`` for a check over depths.
        parametrization: as in `record`; "own" for a model that sets its own initialization.
        optimizer: as in `record`.
        options: further arguments of `judge_coordinates`, such as seeds, lr and steps.

    Returns:
        The check; its ``coordinates`` can be saved.

    Raises:
        AssertionError: the verdict is not "pass"; the message gives the cause and the rows that do not hold.
        RequestError: as `record`.
    """
    check = judge_coordinates(family, widths, parametrization, optimizer, **options)
    found = check.verdict
    if found.status != "pass":
        rows = found.slopes[~found.slopes["ok"].fillna(False).astype(bool)]
        columns = ["module", "role", "statistic", "step", "slope", "low", "high", "expected"]
        text = rows[columns].to_string(index=False, float_format="{:+.2f}".format)
        raise AssertionError(
            f"the verdict of the coordinate check of {family.name} is {found.status}: {found.cause}\n{text}"
        )
    return check
