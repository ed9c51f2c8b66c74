"""A metric of which more is better: tuned, pruned, repeated, verified and reported as the person's trainer reports it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from mutransfer.errors import RequestError
from mutransfer.recipe import Recipe
from mutransfer.reports import write_report
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.executors import executor_for
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.pruners import Halving
from mutransfer.sweeps.samplers import foreseen
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.verify import verify_run

from ..helpers.scripts import MODEL
from ..helpers.small import experiment, journal

# Accuracy is best at lr 2^-6, falls by a hundredth per square octave, and is lost above 2^-3.5.
ACCURACY = """
import math

def accuracy(lr, width, seed):
    away = math.log2(lr) + 6
    if away > 2.5:
        return float("nan")
    return 0.8 + 0.01 * math.log2(width) - 0.01 * away**2 + 0.0002 * math.sin(1e3 * away + 7 * seed)
"""
FUNCTION = """
from accuracy import accuracy

def train(recipe, plan, seed, report):
    final = accuracy(recipe.lr, plan.scale.width, seed)
    report(0, 0.1)
    for step in range(1, report.steps):
        report(step, 0.1 + (final - 0.1) * step / report.steps)
    return final
"""
COMMAND = """
import json, sys
from accuracy import accuracy

plan, recipe = (json.load(open(path)) for path in sys.argv[1:3])
final = accuracy(recipe["lr"], plan["scale"]["width"], int(sys.argv[3]))
print(json.dumps({"step": 0, "loss": 0.1}))
print(json.dumps({"step": 8, "loss": final, "final": True}))
"""


@pytest.fixture(autouse=True)
def _shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("models", MODEL), ("accuracy", ACCURACY), ("own", FUNCTION), ("script", COMMAND)):
        (tmp_path / f"{name}.py").write_text(text)


def asked(trainer: Any = "own.py:train", **changes: Any) -> Experiment:
    return experiment(
        **{
            "model": "models.py:build", "data": "none", "trainer": trainer, "direction": "maximize", "trials": 8,
            "recipe": {"lr": 2**-8, "warmup": 0.0}, "search": {"lr": {"low": 2**-9, "high": 2**-3, "log": True}},
            **changes,
        }
    )  # fmt: skip


def test_the_best_is_the_highest_from_tune_to_report(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    given = asked(pruner="half", repeats={"top": 2, "seeds": 2})
    found = tune(given, folder)
    study = journal(folder)
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    frame = TRIALS.read(folder.trials)
    complete = frame[frame["state"].eq("COMPLETE") & ~frame["diverged"]]
    assert (complete["value"].between(0.7, 1)).all()
    nearest = min(complete["lr"], key=lambda lr: abs(math.log2(lr) + 6))
    assert found.best.lr == nearest
    assert found.value == pytest.approx(complete.loc[complete["lr"] == nearest, "value"].item(), abs=1e-3)
    lost = [trial for trial in study.trials if trial.user_attrs["outcome"]["diverged"] and trial.value is not None]
    assert all(trial.value < complete["value"].min() for trial in lost)

    recipe = Recipe.load(folder.best).with_(lr=2**-6)
    with executor_for(given, "one", folder=folder.path) as executor:
        result, optima = verify_run(RunContext(given), recipe, folder, [8, 16, 32], executor, seeds=3, control=None)
    assert result["verdict"] == "pass", result["reasons"]
    assert optima["log2_lr"].tolist() == pytest.approx([-6, -6, -6], abs=0.1)
    assert result["limits"]["unit"] == "in the metric's unit"
    assert result["limits"]["regret"] == pytest.approx(0.02 * 0.83, rel=0.01)
    assert (optima["best_loss"].diff()[1:] > 0).all()
    assert {row["log2_lr"] for row in result["comparison"]} == {-6}
    tune(given, folder)
    html = write_report(folder.path).read_text(encoding="utf-8")
    assert "proxy metric of the recipe" in html


def test_a_rate_that_costs_accuracy_fails(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").make()
    given = asked()
    with executor_for(given, "one", folder=folder.path) as executor:
        recipe = Recipe(lr=2**-8, warmup=0.0)
        result, _ = verify_run(
            RunContext(given), recipe, folder, [8, 16], executor, seeds=3, control=None, regret_limit=0.02
        )
    assert result["verdict"] == "fail"
    assert result["regret"]["mup"][16]["value"] == pytest.approx(0.04, abs=0.005)


def test_a_command_reports_a_metric_too(tmp_path: Path) -> None:
    given = asked({"command": f"{sys.executable} script.py {{plan}} {{recipe}} {{seed}}"}, trials=3, pruner="none")
    folder = RunFolder(tmp_path / "run")
    with executor_for(given, "processes", 1, folder=folder.path) as executor:
        found = tune(given, folder, executor=executor)
    complete = found.trials[~found.trials["diverged"]]
    assert found.value == complete["value"].max()


def test_halving_keeps_the_highest() -> None:
    study = optuna.create_study(direction="maximize")
    pruner = Halving((5,), reduction=2)
    for value in (0.5, 0.6, 0.7, 0.8):
        trial = study.ask()
        trial.report(value, 5)
    trials = study.get_trials()
    assert [pruner.prune(study, trial) for trial in trials] == [True, True, False, False]


def test_a_pruned_trial_is_foreseen_no_lower_than_the_worst() -> None:
    done = [
        create_trial(state=TrialState.COMPLETE, value=value, intermediate_values={5: value - 0.1})
        for value in (0.5, 0.6, 0.7, 0.8)
    ]
    stopped = create_trial(state=TrialState.PRUNED, intermediate_values={5: 0.1})
    assert foreseen([*done, stopped], maximize=True)[-1].value == 0.5
    assert foreseen([*done, stopped])[-1].value == pytest.approx(0.2)


def test_the_built_in_loop_has_no_metric_to_maximize() -> None:
    with pytest.raises(RequestError, match="direction maximize is for a trainer"):
        experiment(direction="maximize")
    assert json.loads(experiment().model_dump_json())["direction"] == "minimize"
