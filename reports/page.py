"""The report of a run: one HTML file that needs nothing else, the figures as PNG beside it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mutransfer.errors import RequestError
from mutransfer.files import write_text
from mutransfer.reports.basins import BasinFigure
from mutransfer.reports.cells import (
    comparison_table,
    environment_table,
    optimum_table,
    parameter_table,
    recipe_table,
    slope_table,
)
from mutransfer.reports.contents import RunContents
from mutransfer.reports.coordinates import CoordinateFigure
from mutransfer.reports.figure import ReportFigure
from mutransfer.reports.history import HistoryFigure
from mutransfer.reports.summary import facts, findings, overall
from mutransfer.reports.wider import WiderFigure

__all__ = ["download", "write_report"]

HERE = Path(__file__).parent
LARGEST_PLAIN = 200_000


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder from what is there; return the page's path.

    Read are coordinates.csv, basins.csv, trials.csv, best.json, target.json, environment.json, verify.json and
    check.json. The page says in one line what is missing and which command makes it.

    Raises:
        RequestError: no such folder, none of these files in it, a file that does not hold what its name says, or a
            disk that is full.
    """
    run = RunContents.read(Path(folder))
    verdict, optima, notes = _analysed(run)
    figures = _figures(run, None if verdict is None else verdict.slopes, optima)
    for name, figure in figures.items():
        figure.save(run.path / "plots" / f"{name}.png")
    for name, rows in (("slopes", None if verdict is None else verdict.slopes), ("optima", optima)):
        if rows is not None:
            write_text(run.path / f"{name}.csv", rows.to_csv(index=False))
    return write_text(run.path / "report.html", _render(run, verdict, optima, figures, notes))


def download(name: str, content: str) -> tuple[str, str]:
    """Return a file name and a ``data:`` URI that holds ``content``; a long one is compressed, and its name says so."""
    raw = content.encode()
    kind = "text/csv;charset=utf-8" if name.endswith(".csv") else "application/json"
    if len(raw) > LARGEST_PLAIN:
        raw, name, kind = gzip.compress(raw, mtime=0), f"{name}.gz", "application/gzip"
    return name, f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def _analysed(run: RunContents) -> tuple[Any | None, pd.DataFrame | None, dict[str, str]]:
    """Return the coordinate check's verdict, the optima, and sentences on what could not be computed.

    Both need scipy and the core; a report of trials alone imports neither.
    """
    verdict, optima, notes = None, None, {}
    if run.coordinates is not None:
        from mutransfer.coordinates import verdict as judge

        try:
            verdict = judge(run.coordinates[run.coordinates["parametrization"] == run.checked])
        except RequestError as error:
            notes["coordinates"] = f"No slopes from coordinates.csv: {error}"
    if run.basins is not None:
        from mutransfer.basins import optima as fit

        transferred = run.verify.get("transferred_log2_lr")
        rows = judged_basins(run)
        try:
            optima = fit(rows, None if transferred is None else float(transferred))
        except RequestError as error:
            notes["basins"] = f"No optima from basins.csv: {error}"
    return verdict, optima, notes


def judged_basins(run: RunContents) -> pd.DataFrame:
    """Return the basins that verify.json judged: the file may hold runs of other seeds and widths as well."""
    assert run.basins is not None
    rows, widths, seeds = run.basins, run.verify.get("widths"), run.verify.get("seeds")
    if widths is None or seeds is None:
        return rows
    return rows[rows["width"].isin(widths) & (rows["seed"] < seeds)]


def _figures(run: RunContents, slopes: pd.DataFrame | None, optima: pd.DataFrame | None) -> dict[str, ReportFigure]:
    figures: dict[str, ReportFigure] = {}
    if run.basins is not None and optima is not None:
        figures["basins"] = BasinFigure(judged_basins(run), optima)
        if len(optima):
            figures["wider"] = WiderFigure(judged_basins(run), optima)
    if run.coordinates is not None and slopes is not None and len(slopes):
        figures["coordinates"] = CoordinateFigure(run.coordinates, slopes)
    if run.trials is not None and run.trials["state"].isin(["COMPLETE", "PRUNED", "FAIL"]).any():
        figures["history"] = HistoryFigure(run.trials)
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
    frames = {"coordinates": run.coordinates, "slopes": slopes, "basins": run.basins, "optima": optima}
    frames |= {"trials": run.trials, "parameters": run.parameters}
    files = [download(f"{name}.csv", rows.to_csv(index=False)) for name, rows in frames.items() if rows is not None]
    if run.recipe is not None:
        files.append(download("best.json", run.recipe.model_dump_json(indent=2)))
    script = (HERE / "report.js").read_text(encoding="utf-8")
    compared = run.verify.get("comparison") or []
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        run=run,
        overall=overall(found),
        findings=found,
        facts=facts(run, optima),
        notes=notes,
        comparison=comparison_table(compared) if compared else None,
        recipe=recipe_table(run.recipe) if run.recipe else None,
        optima=optimum_table(optima) if optima is not None else None,
        figures={name: (figure.title, Markup(figure.svg(name)), figure.caption) for name, figure in figures.items()},
        slopes=slope_table(slopes) if slopes is not None else None,
        parameters=parameter_table(run.parameters) if run.parameters is not None else None,
        warnings=[str(warning) for warning in run.target.get("warnings") or []],
        environment=environment_table(run.environment) if run.environment else None,
        files=files,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
