"""Write the report of a run: one HTML file with its tables and its data as download links, and the figures as PNG files."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mutransfer.errors import FrameError
from mutransfer.io import write_text
from mutransfer.recipe import Recipe
from mutransfer.reports.contents import RunContents
from mutransfer.reports.coord_check_figure import CoordinateFigure
from mutransfer.reports.search_figures import HistoryFigure, ImportanceFigure, ParallelFigure, SliceFigure
from mutransfer.reports.style import ReportFigure, interval, label, number, percent, power_of_two, regret
from mutransfer.reports.summary import answers, facts, findings, overall
from mutransfer.reports.transfer_figures import BasinFigure, PlanFigure, WiderFigure
from mutransfer.schemas import OPTIMA, PARAMETERS, SLOPES, varying

__all__ = [
    "BUDGET",
    "Download",
    "HtmlTable",
    "cell",
    "comparison_table",
    "download",
    "downloads",
    "draw_figures",
    "environment_table",
    "optimum_table",
    "parameter_table",
    "recipe_table",
    "slope_table",
    "throughput_table",
    "write_report",
]

MOST_ROWS = 2000


@dataclass(frozen=True)
class HtmlTable:
    """Header cells (name, meaning) and rows of (text, sort key); ``left_out`` counts the rows that are only in the CSV."""

    header: list[tuple[str, str]]
    rows: list[list[tuple[str, str]]]
    left_out: int = 0


def cell(text: str, key: object = None) -> tuple[str, str]:
    """Return a cell: its text, and its sort key (by default the text; NA and NaN are sorted last)."""
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


LARGEST_PLAIN = 200_000
BUDGET = 1_400_000  # total characters of all links: a page of 3 MB has to hold the figures and tables as well
KINDS = {"csv": "text/csv;charset=utf-8", "json": "application/json", "yaml": "text/yaml;charset=utf-8"}


@dataclass(frozen=True)
class Download:
    """Name of a file and the ``data:`` URI with its content; the URI is empty if the file is too large for the page."""

    name: str
    uri: str


def download(name: str, content: str) -> Download:
    """Return ``content`` as a link; long content is compressed with gzip, and ``.gz`` is appended to its name."""
    raw, kind = content.encode(), KINDS[name.rpartition(".")[2]]
    if len(raw) > LARGEST_PLAIN:
        raw, name, kind = gzip.compress(raw, mtime=0), f"{name}.gz", "application/gzip"
    return Download(name, f"data:{kind};base64,{base64.b64encode(raw).decode()}")


def downloads(files: dict[str, str], budget: int = BUDGET) -> list[Download]:
    """Return one link per file (name → content), in the given order.

    The smallest files are embedded first. A file that no longer fits the ``budget`` gets an empty link, and is found in the run
    folder only.
    """
    made = {name: download(name, content) for name, content in files.items()}
    for name in sorted(made, key=lambda name: len(made[name].uri)):
        budget -= len(made[name].uri)
        if budget < 0:
            made[name] = Download(name, "")
    return list(made.values())


FIGURES = {"basins", "wider", "coordinates", "history", "slices", "importances", "parallel", "planned"}
HERE = Path(__file__).parent


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html``, its figures (``plots/*.png``) and their numbers (CSV), and return the path of the page.

    Reads coordinates.csv, basins.csv, trials.csv, experiment.yaml, best.json, target.json, environment.json, verify.json,
    repeats.csv and check.json, if they exist. For each missing part the page says in one line what is missing and which
    command creates it. For an unfinished command it says how much is done, and draws no conclusions from partial results.

    Raises:
        RequestError: if the folder does not exist or contains none of these files, if a file does not hold what its
            name says (trials.csv is not a table of trials, for example), or if the disk is full.
    """
    run = RunContents.read(Path(folder))
    verdict, optima, notes = _analysed(run)
    slopes = None if verdict is None else verdict.slopes
    figures = draw_figures(run, slopes, optima, notes)
    for name, figure in figures.items():
        figure.save(run.path / "plots" / f"{name}.png")
    for name in FIGURES - figures.keys():  # left over from an earlier report
        (run.path / "plots" / f"{name}.png").unlink(missing_ok=True)
    made = {"slopes": slopes, "optima": optima, "parameters": run.parameters}
    for name, rows in made.items():
        if rows is not None:
            write_text(run.path / f"{name}.csv", rows.to_csv(index=False))
        else:
            (run.path / f"{name}.csv").unlink(missing_ok=True)
    return write_text(run.path / "report.html", _render(run, verdict, optima, figures, notes))


def _analysed(run: RunContents) -> tuple[Any | None, pd.DataFrame | None, dict[str, str]]:
    """Return the coordinate check's verdict, the optima, and sentences on what could not be computed.

    Verdict and optima need scipy and the core, which a report on trials alone does not import.
    """
    verdict, optima, notes = None, None, {}
    if run.coordinates is not None:
        from mutransfer.coord_check import verdict as judge

        try:
            verdict = judge(run.coordinates[run.coordinates["parametrization"] == run.checked])
        except FrameError as error:
            notes["coordinates"] = f"No slopes from coordinates.csv: {error}"
    if run.basins is not None and run.verify.get("verdict"):  # without a verdict the optima may still move
        from mutransfer.basins import REGRET_LIMIT
        from mutransfer.basins import optima as fit

        transferred = run.verify.get("transferred_log2_lr")
        rows = run.judged_basins
        assert rows is not None
        try:
            limit = (run.verify.get("limits") or {}).get("regret", REGRET_LIMIT)
            carried = None if transferred is None else float(transferred)
            optima = fit(rows, carried, maximize=run.maximize, regret_limit=float(limit))
        except FrameError as error:
            notes["basins"] = f"No optima from basins.csv: {error}"
    return verdict, optima, notes


def draw_figures(
    run: RunContents, slopes: pd.DataFrame | None, optima: pd.DataFrame | None, notes: dict[str, str]
) -> dict[str, ReportFigure]:
    """Return the figures that can be drawn; add a sentence to ``notes`` for each that cannot although its file exists."""
    wanted: dict[str, Callable[[], ReportFigure]] = {}
    basins = run.judged_basins
    if basins is not None and len(basins):
        drawn = OPTIMA.frame([]) if optima is None else optima
        wanted["basins"] = functools.partial(BasinFigure, basins, drawn, seeds=run.seeds_planned)
    if basins is not None and optima is not None:
        wanted["wider"] = functools.partial(WiderFigure, basins, optima, maximize=run.maximize)
    if run.coordinates is not None and slopes is not None and len(slopes):
        wanted["coordinates"] = functools.partial(CoordinateFigure, run.coordinates, slopes)
    if run.trials is not None:
        searched: dict[str, Callable[..., ReportFigure]] = {
            "history": HistoryFigure,
            "slices": SliceFigure,
            "importances": ImportanceFigure,
            "parallel": ParallelFigure,
        }
        wanted |= {
            name: functools.partial(figure, run.trials, maximize=run.maximize) for name, figure in searched.items()
        }
    if run.parameters is not None:
        wanted["planned"] = functools.partial(PlanFigure, run.parameters)
    figures = {}
    for name, make in wanted.items():
        try:
            figures[name] = make()
        except FrameError as error:
            notes.setdefault(name, f"Not drawn: {error}")
    return figures


def _render(
    run: RunContents,
    verdict: Any | None,
    optima: pd.DataFrame | None,
    figures: dict[str, ReportFigure],
    notes: dict[str, str],
) -> str:
    slopes = None if verdict is None else verdict.slopes
    found = findings(run, verdict)
    # Leave out warnings about missing verification: it may have been done since, and the findings show the current state.
    unproven = set((run.target.get("provenance") or {}).get("unproven") or ())
    warnings = [str(warning) for warning in run.target.get("warnings") or [] if warning not in unproven]
    script = (HERE / "report.js").read_text(encoding="utf-8")
    compared = run.verify.get("comparison") or []
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        run=run,
        overall=overall(found, warnings),
        findings=found,
        answers=answers(run, run.judged_basins),
        facts=facts(run, optima),
        notes=notes,
        along=None if run.coordinates is None else varying(run.coordinates),
        comparison=comparison_table(compared) if compared else None,
        conclusion=(run.verify.get("control") or {}).get("conclusion"),
        recipe=recipe_table(run.recipe) if run.recipe else None,
        optima=optimum_table(optima) if optima is not None else None,
        figures={name: (figure.title, Markup(figure.svg(name)), figure.caption) for name, figure in figures.items()},
        slopes=slope_table(slopes) if slopes is not None else None,
        parameters=parameter_table(run.parameters) if run.parameters is not None else None,
        throughput=throughput_table(run.trials, run.basins),
        warnings=warnings,
        remarks=[str(note) for note in run.target.get("notes") or []],
        environment=environment_table(run.facts) if run.environment else None,
        files=downloads(_files(run, slopes, optima)),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _files(run: RunContents, slopes: pd.DataFrame | None, optima: pd.DataFrame | None) -> dict[str, str]:
    """Return the files that the page offers for download: every frame as CSV, and the files of the run folder."""
    frames = {"coordinates": run.coordinates, "slopes": slopes, "basins": run.basins, "optima": optima}
    frames |= {"trials": run.trials, "parameters": run.parameters}
    files = {f"{name}.csv": rows.to_csv(index=False) for name, rows in frames.items() if rows is not None}
    names = ["experiment.yaml", *(f"{name}.json" for name in ("best", "target", "verify", "check", "environment"))]
    present = [name for name in names if (run.path / name).is_file()]
    return files | {name: (run.path / name).read_text(encoding="utf-8") for name in present}
