"""Flags, defaults and help: frozen, explained, and light to import."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

import mutransfer
from mutransfer.cli.app import app
from mutransfer.cli.models import Optimizer, Parametrization
from mutransfer.optimizers.rules import OPTIMIZERS
from mutransfer.parametrizations.tables import TABLES

from ..helpers.processes import Processes

# Others' scripts hold these: add, but do not rename or take away without a release note.
FLAGS = {
    "demo": ["--device", "--json", "--out", "--seed"],
    "init": ["--device", "--force", "--json", "--seed", "folder"],
    "doctor": ["--device", "--json", "--seed"],
    "plan": [
        "--base-depth", "--base-width", "--data", "--depth", "--depth-field", "--device", "--json", "--method",
        "--optimizer", "--parametrization", "--recipe", "--role", "--seed", "--width", "--width-field", "model",
    ],
    "check": [
        "--base-width", "--control", "--data", "--depth", "--depth-field", "--depths", "--device", "--json", "--lr",
        "--max-seeds", "--method", "--optimizer", "--out", "--parametrization", "--role", "--seed", "--seeds", "--steps",
        "--width-field", "--widths", "model",
    ],
    "tune": [
        "--at-once", "--device", "--executor", "--json", "--lease", "--out", "--precision", "--seed", "--set", "--storage",
        "--study", "--trials", "experiment",
    ],
    "verify": [
        "--at-once", "--control", "--control-trials", "--device", "--executor", "--json", "--regret-limit", "--seed", "--seeds",
        "--step",
        "--widths", "run",
    ],
    "transfer": ["--batch-size", "--depth", "--device", "--json", "--out", "--seed", "--to", "--tokens", "--width", "run"],
    "train": ["--checkpoint-every", "--device", "--json", "--out", "--seed", "target"],
    "audit": ["--device", "--json", "--seed", "dump", "target"],
    "report": ["--device", "--json", "--seed", "run"],
}  # fmt: skip

DEFAULTS = {
    ("check", "widths"): "64,128,256,512",
    ("check", "parametrization"): "mup",
    ("check", "optimizer"): "adamw",
    ("check", "steps"): 4,
    ("check", "seeds"): 5,
    ("plan", "parametrization"): "mup",
    ("plan", "optimizer"): "adamw",
    ("verify", "seeds"): 3,
    ("verify", "step"): 1.0,
    ("transfer", "seed"): 0,
    ("tune", "device"): "auto",
}


def commands_of_the_app() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_flags_are_frozen() -> None:
    found = {
        name: sorted((p.opts[0] if p.opts[0].startswith("--") else p.name) for p in command.params if p.name != "help")
        for name, command in commands_of_the_app().items()
    }
    assert found == FLAGS


def test_the_defaults_are_frozen() -> None:
    found = {(name, p.name): p.default for name, command in commands_of_the_app().items() for p in command.params}
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS


def test_every_flag_and_command_says_what_it_is_for() -> None:
    for name, command in commands_of_the_app().items():
        assert command.help, name
        assert all(p.help for p in command.params), name


def test_no_command_shows_the_help(commands: Processes, tmp_path: Path) -> None:
    ended = commands.run(cwd=tmp_path)
    assert ended.code == 2
    assert "Usage: mutransfer" in ended.err
    assert all(re.search(rf"^  {name} ", ended.err, re.MULTILINE) for name in FLAGS)


def test_the_help_knows_every_rule() -> None:
    """Its words stand apart from the tables, which import torch."""
    for option, names in ((Parametrization, TABLES), (Optimizer, OPTIMIZERS)):
        (said,) = option.__metadata__
        assert sorted(re.findall(r"[a-z][a-z-]+", re.sub(r"\(.*?\)|\bor\b", "", said.help))) == sorted(names)


def test_the_version(commands: Processes, tmp_path: Path) -> None:
    ended = commands.run("--version", cwd=tmp_path)
    assert (ended.code, ended.out) == (0, f"mutransfer {mutransfer.__version__}\n")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pandas", "optuna", "scipy", "matplotlib", "sklearn", "pydantic_core", "yaml", "mup")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = python(
        "import sys\nfrom mutransfer.cli import run\n"
        "codes = [run(['--help']), *(run([name, '--help']) for name in sys.argv[1:])]\n"
        f"print(codes, sorted(set(sys.modules) & set({heavy})))"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stdout.endswith("[0] []\n"), ended
    # Processor time: the machine may be busy. The contract's 0.4 s are of a whole start of `mutransfer --help`.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4


def test_every_command_has_a_light_help() -> None:
    ended = python(
        "import sys\nfrom mutransfer.cli import run\n"
        f"codes = [run([name, '--help']) for name in {list(FLAGS)}]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    assert ended.stdout.endswith(f"{[0] * len(FLAGS)} False\n"), ended


def test_click_itself_is_not_needed() -> None:
    """A typer that brings its own copy does not install click, and neither do we."""
    ended = python(
        "import sys\nsys.modules['click'] = None\nfrom mutransfer.cli import run\n"
        "print([run(['--help']), run(['plan']), run(['nonsense'])])"
    )
    assert ended.stdout.endswith("[0, 2, 2]\n"), ended
    assert "Traceback" not in ended.stderr


def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-c", "from mutransfer.cli import main; main()", "init", "--json"],
        cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False,


    )  # fmt: skip
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "experiment.yaml").is_file()
