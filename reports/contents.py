"""What a run folder holds so far, and the command that makes what it does not hold yet."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mutransfer.errors import RequestError
from mutransfer.files import read_json
from mutransfer.frames import BASINS, COORDINATES, PARAMETERS, TRIALS
from mutransfer.recipe import Recipe

__all__ = ["RunContents"]

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
    """The measurements and decisions of one run; None, or an empty dictionary, for what is not there."""

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
        return cls(
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
        )

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
        what, command = MADE_BY[name]
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
        """The basins that verify.json judged: the file may hold runs of other seeds and widths as well."""
        widths, seeds = self.verify.get("widths"), self.verify.get("seeds")
        if self.basins is None or widths is None or seeds is None:
            return self.basins
        return self.basins[self.basins["width"].isin(widths) & (self.basins["seed"] < seeds)]

    @property
    def commands(self) -> list[str]:
        """The commands that made the run, as they were typed; a folder of an earlier version noted only the last one."""
        said = self.environment.get("commands") or [self.environment.get("command")]
        return [str(command) for command in said if command]

    @property
    def facts(self) -> dict[str, Any]:
        """What environment.json says of machine, versions and data, and the seeds that the frames hold."""
        elsewhere = {"commands", "command", "seed", "basins"}  # "basins" is the recipe once more
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
