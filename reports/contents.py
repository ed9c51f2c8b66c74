"""What a run folder holds so far, and the command that makes what it does not hold yet."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from mutransfer.errors import RequestError
from mutransfer.io import read_json
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS, COORDINATES, PARAMETERS, REPEATS, TRIALS

__all__ = ["RunContents"]

ENDED = ("COMPLETE", "PRUNED")

# file → (what is missing without it, the command that makes it)
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
    """The measurements and decisions of one run; None, or an empty dictionary, for what is not there.

    What belongs to another recipe than best.json, or to an earlier question than the unfinished one, counts as not there:
    ``absent`` says why, file → sentence. ``unfinished`` has a sentence for each command that was begun and did not end.
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
        """Read what is in the folder ``path``.

        Raises:
            RequestError: there is no such folder, nothing in it to report, or a file in it does not hold what its name
                says.
        """
        if not path.is_dir():
            raise RequestError(
                f"there is no folder {path}: expected a run folder, as `mutransfer tune --out {path}` makes."
            )
        if not any((path / name).is_file() for name in MADE_BY):
            raise RequestError(
                f"{path} holds nothing to report ({', '.join(MADE_BY)}): run `mutransfer demo --out {shlex.quote(str(path))}`, "
                "or `mutransfer tune EXPERIMENT.yaml` with that --out."
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
        return run._without_what_is_past()

    def _without_what_is_past(self) -> RunContents:
        """Leave out what was decided before something that was begun later, or for another recipe, and say so."""
        folder, absent = RunFolder(self.path), {}
        unfinished = {
            name: self._how_far(folder, name) for name in ("tune", "verify", "check") if folder.unfinished(name)
        }
        if "tune" in unfinished:
            absent["best.json"] = f"The search has not ended, so there is no recipe yet. {unfinished['tune']}"
            for name in ("verify.json", "basins.csv", "target.json"):
                absent[name] = "The search has not ended, and what was found for an earlier recipe is not shown."
        elif self.recipe is not None:
            recipe = self.recipe.model_dump(mode="json")
            if (self.verify or self.basins is not None) and folder.differences("verify", {"recipe": recipe}):
                absent["verify.json"] = (
                    f"What was verified is another recipe than that of best.json: run `{folder.command('verify', {})}`."
                )
                absent["basins.csv"] = "The runs in basins.csv belong to another recipe than that of best.json."
                unfinished.pop("verify", None)
            if self.target.get("recipe") not in (None, recipe):
                absent["target.json"] = (
                    "target.json was made from another recipe than that of best.json: run "
                    f"`mutransfer transfer {shlex.quote(str(self.path))} --width W`."
                )
        if "verify" in unfinished and "verify.json" not in absent:
            absent["verify.json"] = unfinished["verify"]
        if others := folder.differences("check", self._subject()):
            absent["check.json"] = (
                f"What was checked has another {' and another '.join(others)} than this run: run `{folder.command('check', {})}`."
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
        """Return how much of an unfinished command is done, and how to go on with it."""
        progress = folder.progress(command)
        planned, asked = progress.get("planned"), progress.get("question") or {}
        go_on = f"go on with `{folder.command(command)}`."
        if command == "tune" and folder.unfinished("repeats"):
            done = 0 if self.repeats is None else len(self.repeats)
            planned = folder.progress("repeats").get("planned")
            return f"{done} of {planned} repeats of the best trials with other seeds are done: {go_on}"
        if command == "tune":
            running = 0 if self.trials is None else int(self.trials["state"].eq("RUNNING").sum())
            was = f" ({running} more had begun)" if running else ""
            return f"{self.trials_done} of {planned} trials are done{was}: {go_on}"
        if command == "verify":
            rows = _asked(self.basins, asked.get("parametrizations"), asked.get("widths"), asked.get("seeds"))
            return f"{0 if rows is None else len(rows)} of {planned} runs are done: {go_on}"
        return f"It did not end: {go_on}"

    def _subject(self) -> dict[str, Any]:
        """Return which model is scaled by which rules, as experiment.yaml says."""
        try:
            content = yaml.safe_load(self.experiment)
        except yaml.YAMLError:
            content = None
        keys = ("parametrization", "optimizer", "model", "options")
        return {key: content[key] for key in keys if key in content} if isinstance(content, dict) else {}

    @property
    def trials_done(self) -> int:
        """How many trials ended, pruned and diverged ones included; those that run or were interrupted are not."""
        return 0 if self.trials is None else int(self.trials["state"].isin(ENDED).sum())

    @property
    def seeds_planned(self) -> int | None:
        """How many seeds each point of a basin has once it is whole; None where the folder does not tell."""
        asked = RunFolder(self.path).progress("verify").get("question") or {}
        found = asked.get("seeds", self.verify.get("seeds"))
        return found if isinstance(found, int) else None

    @property
    def name(self) -> str:
        """The folder's own name, for headings."""
        return self.path.resolve().name

    @property
    def maximize(self) -> bool:
        """Whether the experiment's direction is to maximize what its trainer reports."""
        lines = [line.split("#")[0].split() for line in self.experiment.splitlines()]
        return ["direction:", "maximize"] in lines

    def missing(self, name: str) -> str:
        """Return the sentence that says that ``name`` (a file of a run folder) is not there, and what makes it."""
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
            RequestError: a row of target.json lacks a column.
        """
        rows = self.target.get("parameters") or []
        known = [{key: row[key] for key in PARAMETERS.columns if key in row} for row in rows]
        return PARAMETERS.frame(known) if known else None

    @property
    def judged_basins(self) -> pd.DataFrame | None:
        """The basins that verify.json judged, or that an unfinished verification has so far: basins.csv may hold others."""
        asked = {} if self.verify else RunFolder(self.path).progress("verify").get("question") or {}
        kinds = asked.get("parametrizations") or list(self.verify.get("drift_octaves") or ())
        widths, seeds = (asked.get(key, self.verify.get(key)) for key in ("widths", "seeds"))
        return _asked(self.basins, kinds, widths, seeds)

    @property
    def commands(self) -> list[str]:
        """The commands that made the run, as they were typed; a folder of an earlier version noted only the last one."""
        said = self.environment.get("commands") or [self.environment.get("command")]
        return [str(command) for command in said if command]

    @property
    def facts(self) -> dict[str, Any]:
        """What environment.json says of machine, versions and data, and the seeds that the frames hold."""
        elsewhere = {"commands", "command", "seed", "basins", "progress"}  # "basins" is the recipe once more
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
        """The parametrization that the coordinate check is about; the others in the frame are its control."""
        if self.coordinates is None:
            return None
        names = list(self.coordinates["parametrization"].unique())
        said = self.check.get("parametrization")
        return said if said in names else next((name for name in ("mup", *names) if name in names), None)


def _asked(basins: pd.DataFrame | None, kinds: Any, widths: Any, seeds: Any) -> pd.DataFrame | None:
    """Return the runs of these parametrizations, widths and first so many seeds; of all where one of them is not known."""
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
        raise RequestError(f"{path} holds a {type(content).__name__}: expected a JSON object; make it again.")
    return content


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no text ({error}): make it again with `mutransfer tune`.") from None
