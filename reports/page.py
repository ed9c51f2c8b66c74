"""Write the report of a run: one self-contained HTML file with its data as download links, and the figures as PNG files."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
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
from mutransfer.reports.contents import RunContents
from mutransfer.reports.coord_check_figure import CoordinateFigure
from mutransfer.reports.html_tables import (
    comparison_table,
    environment_table,
    optimum_table,
    parameter_table,
    recipe_table,
    slope_table,
    throughput_table,
)
from mutransfer.reports.plan_figure import PlanFigure
from mutransfer.reports.search_figures import HistoryFigure, ImportanceFigure, ParallelFigure, SliceFigure
from mutransfer.reports.style import ReportFigure
from mutransfer.reports.summary import answers, facts, findings, overall
from mutransfer.reports.transfer_figures import BasinFigure, WiderFigure
from mutransfer.schemas import OPTIMA, varying

__all__ = ["BUDGET", "Download", "download", "downloads", "draw_figures", "write_report"]

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
