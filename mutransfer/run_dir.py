"""The run folder: its files, the environment they were created in, and the resolution of recorded paths.

Paths in an experiment are relative to the folder of its file. Results record two paths of everything they were made from: the
absolute path, and the path relative to the record. A file that exists at the relative path takes precedence, so that a copied
project uses its own files; otherwise the absolute path is used.
"""

from __future__ import annotations

import importlib.util
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

import yaml

from .errors import DataError, FileError, RequestError, SettingsError
from .io import masked, naming_the_disk, read_json, write_json
from .recipe import Scale

__all__ = [
    "RunFolder",
    "anchored",
    "environment",
    "found",
    "from_here",
    "path_of",
    "recorded",
    "tuned_base",
    "with_path",
]

PACKAGES = ("mutransfer", "torch", "mup", "optuna", "pandas", "numpy", "scipy", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class RunFolder:
    """The paths of the files in one run folder."""

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
            FileError: it cannot be created or written.
        """
        with naming_the_disk(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # despite parents=True: only where nothing can be created, as in /proc
                raise FileError(f"cannot create the folder {self.path}: choose a writable --out.") from None
            if not os.access(self.path, os.W_OK):
                raise FileError(f"cannot write into {self.path}: choose a writable --out.")
        return self

    def existing(self) -> RunFolder:
        """Return this folder after checking that `mutransfer tune` created it.

        Raises:
            RequestError: it is not a run folder.
        """
        if not self.experiment.is_file():
            raise RequestError(
                f"{self.path} is not a run folder (it has no experiment.yaml): create one with `mutransfer tune`."
            )
        return self

    def read_environment(self) -> dict[str, Any]:
        """Return what `note_environment` wrote, or an empty dictionary if it has not been called."""
        found = read_json(self.environment, "the run's environment") if self.environment.exists() else {}
        return found if isinstance(found, dict) else {}

    def note_environment(self, **facts: Any) -> None:
        """Record versions, machine, command and ``facts``; refuse to mix results of different data.

        Raises:
            DataError: the folder holds results on data with another SHA-256.
        """
        before = self.read_environment()
        if "places" in facts:  # places recorded before a move still lead to the moved files
            facts["places"] = {**before.get("places", {}), **facts["places"]}
        known, now = before.get("data_sha256"), facts.get("data_sha256")
        if known and now and known != now:
            raise DataError(
                f"{self.path} holds results on data with SHA-256 {known[:12]}…, but the data is now {now[:12]}… (another "
                "corpus or Python version): losses are not comparable, so use another --out."
            )
        command = " ".join(["mutransfer", *map(masked, sys.argv[1:])]) if sys.argv[:1] else ""
        commands = [*before.get("commands", ()), command]
        commands = list(dict.fromkeys(commands))
        device = str(facts.get("device") or before.get("device") or "cpu")  # a GPU that is not used is not touched
        write_json(self.environment, {**before, **environment(device), **facts, "commands": commands})

    def note_progress(
        self, command: str, *, planned: int | None, ended: bool, arguments: Mapping[str, Any] | None = None,
        question: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Record the extent of ``command`` ("tune", "repeats", "verify" or "check"), so that readers know what is missing.

        Args:
            command: the command whose runs are recorded.
            planned: total number of runs; None if the command adds more until it can decide.
            ended: whether it finished. Not all planned runs need be done then, since a budget may end a search.
            arguments: command-line options that resume it, flag → value.
            question: what it was run for, such as the recipe, as plain data.
        """
        before = self.read_environment()
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
        """Return what `note_progress` wrote for ``command``, or an empty dictionary."""
        progress = self.read_environment().get("progress")
        found = progress.get(command) if isinstance(progress, dict) else None
        return found if isinstance(found, dict) else {}

    def unfinished(self, command: str) -> bool:
        """Return whether ``command`` was started here and has not finished."""
        return self.progress(command).get("ended") is False

    def verdict(self, command: str) -> dict[str, Any] | None:
        """Return the content of verify.json or check.json, or None if it holds no verdict."""
        path = {"verify": self.verify, "check": self.check}[command]
        content = read_json(path, f"the result of `mutransfer {command}`") if path.is_file() else None
        return content if isinstance(content, dict) and content.get("verdict") else None

    def differences(self, command: str, question: Mapping[str, Any]) -> list[str]:
        """Return the keys of ``question`` whose value differs from what the folder records for the verdict of ``command``."""
        known = dict(self.progress(command).get("question") or {})
        content = self.verdict(command) or {}
        if command == "verify" and "recipe" not in known:
            basins = self.read_environment().get("basins")
            known |= {"recipe": basins["recipe"]} if isinstance(basins, dict) and "recipe" in basins else {}
        known |= {key: content[key] for key in ("parametrization", "optimizer") if key in content and key not in known}
        known = {"method": "backprop", **known}  # earlier versions had no other, and did not record it
        found = [
            key
            for key, value in question.items()
            if key in known and self._with_absolute_path(known[key]) != self._with_absolute_path(value)
        ]
        lr, judged = (question.get("recipe") or {}).get("lr"), content.get("transferred_log2_lr")
        if "recipe" not in found and lr and isinstance(judged, int | float) and abs(judged - math.log2(lr)) > 1e-6:
            found.append("recipe")
        return found

    def command(self, command: str, arguments: Mapping[str, Any] | None = None) -> str:
        """Return the command line that runs ``command`` on this folder; ``arguments`` default to those of its last run."""
        given = self.progress(command).get("arguments") or {} if arguments is None else arguments
        path, experiment = str(self.path), str(self.experiment)
        line = {
            "tune": ["tune", experiment, "--out", path],
            "verify": ["verify", path],
            "check": ["check", experiment, "--out", path],
            "report": ["report", path],
        }[command]
        return shlex.join(["mutransfer", *line, *(str(part) for pair in given.items() for part in pair)])

    def _with_absolute_path(self, value: Any) -> Any:
        """Return a model reference with the current absolute path of its file, and any other value unchanged."""
        if not isinstance(value, str) or (path := path_of("model", value)) is None:
            return value
        absolute = os.path.abspath(path)
        for before, relative in self.read_environment().get("places", {}).items():
            if absolute == before or absolute.startswith(f"{before}/"):
                moved = os.path.normpath(os.path.realpath(self.path / relative) + absolute[len(before) :])
                return with_path("model", value, moved if os.path.exists(moved) else absolute)
        return with_path("model", value, absolute)


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the versions and machine details that matter for reproducing a number that was measured on ``device``."""
    import torch

    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
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
        "cuda": torch.cuda.get_device_name(device) if on_gpu else None,
    }


def _processor() -> str:
    """Return the processor's model name, where the system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


PREFIXES = {"model": ("hf",), "data": ("text", "bin"), "call": ()}  # key of an experiment → prefixes of a path
NAMES = {"model": "model", "data": "data", "call": "trainer"}


def path_of(key: str, reference: str) -> str | None:
    """Return the path in the value of ``key`` (model, data, call), or None if it names something built in or installed.

    Values with a path are ``hf:PATH``, ``text:PATH``, ``bin:PATH`` and ``PATH/file.py:name``.
    """
    kind, colon, rest = reference.partition(":")
    if colon and rest and kind in PREFIXES[key]:
        return rest
    if key == "data":
        return None
    where, _, _ = reference.rpartition(":")
    return where if where.endswith(".py") or "/" in where or "\\" in where else None


def with_path(key: str, reference: str, path: str) -> str:
    """Return ``reference`` with its path replaced by ``path``."""
    old = path_of(key, reference)
    if old is None:
        return reference
    if reference.partition(":")[0] in PREFIXES[key]:
        return f"{reference.partition(':')[0]}:{path}"
    return path + reference[len(old) :]


def anchored(key: str, reference: str, folder: str | os.PathLike[str]) -> str:
    """Return ``reference`` with its path, if any, made relative to ``folder`` instead of the current folder."""
    path = path_of(key, reference)
    if path is None or path.startswith("~") or os.path.isabs(path) or not os.path.exists(path):
        return reference
    relative_path = os.path.relpath(path, folder)
    return with_path(key, reference, os.path.abspath(path) if relative_path.startswith(os.pardir) else relative_path)


def tuned_base(recipe: str | os.PathLike[str]) -> Scale | None:
    """Return the base at which the best.json of a run folder was tuned; None for another file or a folder that does not say."""
    folder = RunFolder(Path(recipe).parent)
    if Path(recipe).name != folder.best.name or not folder.experiment.is_file():
        return None
    try:
        asked = yaml.safe_load(folder.experiment.read_text(encoding="utf-8"))
        size = asked.get("base") or asked["proxy"]
        return Scale(size["width"], size.get("depth", 2))  # the default of `sweeps.experiment.Size`
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError, SettingsError):
        return None  # `tune` reads and judges the file itself


def from_here(key: str, reference: str, folder: str | os.PathLike[str] | None) -> str:
    """Return ``reference`` for use in the current folder: with its path, relative to ``folder``, resolved from here."""
    path = path_of(key, reference)
    if path is None or path.startswith("~") or folder is None:
        return reference
    resolved = os.path.normpath(os.path.join(folder, path))
    relative_path = os.path.relpath(resolved)
    # In the folder where the path was typed, it stays as short as it was typed.
    return with_path(
        key, reference, resolved if os.path.isabs(path) or relative_path.startswith(os.pardir) else relative_path
    )


def recorded(references: Mapping[str, str], folder: str, record_dir: str | os.PathLike[str]) -> dict[str, str]:
    """Return, for ``folder`` and every absolute path in ``references``: absolute path → path relative to ``record_dir``."""
    paths = [path_of(key, each) for key, each in references.items()]
    home = os.path.realpath(record_dir)
    absolute = sorted({folder, *(path for path in paths if path is not None and os.path.isabs(path))})
    return {path: os.path.relpath(os.path.realpath(path), home) for path in absolute}


def found(
    references: Mapping[str, str], folder: str, places: Mapping[str, str], record_dir: str | os.PathLike[str],
    what: str | None = None,
) -> tuple[dict[str, str], str]:  # fmt: skip
    """Return the references of a record with their current paths, and the current base folder of their relative paths.

    Args:
        references: key → reference, as recorded.
        folder: the base folder of their relative paths when they were recorded.
        places: what `recorded` returned then.
        record_dir: the folder that holds the record now.
        what: a name for the recorded object, for the error message; None to accept missing files.

    Raises:
        FileError: a file exists neither at its path relative to the record nor at its recorded absolute path.
    """
    homes = _candidates(folder, places, record_dir)
    home = next((each for each in homes if all(_exists(key, ref, each) for key, ref in references.items())), folder)
    now = {}
    for key, reference in references.items():
        path = path_of(key, reference)
        now[key] = reference
        if path is None or _exists(key, reference, home):
            continue
        choice = (
            _candidates(path, places, record_dir)
            if os.path.isabs(path)
            else [os.path.join(each, path) for each in homes]
        )
        if (there := next(filter(os.path.exists, choice), None)) is not None:
            now[key] = with_path(key, reference, there)
        elif what is not None:
            places_tried = " nor ".join(dict.fromkeys(map(os.path.normpath, choice)))
            raise FileError(
                f"the {NAMES[key]} of {what} is missing (there is neither {places_tried}): put it back at one of these paths."
                if len(choice) > 1
                else f"the {NAMES[key]} of {what} is missing (there is no {places_tried}): put it back."
            )
    return now, home


def _candidates(path: str, places: Mapping[str, str], record_dir: str | os.PathLike[str]) -> list[str]:
    """Return where the recorded absolute ``path`` may be now, the likeliest place first."""
    moved = [os.path.normpath(os.path.join(os.path.realpath(record_dir), places[path]))] if path in places else []
    return list(dict.fromkeys([*moved, path]))


def _exists(key: str, reference: str, home: str) -> bool:
    """Return whether the referenced file or module exists; a module that is not in ``home`` may be installed."""
    path = path_of(key, reference)
    if path is not None:
        return os.path.exists(os.path.join(home, os.path.expanduser(path)))
    top = reference.partition(":")[0].partition(".")[0]
    if key == "data" or ":" not in reference or not top.isidentifier():
        return os.path.isdir(home)
    return os.path.isdir(os.path.join(home, top)) or os.path.isfile(os.path.join(home, f"{top}.py")) or _installed(top)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
