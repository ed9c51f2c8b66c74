"""How fast the runs were: trials per minute and floating point operations per second, from what every run noted."""

from __future__ import annotations

import pandas as pd

from mutransfer.reports.cells import Table, cell
from mutransfer.reports.words import label, number

__all__ = ["throughput_table"]


def throughput_table(trials: pd.DataFrame | None, basins: pd.DataFrame | None) -> Table | None:
    """Return the speed of the tuning's trials, and of the verification's runs per parametrization and width.

    Rates are over the runs' own seconds, as if they were done one after the other: how many were done side by side is not in
    the frames. None without any run that has a time.
    """
    groups: list[tuple[str, pd.DataFrame]] = []
    if trials is not None:
        groups.append(("tuning, the proxy", trials[trials["state"].isin(["COMPLETE", "PRUNED"])]))
    if basins is not None:
        for (name, width), rows in basins.groupby(["parametrization", "width"]):
            groups.append((f"verify, {label(str(name))}, width {width}", rows))
    rows = [_row(name, runs.dropna(subset=["seconds"])) for name, runs in groups]
    known = [row for row in rows if row]
    header = [
        ("runs of", "which command made them, on which model"),
        ("runs", "that ended, pruned and diverged ones included"),
        ("seconds per run", "mean wall-clock time"),
        ("runs per minute", "one after the other"),
        ("FLOP/s", "floating point operations per second while running; products only, as in the price"),
        ("seconds in all", "sum over the runs"),
    ]
    return Table(header, known) if known else None


def _row(name: str, runs: pd.DataFrame) -> list[tuple[str, str]]:
    seconds, counted = float(runs["seconds"].sum()), runs.dropna(subset=["flops"])
    if not seconds > 0:
        return []
    rate = float(counted["flops"].sum()) / float(counted["seconds"].sum()) if len(counted) else float("nan")
    numbers = [len(runs), seconds / len(runs), 60 * len(runs) / seconds, rate, seconds]
    return [cell(name), *(cell(number(value), value) for value in numbers)]
