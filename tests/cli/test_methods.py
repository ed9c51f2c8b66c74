"""A training method from the proxy to the report, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mutransfer.cli import run
from mutransfer.errors import SettingsError
from mutransfer.methods import Pruned
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.experiment import Experiment

EXPERIMENT = """
model: mlp
data: digits
proxy: {width: 16, depth: 3}
steps: 12
batch_size: 16
rungs: 1
trials: 4
search: {lr: {low: 0.002, high: 0.06, log: true}}
"""
FORWARD = ["--set", "method=forward-gradient", "--set", "optimizer=sgd"]
PRUNED = ["--set", "method=pruned", "--set", "method.density=0.25"]


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    code = run([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code in codes, err
    return dict(json.loads(out))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    return str(path)


@pytest.mark.parametrize("score", ["erk", pytest.param("snip", marks=pytest.mark.extended)])
def test_pruned_from_the_proxy_to_the_report(
    score: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    asked(capsys, "tune", file, "--out", str(folder), *PRUNED, "--set", f"method.score={score}")
    method = json.loads((folder / "best.json").read_text())["method"]
    assert method == {"name": "pruned", "density": 0.25, "score": score, "rule": "supar"}
    asked(capsys, "verify", str(folder), "--widths", "16,32", "--seeds", "2", "--control", "sp", codes=(0, 1))
    target = asked(capsys, "transfer", str(folder), "--width", "32")
    densities = {row["name"]: row["density"] for row in target["parameters"] if "density" in row}
    assert set(densities) == {"hidden.0.weight", "hidden.1.weight"}
    assert not [text for text in target["warnings"] if "another recipe" in text]
    trained = asked(capsys, "train", str(folder / "target.json"))
    weights = torch.load(trained["checkpoint"], weights_only=True)["model"]
    masks = {name: each for name, each in weights.items() if name.endswith(".mask")}
    assert len(masks) == 2
    for name, mask in masks.items():
        original = weights[name.replace(".0.mask", ".original")]
        assert not original[mask == 0].any()
    kept, size = (sum(int(count(mask)) for mask in masks.values()) for count in (torch.sum, torch.numel))
    assert kept == pytest.approx(0.25 * size, abs=2)
    asked(capsys, "report", str(folder))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"pruned (density 0.25, score {score}, rule supar)" in page


def test_forward_gradients_from_the_proxy_to_the_report(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    settings = [*FORWARD, "--set", "search.tangents={choices: [2, 4]}"]
    asked(capsys, "tune", file, "--out", str(folder), *settings, "--executor", "fused")
    method = json.loads((folder / "best.json").read_text())["method"]
    assert method["tangents"] in (2, 4)
    asked(capsys, "verify", str(folder), "--widths", "16,32", "--seeds", "2", codes=(0, 1))
    target = asked(capsys, "transfer", str(folder), "--width", "32")
    assert len({row["lr"] for row in target["parameters"]}) == 1
    assert asked(capsys, "train", str(folder / "target.json"))["verdict"] in ("pass", "fail")
    asked(capsys, "report", str(folder))
    assert "forward-gradient (tangents" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_density_is_searched(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    ranged = "search.density={low: 0.1, high: 0.9}"
    found = asked(
        capsys, "tune", file, "--out", str(folder), "--set", "method=pruned", "--set", ranged, "--executor", "fused"
    )
    assert set(found["best"]["params"]) == {"lr", "density"}
    method = json.loads((folder / "best.json").read_text())["method"]
    assert 0.1 <= method["density"] <= 0.9


def test_plan_and_check_take_a_method(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = asked(capsys, "plan", "mlp", "--width", "128", "--method", "pruned,density=0.25,score=random")
    assert {row.get("density", 1.0) for row in planned["parameters"] if row["role"] == "hidden"} == {0.25}
    Path(file).write_text(EXPERIMENT + "method: {name: pruned, density: 0.5}\n")
    found = asked(capsys, "plan", file, "--width", "32")
    assert [row["density"] for row in found["parameters"] if "density" in row] == [0.5, 0.5]
    arguments = ["check", "mlp", "--widths", "16,32", "--steps", "1", "--seeds", "2", "--max-seeds", "2"]
    dense, pruned = (
        asked(capsys, *arguments, *more, codes=(0, 1)) for more in ([], ["--method", "pruned,density=0.25"])
    )
    assert [row["slope"] for row in dense["modules"]] != [row["slope"] for row in pruned["modules"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "mlp", "--width", "64", "--method", "pruned,density"], "'density' is not of the form key=value"),
        (["plan", "mlp", "--width", "64", "--method", "pruned,density=0"], "density is 0: it should be greater than 0"),
        (["check", "mlp", "--method", "prund"], "unknown method 'prund': did you mean 'pruned'?"),
        (
            ["plan", "mlp", "--width", "64", "--method", "pruned", "--optimizer", "muon"],
            "muon does not update every weight",
        ),
    ],
)
def test_a_wrong_method_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--set", "method.density=0.5"], "method"),
        (
            ["--set", "search.density={low: 0.1, high: 0.9}"],
            "search.density has no effect here (the method backprop has none)",
        ),
        (["--set", "method=pruned", "--set", "search.density={low: 0.0, high: 0.9}"], "density is 0"),
        (["--set", "method=forward-gradient"], "forward-gradient has a rule for sgd alone"),
        (
            [
                "--set",
                "method=forward-gradient",
                "--set",
                "optimizer=sgd",
                "--set",
                "search.tangents={low: 1, high: 16}",
            ],
            "search.tangents is a whole number: give choices",
        ),
        (
            ["--set", "method=pruned", "--set", "trainer=train.py:train"],
            "method pruned is for the built-in loop, which train.py:train",
        ),
    ],
)
def test_wrong_settings_in_an_experiment(
    changes: list[str], message: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", file, "--out", str(tmp_path / "run"), *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("written", "changes"),
    [
        ("method: pruned", ["recipe.method.density=0.5"]),
        ("method: {name: pruned, density: 0.2}", ["method.density=0.5"]),
        ("recipe: {method: {name: pruned}}", ["method.density=0.5"]),
        ("recipe: {method: pruned}", ["recipe.method.density=0.5"]),
        ("recipe: {method: pruned}", ["method=pruned", "method.density=0.5"]),
        ("", ["method=pruned", "method.density=0.5"]),
    ],
)
def test_settings_of_the_method_wherever_the_file_names_it(written: str, changes: list[str], file: str) -> None:
    Path(file).write_text(f"{EXPERIMENT}\n{written}\n")
    found = Experiment.load(file, changes).recipe.method
    assert isinstance(found, Pruned)
    assert found.density == 0.5


def test_a_method_that_is_named_twice_is_refused(file: str) -> None:
    Path(file).write_text(f"{EXPERIMENT}\nmethod: pruned\nrecipe: {{method: backprop}}\n")
    with pytest.raises(SettingsError, match="given twice"):
        Experiment.load(file)


def test_a_trial_costs_what_its_tangents_cost(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    settings = [*FORWARD, "--set", "search.tangents={choices: [1, 4]}"]
    asked(capsys, "tune", file, "--out", str(folder), *settings, "--set", "pruner=none", "--trials", "6")
    trials = TRIALS.read(RunFolder(folder).trials)
    complete = trials[trials["steps"] == 12]
    costs = complete.groupby("tangents")["flops"].agg(["min", "max"])
    assert (costs["min"] == costs["max"]).all()
    assert costs["max"].loc[4] == pytest.approx(3 * costs["max"].loc[1])


def test_an_export_without_a_place_for_the_method_is_refused(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    asked(capsys, "tune", file, "--out", str(folder), *PRUNED)
    assert run(["transfer", str(folder), "--width", "32", "--to", "pytorch"]) == 2
    assert "the recipe's method is pruned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "forward-gradient", "--optimizer", "sgd"], "says nothing about the noise of forward gradients"),
        (["--method", "pruned", "--parametrization", "own"], "the method pruned needs a plan"),
    ],
)
def test_a_check_that_cannot_be_made(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "mlp", "--widths", "16,32", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_check_under_another_method_does_not_count(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    asked(capsys, "tune", file, "--out", str(folder), *PRUNED)
    quick = ["--widths", "16,32", "--steps", "1", "--seeds", "2", "--max-seeds", "2", "--out", str(folder)]
    asked(capsys, "check", str(folder / "experiment.yaml"), "--method", "backprop", *quick, codes=(0, 1))
    warnings = asked(capsys, "transfer", str(folder), "--width", "32")["warnings"]
    assert [text for text in warnings if "checked for another method" in text]
    asked(capsys, "check", str(folder / "experiment.yaml"), *quick, codes=(0, 1))
    warnings = asked(capsys, "transfer", str(folder), "--width", "32")["warnings"]
    assert not [text for text in warnings if "another method" in text]
