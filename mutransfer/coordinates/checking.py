"""Record and judge, and go on adding seeds while the evidence does not tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from ..family import Family
from .recording import record
from .verdicts import Verdict, verdict

__all__ = ["PATIENCE", "Check", "judge"]

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
    more: Callable[[int, int], None] = lambda done, adding: None,
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
        more: called with (seeds so far, seeds to add) before more are added.
        options: further arguments of `record`.

    Raises:
        RequestError: as `record`.
    """
    begun = time.perf_counter()
    tell = options.pop("progress", lambda done, total: None)
    frames: list[pd.DataFrame] = []
    for repeat in range(patience):
        chosen = range(first + repeat * seeds, first + (repeat + 1) * seeds)
        so_far = partial(lambda repeat, done, total: tell(repeat * total + done, (repeat + 1) * total), repeat)
        frames.append(record(family, widths, parametrization, optimizer, seeds=chosen, progress=so_far, **options))
        frame = pd.concat(frames, ignore_index=True)
        judged = verdict(frame)
        if judged.status != "undecided" or judged.widen:
            break
        if repeat + 1 < patience:
            more((repeat + 1) * seeds, seeds)
    return Check(judged, frame, len(frames) * seeds, time.perf_counter() - begun)
