"""Read the contents of a run folder, and name the commands that create the parts that are missing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from mutransfer.errors import FileError
from mutransfer.io import read_json
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS, COORDINATES, PARAMETERS, REPEATS, TRIALS

__all__ = ["RunContents"]

ENDED = ("COMPLETE", "PRUNED")

# file → (name of its content, command that creates it)
MADE_BY = {
    "verify.json": ("verdict on the transfer", "mutransfer verify {run}"),
    "check.json": ("verdict of the coordinate check", "mutransfer check MODEL --out {run}"),
    "best.json": ("recipe", "mutransfer tune EXPERIMENT.yaml --out {run}"),
    "basins.csv": ("learning-rate basins", "mutransfer verify {run}"),
    "coordinates.csv": ("coordinate check", "mutransfer check MODEL --out {run}"),
    "trials.csv": ("trials", "mutransfer tune EXPERIMENT.yaml --out {run}"),
    "target.json": ("target config", "mutransfer transfer {run} --width W"),
    "environment.json": ("provenance", "mutransfer tune EXPERIMENT.yaml --out {run}"),
}


@dataclass(frozen=True, eq=False)
class RunContents:
    """The measurements and decisions of one run; None or an empty dictionary for each missing file.

    A file also counts as missing if it belongs to another recipe than the one in best.json, to another model or other rules
    than those in experiment.yaml, or to the time before an unfinished command; ``absent`` then maps the file to a sentence with
    the reason. ``unfinished`` maps each command that was started but did not finish to a sentence.
    """

    path: Path
    coordinates: pd.DataFrame | None
    basins: pd.DataFrame | None
    trials: pd.DataFrame | None
    recipe: Recipe | None
    target: dict[str, Any]
    environment: dict[str, Any]
    verify: dict[str, Any]
    check: dict[str, Any]
    experiment: str
    repeats: pd.DataFrame | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    unfinished: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> RunContents:
        """Read the run folder ``path``.

        Raises:
            FileError: if there is no such folder, it contains nothing to report, or the content of a file does not match
                its name.
        """
        if not path.is_dir():
            raise FileError(
                f"there is no folder {path}: expected a run folder, which `mutransfer tune --out {path}` creates."
            )
        if not any((path / name).is_file() for name in MADE_BY):
            raise FileError(
                f"{path} holds nothing to report ({', '.join(MADE_BY)}): run `mutransfer demo --out {shlex.quote(str(path))}`, "
                "or `mutransfer tune EXPERIMENT.yaml` with the same --out."
            )

        def frame(name: str, read: Callable[[Path], pd.DataFrame]) -> pd.DataFrame | None:
            rows = read(path / name) if (path / name).is_file() else None
            return None if rows is None or rows.empty else rows

        recipe = Recipe.load(path / "best.json") if (path / "best.json").is_file() else None
        run = cls(
            path,
            frame("coordinates.csv", COORDINATES.read),
            frame("basins.csv", BASINS.read),
            frame("trials.csv", TRIALS.read),
            recipe,
            _object(path / "target.json"),
            _object(path / "environment.json"),
            _object(path / "verify.json"),
            _object(path / "check.json"),
            _text(path / "experiment.yaml"),
            frame("repeats.csv", REPEATS.read),
        )
        return run._without_outdated()

    def _without_outdated(self) -> RunContents:
        """Return a copy without results of another recipe or from before an unfinished command; ``absent`` says why."""
        folder, absent = RunFolder(self.path), {}
        unfinished = {
            name: self._how_far(folder, name) for name in ("tune", "verify", "check") if folder.unfinished(name)
        }
        if "tune" in unfinished:
            absent["best.json"] = f"The search has not finished, so there is no recipe yet. {unfinished['tune']}"
            for name in ("verify.json", "basins.csv", "target.json"):
                absent[name] = "The search has not finished, so results for an earlier recipe are not shown."
        elif self.recipe is not None:
            recipe = self.recipe.model_dump(mode="json")
            if (self.verify or self.basins is not None) and folder.differences("verify", {"recipe": recipe}):
                absent["verify.json"] = (
                    f"The verified recipe is not the one in best.json: run `{folder.command('verify', {})}`."
                )
                absent["basins.csv"] = "The runs in basins.csv belong to another recipe than the one in best.json."
                unfinished.pop("verify", None)
            if self.target.get("recipe") not in (None, recipe):
                absent["target.json"] = (
                    "target.json was made from another recipe than the one in best.json: run "
                    f"`mutransfer transfer {shlex.quote(str(self.path))} --width W`."
                )
        if "verify" in unfinished and "verify.json" not in absent:
            absent["verify.json"] = unfinished["verify"]
        if others := folder.differences("check", self._subject()):
            absent["check.json"] = (
                f"The coordinate check had another {' and another '.join(others)} than this run: run "
                f"`{folder.command('check', {})}`."
            )
        elif "check" in unfinished:
            absent["check.json"] = unfinished["check"]
        if "check" in unfinished:
            absent["coordinates.csv"] = unfinished["check"]
        kept: dict[str, Any] = {name.partition(".")[0]: None for name in absent if name.endswith(".csv")}
        kept |= {name.partition(".")[0]: {} for name in absent if name.endswith(".json") and name != "best.json"}
        kept |= {"recipe": None} if "best.json" in absent else {}
        return replace(self, **kept, absent=absent, unfinished=unfinished)

    def _how_far(self, folder: RunFolder, command: str) -> str:
        """Return a sentence on how much of an unfinished command is done and how to continue it."""
        progress = folder.progress(command)
        planned, asked = progress.get("planned"), progress.get("question") or {}
        go_on = f"continue with `{folder.command(command)}`."
        if command == "tune" and folder.unfinished("repeats"):
            done = 0 if self.repeats is None else len(self.repeats)
            planned = folder.progress("repeats").get("planned")
            return f"{done} of {planned} repeats of the best trials with other seeds are done: {go_on}"
        if command == "tune":
            running = 0 if self.trials is None else int(self.trials["state"].eq("RUNNING").sum())
            started = f" ({running} more had started)" if running else ""
            return f"{self.trials_done} of {planned} trials are done{started}: {go_on}"
        if command == "verify":
            rows = _selected(self.basins, asked.get("parametrizations"), asked.get("widths"), asked.get("seeds"))
            return f"{0 if rows is None else len(rows)} of {planned} runs are done: {go_on}"
        return f"It did not finish: {go_on}"

    def _settings(self) -> dict[str, Any]:
        """Return the content of experiment.yaml; empty if it does not exist or cannot be read."""
        try:
            content = yaml.safe_load(self.experiment)
        except yaml.YAMLError:
            content = None
        return content if isinstance(content, dict) else {}

    def _subject(self) -> dict[str, Any]:
        """Return the model and the rules that scale it, as given in experiment.yaml."""
        content = self._settings()
        return {key: content[key] for key in ("parametrization", "optimizer", "model", "options") if key in content}

    @property
    def trials_done(self) -> int:
        """Number of finished trials, including pruned and diverged ones but not running or interrupted ones."""
        return 0 if self.trials is None else int(self.trials["state"].isin(ENDED).sum())

    @property
    def seeds_planned(self) -> int | None:
        """Number of seeds per basin point once the verification is complete; None if the folder does not record it."""
        asked = RunFolder(self.path).progress("verify").get("question") or {}
        found = asked.get("seeds", self.verify.get("seeds"))
        return found if isinstance(found, int) else None

    @property
    def name(self) -> str:
        """Name of the folder, for headings."""
        return self.path.resolve().name

    @property
    def maximize(self) -> bool:
        """Whether the experiment maximizes the metric that its trainer reports."""
        return self._settings().get("direction") == "maximize"

    def missing(self, name: str) -> str:
        """Return a sentence that says that ``name`` (a file of a run folder) is missing and which command creates it."""
        if name in self.absent:
            return self.absent[name]
        what, command = MADE_BY[name]
        if "check MODEL" in command and self.experiment:
            command = command.replace("MODEL", "{run}/experiment.yaml")
        return f"No {what} yet: run `{command.format(run=shlex.quote(str(self.path)))}`."

    @property
    def parameters(self) -> pd.DataFrame | None:
        """The target's settings per parameter (schema PARAMETERS).

        Raises:
            FrameError: if a row of target.json lacks a column.
        """
        rows = self.target.get("parameters") or []
        known = [{key: row[key] for key in PARAMETERS.columns if key in row} for row in rows]
        return PARAMETERS.frame(known) if known else None

    @property
    def judged_basins(self) -> pd.DataFrame | None:
        """The basin runs that verify.json is based on, or those of an unfinished verification; basins.csv may hold others."""
        asked = {} if self.verify else RunFolder(self.path).progress("verify").get("question") or {}
        kinds = asked.get("parametrizations") or list(self.verify.get("drift_octaves") or ())
        widths, seeds = (asked.get(key, self.verify.get(key)) for key in ("widths", "seeds"))
        return _selected(self.basins, kinds, widths, seeds)

    @property
    def commands(self) -> list[str]:
        """The commands that created the run, as typed; earlier versions recorded only the last one."""
        recorded = self.environment.get("commands") or [self.environment.get("command")]
        return [str(command) for command in recorded if command]

    @property
    def facts(self) -> dict[str, Any]:
        """Machine, versions and data from environment.json, and the seeds in the frames."""
        elsewhere = {"commands", "command", "seed", "basins", "progress"}  # "basins" repeats the recipe
        found = {key: value for key, value in self.environment.items() if key not in elsewhere}
        seeds: dict[str, Any] = {"tune": self.environment.get("seed")}
        for name, frame in (("verify", self.basins), ("check", self.coordinates)):
            if frame is not None:
                seeds[name] = sorted(map(int, frame["seed"].unique()))
        if self.target:
            seeds["target run"] = self.target.get("seed")
        return {**found, "seeds": {name: seed for name, seed in seeds.items() if seed is not None}}

    @property
    def checked(self) -> str | None:
        """The parametrization that the coordinate check tests; any others in the frame are controls."""
        if self.coordinates is None:
            return None
        names = list(self.coordinates["parametrization"].unique())
        recorded = self.check.get("parametrization")
        return recorded if recorded in names else next((name for name in ("mup", *names) if name in names), None)


def _selected(basins: pd.DataFrame | None, kinds: Any, widths: Any, seeds: Any) -> pd.DataFrame | None:
    """Return the runs of these parametrizations and widths and the first ``seeds`` seeds; unknown criteria select all."""
    if basins is None:
        return None
    rows = basins if not kinds else basins[basins["parametrization"].isin(kinds)]
    rows = rows if widths is None else rows[rows["width"].isin(widths)]
    return rows if seeds is None else rows[rows["seed"] < seeds]


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path, "a JSON object")
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__}: expected a JSON object; create it again.")
    return content


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text ({error}): create it again with `mutransfer tune`.") from None
