"""False alarms of the coordinate check on healthy models that it was not developed on: see coordinate_models.py.

Every verdict has seeds of its own: 4 widths from 32 or from 64 on, 2 steps, 3 seeds and up to 12 while undecided. A row is
written as it is reached, so an interrupted script goes on where it was. "undecided" is right where widths are too narrow to tell.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import pandas as pd
import torch
from coordinate_models import DEVELOPED_ON, MODELS
from coordinate_power import interval
from harness import Claim, publish

from mutransfer.coord_check import judge_coordinates
from mutransfer.errors import RequestError
from mutransfer.tracing.observe import observe

WIDTHS = {"32-256": (32, 64, 128, 256), "64-512": (64, 128, 256, 512)}
KINDS = ("adamw", "sgd")
COLUMNS = ["model", "optimizer", "widths", "group", "status", "widen", "seeds", "seconds", "cause"]


def measure(given: argparse.Namespace) -> pd.DataFrame:
    """Reach every missing verdict, a group of seeds at a time, so that every table on the way is balanced."""
    done = pd.read_csv(given.out, dtype={"cause": str}) if given.out.exists() else pd.DataFrame(columns=COLUMNS)
    have = set(done[["model", "optimizer", "widths", "group"]].itertuples(index=False, name=None))
    todo = [
        (model, optimizer, widths, group)
        for group in range(given.groups)
        for widths in WIDTHS
        for model in given.models
        for optimizer in KINDS
    ]
    for i, (model, optimizer, widths, group) in enumerate(todo):
        if (model, optimizer, widths, group) in have:
            continue
        family = MODELS[model](WIDTHS[widths][0])
        block = zlib.crc32(f"{model} {optimizer} {widths}".encode()) % 2**20
        options = {"seeds": 3, "most": 12, "steps": 2, "first": block * 2**12 + group * 12}
        try:
            found = judge_coordinates(family, WIDTHS[widths], "mup", optimizer, observation=observe(family), **options)
        except RequestError as error:
            raise SystemExit(f"{model}: {error}") from error
        verdict = found.verdict
        row = [model, optimizer, widths, group, verdict.status, verdict.widen, found.seeds, round(found.seconds, 1)]
        row.append("" if verdict.cause is None else verdict.cause[:300])
        done.loc[len(done)] = row
        given.out.parent.mkdir(parents=True, exist_ok=True)
        line = pd.DataFrame([row], columns=COLUMNS).to_csv(index=False, header=not given.out.exists())
        with given.out.open("a", encoding="utf-8") as file:
            file.write(line)
        print(f"{i + 1}/{len(todo)}", *row, flush=True)
    return done


def shares(done: pd.DataFrame) -> list[Claim]:
    """Return the claims: per optimizer the share of false alarms on held-out models, and as a number the undecided ones."""
    claims = []
    held_out = done[~done["model"].isin(DEVELOPED_ON)]
    for (optimizer, widths), rows in [*held_out.groupby(["optimizer", "widths"])]:
        hits, n = int(rows["status"].eq("fail").sum()), len(rows)
        claims.append(
            Claim(f"{optimizer}, {widths} ({n}): false alarms", hits / n, *interval(hits, n), 0.01, hits / n <= 0.01)
        )
        hits = int(rows["status"].eq("undecided").sum())
        claims.append(Claim(f"{optimizer}, {widths} ({n}): undecided", hits / n, *interval(hits, n), 1.0, True))
    return claims


def main() -> None:
    """Measure what is missing and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="does it run: one verdict of one small model")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--groups", type=int, default=20, help="groups of seeds per model, optimizer and widths")
    parser.add_argument("--out", type=Path, default=Path("runs/coordinate_healthy.csv"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        given.models, given.groups = ["mixer"], 1
        given.out = given.out.with_name("coordinate_healthy_quick.csv")
        given.out.unlink(missing_ok=True)
    publish(shares(measure(given)), given.json)


if __name__ == "__main__":
    main()
