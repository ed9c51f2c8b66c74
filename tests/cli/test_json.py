"""Standard output holds the result and nothing else, whatever is printed and however; its schemas are those in the docs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mutransfer.cli import demo, run
from mutransfer.cli.output import OUTPUTS, write_documents
from mutransfer.io import as_json_value
from mutransfer.schemas import BASINS
from mutransfer.sweeps import verify

from ..helpers.processes import Processes, validated

ROOT = Path(__file__).parents[2]

# Prints through Python, through C, into the descriptor and from processes that inherit it: whenever it can.
LOUD = """
import atexit
import ctypes
import os
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

libc = ctypes.CDLL(None)


def shout(what):
    print(what, "print")
    sys.stdout.write(f"{what} write\\n")
    os.write(1, f"{what} descriptor\\n".encode())
    libc.puts(f"{what} puts".encode())
    subprocess.run(["echo", what, "child"], check=True)


shout("import")
atexit.register(shout, "exit")


class Loud(nn.Module):
    def __init__(self, width):
        super().__init__()
        shout(f"build {width}")
        print("built in", time.perf_counter(), "s")
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        os.write(1, b"forward descriptor\\n")
        print("forward print", tuple(x.shape))
        return self.body(x)


def build(width, depth):
    return Loud(width)


def train(recipe, plan, seed, report):
    shout("train")
    model = build(plan.scale.width, plan.scale.depth)
    plan.initialize(model, seed)
    for step in range(report.steps):
        report(step + 1, 2.0)
    return 1.0 + abs(recipe.lr - 0.01)
"""

EXPERIMENT = """
model: loud.py:build
data: digits
proxy: {width: 8, depth: 1}
steps: 4
batch_size: 8
rungs: 1
trials: 2
recipe: {lr: 0.015625, warmup: 0.0}
search:
  lr: {low: 0.001953125, high: 0.125, log: true}
"""


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loud")
    (folder / "loud.py").write_text(LOUD)
    (folder / "loud.yaml").write_text(EXPERIMENT)
    (folder / "trained.yaml").write_text(EXPERIMENT.replace("data: digits", "data: digits\ntrainer: loud.py:train"))
    return folder


COMMANDS: list[tuple[str, ...]] = [
    ("plan", "loud.py:build", "--width", "32", "--base-width", "8", "--data", "digits"),
    ("check", "loud.py:build", "--widths", "8,16,32", "--base-width", "8", "--data", "digits", "--seeds", "2", "--steps", "1"),
    ("tune", "loud.yaml", "--out", "run", "--executor", "one"),
    ("verify", "run", "--widths", "8,16", "--seeds", "2"),
    ("transfer", "run", "--width", "16"),
    ("train", "run/target.json"),
    ("audit", "run/target.json", "run/train/checkpoint.pt"),
    ("report", "run"),
    ("tune", "trained.yaml", "--out", "trained", "--executor", "processes", "--at-once", "2"),
]  # fmt: skip


@pytest.mark.parametrize(
    "some", [COMMANDS[:1], pytest.param(COMMANDS, marks=pytest.mark.extended)], ids=["plan", "every command"]
)
def test_stdout_holds_the_result_alone(some: list[tuple[str, ...]], loud: Path, commands: Processes) -> None:
    for arguments in some:
        ended = commands.run(*arguments, "--json", cwd=loud)
        assert ended.code in (0, 1), ended.err
        assert ended.json
        if arguments[0] not in ("audit", "report"):
            said = Counter(re.sub(r"[\d.]+", "0", line) for line in ended.err.splitlines())
            assert {f"import {how}" for how in ("print", "write", "descriptor", "puts", "child")} <= set(said), said
        again = commands.run(*arguments, cwd=loud)  # without --json as well
        assert not re.search("print|write|descriptor|puts|child|built", again.out), again.out


@pytest.mark.parametrize("arguments", COMMANDS[:2], ids=["plan", "check"])
def test_what_a_build_prints_is_shown_once(arguments: tuple[str, ...], loud: Path, commands: Processes) -> None:
    said = Counter(commands.run(*arguments, "--json", cwd=loud).err.splitlines())
    built = {line: count for line, count in said.items() if line.startswith("build")}
    assert {"build 8 print", "build 8 puts", "build 8 child"} <= set(built)
    assert set(built.values()) == {1}, built
    widths = {line.split()[1] for line in built}
    assert sum(line.startswith("built in") for line in said.elements()) <= len(widths)  # a time of its own each time
    assert sum(line.startswith("forward") for line in said.elements()) <= 4, (
        said
    )  # of the observed and the checked batch


@pytest.mark.extended
def test_what_is_printed_at_exit_is_no_result(loud: Path) -> None:
    command = [sys.executable, "-c", "from mutransfer.cli import main; main()", *COMMANDS[0], "--json"]
    ended = subprocess.run(command, cwd=loud, capture_output=True, text=True, check=True, timeout=90)
    assert validated("plan", ended.stdout)["parameters"]
    for how in ("print", "write", "descriptor", "puts", "child"):
        assert f"exit {how}\n" in ended.stderr


def test_a_model_that_ends_the_process_does_not_end_the_command(loud: Path, commands: Processes) -> None:
    (loud / "ends.py").write_text("import sys\n\ndef build(width, depth):\n    sys.exit(0)\n")
    ended = commands.run("plan", "ends.py:build", "--width", "32", "--base-width", "8", "--data", "digits", cwd=loud)
    assert (ended.code, ended.out) == (2, "")
    assert "SystemExit" in ended.err


def test_embedded_in_another_program_the_result_goes_to_its_stream(
    loud: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(loud)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert run([*COMMANDS[0], "--json"]) == 0
    assert sys.stdout is stream
    assert validated("plan", stream.getvalue())
    assert capfd.readouterr().out == ""
    print("back")
    assert stream.getvalue().endswith("back\n")


def test_doctor_and_init(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["init", str(tmp_path / "new"), "--json"]) == 0
    validated("init", capsys.readouterr().out)
    monkeypatch.setitem(sys.modules, "mup", None)
    assert run(["doctor", "--json"]) == 1
    assert validated("doctor", capsys.readouterr().out)["verdict"] == "fail"


@pytest.mark.extended
def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = {"steps": 2, "trials": 2, "batch_size": 2, "sequence_length": 8}
    monkeypatch.setattr(demo, "EXPERIMENT", demo.EXPERIMENT | small)
    for name, value in {"WIDTHS": (16, 32), "CHECK_WIDTHS": [16, 32], "SEEDS": 2}.items():
        monkeypatch.setattr(demo, name, value)
    assert run(["demo", "--out", str(tmp_path / "demo"), "--json"]) in (0, 1)
    assert Path(validated("demo", capsys.readouterr().out)["report"]).is_file()


def test_json_has_plain_values_alone() -> None:
    given: dict[Any, Any] = {
        "a": np.array([1.5, np.nan]), "b": torch.tensor([[float("inf"), 2.0]]), "c": np.float32("nan"), "d": pd.NA,
        "e": Path("a/b"), "f": np.bool_(True), "g": np.int64(3), 4: {"h": (float("-inf"), None, True)}, "i": np.str_("µ"),
    }  # fmt: skip
    expected = {
        "a": [1.5, None], "b": [[None, 2.0]], "c": None, "d": None, "e": "a/b", "f": True, "g": 3,
        "4": {"h": [None, None, True]}, "i": "µ",
    }  # fmt: skip
    assert json.loads(json.dumps(as_json_value(given), allow_nan=False)) == expected


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_is_written_whatever_the_encoding(encoding: str, tmp_path: Path) -> None:
    folder = tmp_path / "µ"
    ended = subprocess.run(
        [sys.executable, "-c", "from mutransfer.cli import main; main()", "init", str(folder), "--json"],
        env={"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(ended.stdout.decode(encoding)) == {"path": str(folder / "experiment.yaml")}


def test_the_documents_are_up_to_date(tmp_path: Path) -> None:
    """If not: python -m mutransfer.cli.output."""
    write_documents(tmp_path)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"json.md", *(f"schemas/{command}.json" for command in OUTPUTS)}
    for name in written:
        assert (tmp_path / name).read_text() == (ROOT / "docs/reference" / name).read_text(), name
    assert {path.name for path in (ROOT / "docs/reference/schemas").iterdir()} == {
        f"{command}.json" for command in OUTPUTS
    }


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("report", '{"report": "a", "more": 1}'),
        ("report", "{}"),
        ("report", '{"report": 3}'),
        ("train", '{"verdict": "maybe", "loss": 1.0, "steps": 1, "tokens_per_second": null, "checkpoint": null}'),
        ("train", '{"verdict": "pass", "loss": NaN, "steps": 1, "tokens_per_second": null, "checkpoint": null}'),
    ],
)
def test_a_wrong_object_is_seen(command: str, line: str) -> None:
    with pytest.raises(AssertionError, match=r"mutransfer\.cli\.output"):
        validated(command, line)


def simulated(optima: dict[int, float], noise: float) -> pd.DataFrame:
    draws = np.random.default_rng(0)
    rows = [
        {"parametrization": "mup", "width": width, "depth": 2, "log2_lr": float(x), "seed": seed, "diverged": False,
         "loss": 2.0 + 0.05 * (x - best) ** 2 + noise * draws.normal(), "flops": 1.0, "seconds": 1.0}
        for width, best in optima.items() for x in range(-9, -1) for seed in range(3)
    ]  # fmt: skip
    return BASINS.frame(rows)


@pytest.mark.parametrize(
    ("verdict", "optima", "noise"),
    [("pass", {8: -5.0, 16: -5.0}, 1e-3), ("fail", {8: -5.0, 16: -3.0}, 1e-3), ("undecided", {8: -5.0, 16: -5.0}, 0.3)],
)
def test_verify_in_every_verdict(
    verdict: str, optima: dict[int, float], noise: float, shop: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (shop / "run" / "best.json").write_text(f'{{"lr": {2**-5}}}')
    monkeypatch.setattr(verify, "basins", lambda *args, **options: simulated(optima, noise))
    code = run(["verify", str(shop / "run"), "--widths", "8,16", "--executor", "one", "--json"])
    told = validated("verify", capsys.readouterr().out)
    assert (told["verdict"], code) == (verdict, 0 if verdict == "pass" else 1), told["reasons"]
