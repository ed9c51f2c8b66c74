"""An experiment's paths lead from its file, a run folder works from any directory, and finds what moved with it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from mutransfer.errors import RequestError
from mutransfer.sweeps.experiment import Experiment

from ..helpers.processes import Processes

MODEL = """
import torch
from torch import nn
from helper import SYMBOLS

batch = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)

def build(width, depth):
    return nn.Sequential(nn.Embedding(SYMBOLS, width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, SYMBOLS))

def train(recipe, plan, seed, report):
    model = build(plan.scale.width, plan.scale.depth)
    plan.initialize(model, seed)
    for step in range(report.steps):
        report(step + 1, 3.0)
    return abs(recipe.lr - 0.01) + plan.scale.width + report.steps
"""

SCRIPT = """
import json, os, sys
plan, recipe, out = json.load(open(sys.argv[1])), json.load(open(sys.argv[2])), sys.argv[3]
calls = os.path.join(out, "calls")
print("width", plan["scale"]["width"], "in", os.getcwd())
open(calls, "a").write("x")
print(json.dumps({"step": plan["steps"], "loss": abs(recipe["lr"] - 0.01) + plan["scale"]["width"] + plan["steps"]}))
"""

EXPERIMENT = {
    "model": "code/model.py:build", "data": "text:corpus.txt", "sequence_length": 8, "proxy": {"width": 8, "depth": 1},
    "steps": 2, "batch_size": 2, "rungs": 1, "trials": 1, "recipe": {"lr": 0.015625, "warmup": 0.0},
    "search": {"lr": {"low": 0.001953125, "high": 0.125, "log": True}},
}  # fmt: skip
CALL = {"trainer": "code/model.py:train", "data": "none"}
COMMAND = {"trainer": {"command": "python script.py {plan} {recipe} {out}"}, "data": "none"}


def project(folder: Path, **changes: object) -> Path:
    """A project with code, a corpus and an experiment."""
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "model.py").write_text(MODEL)
    (folder / "code" / "helper.py").write_text("SYMBOLS = 256\n")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "corpus.txt").write_bytes(random.Random(0).randbytes(1000))
    (folder / "experiment.yaml").write_text(yaml.safe_dump({**EXPERIMENT, **changes}))
    return folder


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """A folder from which nothing leads to the project by the paths in its experiment."""
    (tmp_path / "somewhere" / "else").mkdir(parents=True)
    return tmp_path / "somewhere" / "else"


def works(commands: Processes, run: Path, experiment: Path, trials: int, cwd: Path) -> None:
    """All that can be done with a run folder can be done from ``cwd``."""
    for arguments in (
        ("tune", str(experiment), "--out", str(run), "--trials", str(trials), "--executor", "one", "--json"),
        ("verify", str(run), "--widths", "8,16", "--seeds", "2", "--executor", "one", "--json"),
        ("transfer", str(run), "--width", "16", "--json"),
        ("train", str(run / "target.json"), "--json"),
        ("report", str(run), "--json"),
    ):
        ended = commands.run(*arguments, cwd=cwd)
        assert ended.code in (0, 1), ended.err
        if arguments[0] == "tune":
            assert ended.json["trials"] == trials


@pytest.mark.extended
@pytest.mark.parametrize("changes", [{}, CALL, COMMAND], ids=["loop", "function", "command"])
def test_a_run_works_from_any_folder_and_after_a_move(
    changes: dict[str, object], commands: Processes, tmp_path: Path, away: Path
) -> None:
    old = project(tmp_path / "old", **changes)
    works(commands, old / "runs" / "a", old / "experiment.yaml", 1, cwd=old)
    works(commands, old / "runs" / "a", old / "experiment.yaml", 2, cwd=away)
    noted = json.loads((old / "runs" / "a" / "environment.json").read_text())
    assert noted["places"] == {str(old): "../.."}
    new = tmp_path / "deeper" / "new"
    new.parent.mkdir()
    old.rename(new)
    # Before anything of it is written anew.
    ended = commands.run("train", "runs/a/target.json", "--json", cwd=new)
    assert ended.code == 0, ended.err
    works(commands, Path("../deeper/new/runs/a"), Path("../deeper/new/experiment.yaml"), 3, cwd=tmp_path / "somewhere")


def test_a_run_that_moved_alone_finds_what_it_was_made_from(commands: Processes, tmp_path: Path, away: Path) -> None:
    old = project(tmp_path / "old")
    assert commands.run("tune", "experiment.yaml", "--out", "run", "--executor", "one", cwd=old).code == 0
    shutil.move(old / "run", away / "run")
    ended = commands.run("transfer", "run", "--width", "16", cwd=away)
    assert ended.code == 0, ended.err
    shutil.rmtree(old)
    ended = commands.run("transfer", "run", "--width", "16", cwd=away)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    for place in (old / "code" / "model.py", away / "code" / "model.py"):
        assert str(place) in ended.err
    ended = commands.run("train", "run/target.json", cwd=away)
    assert (ended.code, ended.err.count("\n")) == (2, 2)  # the first says what is begun
    assert str(old / "code" / "model.py") in ended.err


def test_a_copy_of_a_project_is_on_its_own(commands: Processes, tmp_path: Path) -> None:
    old = project(tmp_path / "old")
    assert commands.run("tune", "experiment.yaml", "--out", "run", "--executor", "one", cwd=old).code == 0
    new = tmp_path / "new"
    shutil.copytree(old, new)
    (new / "corpus.txt").write_bytes(random.Random(1).randbytes(1000))
    ended = commands.run("transfer", "run", "--width", "16", cwd=new)
    assert ended.code == 2
    assert "SHA-256" in ended.err
    (new / "corpus.txt").unlink()  # then the old one's is the one that was tuned on
    assert commands.run("transfer", "run", "--width", "16", cwd=new).code == 0


def test_a_run_of_an_earlier_version_leads_from_the_current_folder(commands: Processes, tmp_path: Path) -> None:
    old = project(tmp_path / "old")
    assert commands.run("tune", "experiment.yaml", "--out", "run", "--executor", "one", cwd=old).code == 0
    resolved = yaml.safe_load((old / "run" / "experiment.yaml").read_text())
    del resolved["folder"]
    (old / "run" / "experiment.yaml").write_text(yaml.safe_dump(resolved))
    noted = json.loads((old / "run" / "environment.json").read_text())
    del noted["places"]
    (old / "run" / "environment.json").write_text(json.dumps(noted))
    ended = commands.run("transfer", "run", "--width", "16", cwd=old)
    assert ended.code == 0, ended.err
    ended = commands.run(
        "tune", "experiment.yaml", "--out", "run", "--executor", "one", "--trials", "2", "--json", cwd=old
    )
    assert ended.json["trials"] == 2


def test_what_is_typed_leads_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = project(tmp_path / "there", **COMMAND)
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.py").write_text(SCRIPT)
    (here / "words").write_text("to be")
    monkeypatch.chdir(here)

    def load(*changes: str) -> Experiment:
        return Experiment.load("../there/experiment.yaml", list(changes))

    assert load().here().model == str(there / "code" / "model.py") + ":build"
    assert load("model=mine.py:build").here().model == str(here / "mine.py") + ":build"
    assert load("model=../there/code/model.py:build").model == "code/model.py:build"  # which a move leaves true
    assert load("data=text:words").here().data == f"text:{here / 'words'}"
    assert load("trainer=mine.py:train").here().references()["call"] == str(here / "mine.py") + ":train"
    typed = load("trainer.command=python mine.py {plan} {out}").trainer
    assert typed is not None
    assert typed.words({"plan": "p", "out": "o"}) == ["python", str(here / "mine.py"), "p", "o"]
    assert load().folder == str(there)
    assert load("data=text:/a/b").here().data == "text:/a/b"


@pytest.mark.extended
def test_a_module_is_found_below_the_experiments_folder(commands: Processes, tmp_path: Path, away: Path) -> None:
    old = project(tmp_path / "old", model="lab.nets:build", data="markov")
    (old / "lab").mkdir()
    (old / "lab" / "__init__.py").write_text("")
    (old / "lab" / "sizes.py").write_text("SYMBOLS = 64\n")
    source = MODEL.replace("from helper import SYMBOLS", "from .sizes import SYMBOLS")
    (old / "lab" / "nets.py").write_text(source)
    tune = ("tune", "../../old/experiment.yaml", "--out", "../../old/run", "--json")
    ended = commands.run(*tune, "--executor", "processes", "--at-once", "1", cwd=away)
    assert ended.code == 0, ended.err
    old.rename(tmp_path / "new")
    ended = commands.run("transfer", "../../new/run", "--width", "16", cwd=away)
    assert ended.code == 0, ended.err
    assert commands.run("train", "../../new/run/target.json", cwd=away).code == 0


@pytest.mark.parametrize(
    ("changes", "files"),
    [pytest.param(CALL, None, marks=pytest.mark.extended), (COMMAND, "xx")],
    ids=["function", "command"],
)
def test_train_starts_the_trainer_with_the_target(
    changes: dict[str, object], files: str | None, commands: Processes, tmp_path: Path, away: Path
) -> None:
    old = project(tmp_path / "old", **changes)
    assert commands.run("tune", "experiment.yaml", "--out", "run", cwd=old).code == 0
    ended = commands.run("transfer", "run", "--width", "32", "--tokens", "10", cwd=old)
    assert ended.code == 0, ended.err
    line = ended.out.splitlines()[-1]
    assert line == "next: mutransfer train run/target.json"
    best = json.loads((old / "run" / "best.json").read_text())["lr"]
    for _ in range(2):
        told = commands.run(*line.split()[2:], "--json", cwd=old).json
        assert told["loss"] == pytest.approx(abs(best - 0.01) + 32 + 5)  # the target's width and steps
        assert (told["verdict"], told["steps"], told["checkpoint"]) == ("pass", 5, None)
    if files is not None:
        assert (old / "run" / "train" / "out" / "calls").read_text() == files  # what the first call left is there
        assert f"in {old}" in (old / "run" / "train" / "stdout.log").read_text()
    ended = commands.run("train", str(old / "run" / "target.json"), cwd=away)
    assert (ended.code, "validation loss" in ended.out) == (0, True), ended.err


@pytest.mark.parametrize(
    "changes", [CALL, pytest.param(COMMAND, marks=pytest.mark.extended)], ids=["function", "command"]
)
def test_a_trainer_that_fails_is_said(changes: dict[str, object], commands: Processes, tmp_path: Path) -> None:
    old = project(tmp_path / "old", **changes)
    assert commands.run("tune", "experiment.yaml", "--out", "run", cwd=old).code == 0
    assert commands.run("transfer", "run", "--width", "32", cwd=old).code == 0
    (old / "code" / "model.py").write_text(MODEL.replace("return abs(", "return float('nan') * abs("))
    (old / "script.py").write_text(SCRIPT.replace('"loss": abs(', '"loss": float("nan") * abs('))
    ended = commands.run("train", "run/target.json", "--json", cwd=old)
    assert (ended.code, ended.json["verdict"], ended.json["loss"]) == (1, "fail", None)
    (old / "code" / "model.py").write_text(MODEL.replace("return abs(", "raise OSError('no GPU')\n    return abs("))
    (old / "script.py").write_text("raise OSError('no GPU')")
    ended = commands.run("train", "run/target.json", "--json", cwd=old)
    assert (ended.code, ended.out) == (2, "")
    assert "no GPU" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(("model", "data"), [("mlp", "digits"), ("resnet", "digits"), ("transformer", "bytes")])
def test_built_in_models_have_data_by_default(model: str, data: str) -> None:
    assert Experiment.read({"model": model}, "x").data == data
    assert Experiment.read({"model": "a.py:b", "trainer": "a.py:train"}, "x").data == "none"


@pytest.mark.parametrize("model", ["net.py:build", "package.module:build", "hf:config.json"])
def test_a_model_of_ones_own_is_given_no_data_that_nobody_named(model: str) -> None:
    with pytest.raises(RequestError, match=r"of your own.*name data \(digits, .*trainer"):
        Experiment.read({"model": model}, "x.yaml")


NET = """
import torch
from torch import nn
from torch.nn import functional as F

def build(width, depth=2):
    print(f"making a model of width {width}")
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

batch = torch.randn(64, 8), torch.randn(64, 1)

def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])
"""


@pytest.mark.parametrize("data", [None, "bytes"])
def test_data_that_a_model_does_not_take_is_said_in_one_sentence(
    data: str | None, commands: Processes, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(NET)
    given = {"model": "net.py:build", "proxy": {"width": 64}, "trials": 1, **({} if data is None else {"data": data})}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(given))
    ended = commands.run("tune", "net.yaml", cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    said = [line for line in ended.err.splitlines() if not line.startswith(("making a model", "tuning "))]
    assert len(said) == 1, ended.err
    assert said[0].startswith("mutransfer: ")
    assert "net.py:build" in said[0]
    if data is None:
        assert "name data" in said[0]
        assert not (tmp_path / "runs").exists()
