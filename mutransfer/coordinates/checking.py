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
        if judged.status != "undecided" or judged.widen or done >= bound:
            break
        more(done, min(seeds, bound - done), judged)
    return Check(judged, frame, done, time.perf_counter() - begun)
