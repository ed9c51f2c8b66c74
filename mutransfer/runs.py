"""The run folder: what its files are called, and the environment they were made in."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import RequestError
from .files import naming_the_disk, read_json, write_json
from .masking import masked

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

    def note_environment(self, **facts: Any) -> None:
        """Write versions, device, command and ``facts``; refuse to mix results of another data hash.

        Raises:
            RequestError: the folder holds results on data with another SHA-256.
        """
        before = read_json(self.environment, "the run's environment") if self.environment.exists() else {}
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
