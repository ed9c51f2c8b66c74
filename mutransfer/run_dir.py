"""The run folder: what its files are called, and the environment they were made in."""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import paths
from .errors import RequestError
from .io import masked, naming_the_disk, read_json, write_json

__all__ = ["RunFolder", "environment"]

PACKAGES = ("mutransfer", "torch", "mup", "optuna", "pandas", "numpy", "scipy", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    path: Path

    experiment = property(lambda self: self.path / "experiment.yaml")
    journal = property(lambda self: self.path / "study.journal")
    trials = property(lambda self: self.path / "trials.csv")
    repeats = property(lambda self: self.path / "repeats.csv")
    best = property(lambda self: self.path / "best.json")
    coordinates = property(lambda self: self.path / "coordinates.csv")
    check = property(lambda self: self.path / "check.json")
    basins = property(lambda self: self.path / "basins.csv")
    verify = property(lambda self: self.path / "verify.json")
    target = property(lambda self: self.path / "target.json")
    environment = property(lambda self: self.path / "environment.json")

    def make(self) -> RunFolder:
        """Create the folder.

        Raises:
            RequestError: it cannot be created or written.
        """
        with naming_the_disk(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # with its parents made, only where nothing can be made, as in /proc
                raise RequestError(
                    f"cannot make the folder {self.path}: choose an --out that can be written."
                ) from None
            if not os.access(self.path, os.W_OK):
                raise RequestError(f"cannot write into {self.path}: choose an --out that can be written.")
        return self

    def existing(self) -> RunFolder:
        """Return this folder if `mutransfer tune` made it.

        Raises:
            RequestError: it is not a run folder.
        """
        if not self.experiment.is_file():
            raise RequestError(
                f"{self.path} is no run folder (it has no experiment.yaml): make one with `mutransfer tune`."
            )
        return self

    def noted(self) -> dict[str, Any]:
        """Return what `note_environment` has written, or nothing before it has."""
        found = read_json(self.environment, "the run's environment") if self.environment.exists() else {}
        return found if isinstance(found, dict) else {}

    def note_environment(self, **facts: Any) -> None:
        """Write versions, device, command and ``facts``; refuse to mix results of another data hash.

        Raises:
            RequestError: the folder holds results on data with another SHA-256.
        """
        before = self.noted()
        if "places" in facts:  # those of before a move still lead to what is there now
            facts["places"] = {**before.get("places", {}), **facts["places"]}
        known, now = before.get("data_sha256"), facts.get("data_sha256")
        if known and now and known != now:
            raise RequestError(
                f"{self.path} holds results on data with SHA-256 {known[:12]}…, and the data is now {now[:12]}… (another "
                "corpus or Python version): losses are not comparable, so use another --out."
            )
        command = " ".join(["mutransfer", *map(masked, sys.argv[1:])]) if sys.argv[:1] else ""
        commands = [*before.get("commands", ()), command]
        commands = list(dict.fromkeys(commands))
        write_json(self.environment, {**before, **environment(), **facts, "commands": commands})

    def note_progress(
        self, command: str, *, planned: int | None, ended: bool, arguments: Mapping[str, Any] | None = None,
        question: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write how far ``command`` ("tune", "repeats", "verify" or "check") is going, so that a reader knows what is missing.

        Args:
            command: whose runs.
            planned: runs in all; None where the command adds more until it can decide.
            ended: whether it came to its end; what is planned may still not have been done, as a budget may end a search.
            arguments: options of the command line that make it go on, flag → value.
            question: what it is about, such as the recipe: plain data.
        """
        before = self.noted()
        record = {
            "planned": planned,
            "ended": ended,
            "arguments": dict(arguments or {}),
            "question": dict(question or {}),
        }
        progress = before.get("progress")
        progress = progress if isinstance(progress, dict) else {}
        if progress.get(command) != record:
            write_json(self.environment, {**before, "progress": {**progress, command: record}})

    def progress(self, command: str) -> dict[str, Any]:
        """Return what `note_progress` wrote of ``command``; empty where nothing was."""
        progress = self.noted().get("progress")
        found = progress.get(command) if isinstance(progress, dict) else None
        return found if isinstance(found, dict) else {}

    def unfinished(self, command: str) -> bool:
        """Whether ``command`` was begun here and has not come to its end."""
        return self.progress(command).get("ended") is False

    def verdict(self, command: str) -> dict[str, Any] | None:
        """Return what verify.json or check.json holds; None where there is no verdict in it."""
        path = {"verify": self.verify, "check": self.check}[command]
        content = read_json(path, f"what `mutransfer {command}` found") if path.is_file() else None
        return content if isinstance(content, dict) and content.get("verdict") else None

    def differences(self, command: str, question: Mapping[str, Any]) -> list[str]:
        """Return in what the verdict of ``command`` was about something else than ``question``, as far as the folder tells."""
        known = dict(self.progress(command).get("question") or {})
        content = self.verdict(command) or {}
        if command == "verify" and "recipe" not in known:
            basins = self.noted().get("basins")
            known |= {"recipe": basins["recipe"]} if isinstance(basins, dict) and "recipe" in basins else {}
        known |= {key: content[key] for key in ("parametrization", "optimizer") if key in content and key not in known}
        found = [
            key for key, value in question.items() if key in known and self._plain(known[key]) != self._plain(value)
        ]
        lr, judged = (question.get("recipe") or {}).get("lr"), content.get("transferred_log2_lr")
        if "recipe" not in found and lr and isinstance(judged, int | float) and abs(judged - math.log2(lr)) > 1e-6:
            found.append("recipe")
        return found

    def command(self, command: str, arguments: Mapping[str, Any] | None = None) -> str:
        """Return the line that runs ``command`` on this folder, with the ``arguments`` of its last time unless given."""
        given = self.progress(command).get("arguments") or {} if arguments is None else arguments
        path, experiment = str(self.path), str(self.experiment)
        line = {
            "tune": ["tune", experiment, "--out", path],
            "verify": ["verify", path],
            "check": ["check", experiment, "--out", path],
            "report": ["report", path],
        }[command]
        return shlex.join(["mutransfer", *line, *(str(part) for pair in given.items() for part in pair)])

    def _plain(self, value: Any) -> Any:
        """Return a model's reference with the whole path of its file, where it is now, and everything else as it is."""
        if not isinstance(value, str) or (path := paths.path_of("model", value)) is None:
            return value
        whole = os.path.abspath(path)
        for before, relative in self.noted().get("places", {}).items():
            if whole == before or whole.startswith(f"{before}/"):
                moved = os.path.normpath(os.path.realpath(self.path / relative) + whole[len(before) :])
                return paths.with_path("model", value, moved if os.path.exists(moved) else whole)
        return paths.with_path("model", value, whole)


def environment() -> dict[str, Any]:
    """Return versions and machine, as far as they bear on a number's reproduction."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
