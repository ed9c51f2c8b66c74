"""Convert frames to HTML tables: the text and sort key of each cell, and the meaning of each column."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mutransfer.recipe import Recipe
from mutransfer.reports.style import interval, label, number, percent, power_of_two, regret
from mutransfer.schemas import OPTIMA, PARAMETERS, SLOPES

__all__ = [
    "HtmlTable",
    "cell",
    "comparison_table",
    "environment_table",
    "optimum_table",
    "parameter_table",
    "recipe_table",
    "slope_table",
    "throughput_table",
]

MOST_ROWS = 2000


@dataclass(frozen=True)
class HtmlTable:
    """Header cells (name, meaning) and rows of (text, sort key); ``left_out`` counts the rows that are only in the CSV."""

    header: list[tuple[str, str]]
    rows: list[list[tuple[str, str]]]
    left_out: int = 0


def cell(text: str, key: object = None) -> tuple[str, str]:
    """Return a cell: its text, and its sort key (the text unless ``key`` is given; missing keys are sorted last)."""
    return text, text if key is None else "" if key is pd.NA or key != key else str(key)


def optimum_table(optima: pd.DataFrame) -> HtmlTable:
    """Return the optima (schema OPTIMA): best lr, drift, losses and regret per parametrization and width."""
    about = {name: meaning for name, (_, meaning) in OPTIMA.columns.items()}
    header = [
        ("parametrization", about["parametrization"]),
        ("width", about["width"]),
        ("best lr", about["log2_lr"]),
        ("drift, octaves [95%]", about["drift"]),
        ("loss at own best lr", about["best_loss"]),
        ("loss at transferred lr", about["transferred_loss"]),
        ("regret [95%]", about["regret"]),
    ]
    rows = []
    for row in optima.itertuples():
        reference = row.drift == row.drift_low == row.drift_high == 0
        transferred = "diverged" if math.isinf(row.transferred_loss) else number(row.transferred_loss)
        cells = [
            cell(label(row.parametrization)),
            cell(str(row.width)),
            cell(power_of_two(row.log2_lr) + (" (edge of the grid)" if row.at_edge else ""), row.log2_lr),
            cell("reference" if reference else interval(row.drift, row.drift_low, row.drift_high), row.drift),
            cell(number(row.best_loss)),
            cell("not run" if math.isnan(row.transferred_loss) else transferred, row.transferred_loss),
            cell(regret(row.regret, row.regret_low, row.regret_high), row.regret),
        ]
        rows.append(cells)
    return HtmlTable(header, rows)


def comparison_table(rows: list[dict[str, Any]]) -> HtmlTable:
    """Return the runs at the widest width: lr, loss with its interval, and difference from the first row.

    The difference is paired by seed, with the interval over the pairs, if the run folder has paired differences.
    """
    header = [
        ("run", "parametrization, and where its hyperparameters came from"),
        ("lr", "base learning rate"),
        ("mean loss", "validation loss, mean over seeds"),
        ("95% of the mean", "interval of the mean over seeds, Student's t"),
        ("minus the first", "difference in loss from the first row, paired by seed, with its 95% interval"),
        ("relative", "difference divided by the first row's loss"),
    ]
    table = []
    first = _float(rows[0].get("loss")) if rows else math.nan
    for row in rows:
        loss, low, high = (_float(row.get(key)) for key in ("loss", "low", "high"))
        difference, least, most = (_float(row.get(f"difference{end}")) for end in ("", "_low", "_high"))
        if math.isnan(difference) and row is not rows[0]:  # written by a version that did not pair the runs
            difference = loss - first
        table.append(
            [
                cell(str(row.get("label", ""))),
                cell(power_of_two(_float(row.get("log2_lr"))), row.get("log2_lr")),
                cell("diverged" if math.isnan(loss) else number(loss), loss),
                cell("–" if math.isnan(low) or math.isnan(high) else f"{number(low)} to {number(high)}", low),
                cell(interval(difference, least, most, 4), difference),
                cell("–" if row is rows[0] or not first > 0 else percent(difference / first)),
            ]
        )
    return HtmlTable(header, table)


def slope_table(slopes: pd.DataFrame) -> HtmlTable:
    """Return the slopes (schema SLOPES), with the failing ones first."""
    outcomes = {True: "✓ holds", False: "✗ fails", None: "? not enough evidence"}
    columns = ["module", "role", "statistic", "step", "slope", "expected", "declared", "ok"]
    names = {"slope": "slope [95%]", "ok": "outcome"}
    header = [(names.get(name, name), SLOPES.columns[name][1]) for name in columns]
    rows = []
    for row in (
        slopes.assign(rank=slopes["ok"].map({False: 0, True: 2}).fillna(1))
        .sort_values("rank", kind="stable")
        .itertuples()
    ):
        outcome = outcomes[None if row.ok is pd.NA else bool(row.ok)]
        cells = [cell(str(getattr(row, name))) for name in columns]
        cells[4] = cell(interval(row.slope, row.low, row.high), row.slope)
        cells[5:7] = [cell(_range(text), text) for text in (row.expected, row.declared)]
        cells[7] = cell(outcome)
        rows.append(cells)
    return HtmlTable(header, rows[:MOST_ROWS], max(len(rows) - MOST_ROWS, 0))


def parameter_table(parameters: pd.DataFrame) -> HtmlTable:
    """Return the settings per parameter (schema PARAMETERS)."""
    header = [(name.replace("_", " "), meaning) for name, (_, meaning) in PARAMETERS.columns.items()]
    shown = parameters.head(MOST_ROWS)
    rows = [[cell(number(value), value) for value in row] for row in shown[list(PARAMETERS.columns)].values.tolist()]
    return HtmlTable(header, rows, len(parameters) - len(shown))


def recipe_table(recipe: Recipe) -> HtmlTable:
    """Return the recipe's values next to the defaults; a default is shown only where the recipe differs from it."""
    default = {**Recipe().model_dump(mode="json"), "method": str(Recipe().method)}
    values = {**recipe.model_dump(mode="json"), "method": str(recipe.method)}
    rows = []
    for key, value in values.items():
        text = f"{_value(value)} ({power_of_two(math.log2(value))})" if key == "lr" else _value(value)
        rows.append([cell(key), cell(text), cell("same" if value == default[key] else _value(default[key]))])
    return HtmlTable([("setting", "at base scale"), ("value", "as tuned"), ("default", "before tuning")], rows)


def environment_table(content: dict[str, Any], prefix: str = "") -> HtmlTable:
    """Return nested keys and values as one flat table, with dotted keys."""
    rows: list[list[tuple[str, str]]] = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            rows += environment_table(value, f"{prefix}{key}.").rows
        else:
            rows.append([cell(f"{prefix}{key}"), cell(value if isinstance(value, str) else _value(value))])
    return HtmlTable([("key", ""), ("value", "")], rows)


def _range(text: str) -> str:
    low, _, high = str(text).replace("-", "−").partition("..")
    if low == high or not high:
        return low
    return f"up to {high}" if low == "−inf" else f"{low} to {high}"


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_value(entry) for entry in value)
    if isinstance(value, dict | bool):
        return json.dumps(value, ensure_ascii=False)
    return number(value) if isinstance(value, float) or value is None else str(value)


def throughput_table(trials: pd.DataFrame | None, basins: pd.DataFrame | None) -> HtmlTable | None:
    """Return the throughput of the tuning trials, and of the verification runs per parametrization and width.

    Rates are computed from the seconds of the individual runs, as if they had run one after the other, because the frames do
    not record how many ran in parallel. Return None if no run has a time.
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
        ("runs of", "the command that ran them, and the model"),
        ("runs", "number of finished runs, including pruned and diverged ones"),
        ("seconds per run", "mean wall-clock time"),
        ("runs per minute", "if run one after the other"),
        ("FLOP/s", "floating point operations per second while running; products only, as in the price"),
        ("seconds in all", "sum over the runs"),
    ]
    return HtmlTable(header, known) if known else None


def _row(name: str, runs: pd.DataFrame) -> list[tuple[str, str]]:
    seconds, counted = float(runs["seconds"].sum()), runs.dropna(subset=["flops"])
    if not seconds > 0:
        return []
    rate = float(counted["flops"].sum()) / float(counted["seconds"].sum()) if len(counted) else float("nan")
    numbers = [len(runs), seconds / len(runs), 60 * len(runs) / seconds, rate, seconds]
    return [cell(name), *(cell(number(value), value) for value in numbers)]
