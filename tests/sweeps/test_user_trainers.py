"""An own trainer in Python: it trains by the plan, is pruned, and what is wrong with it is said in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mutransfer.errors import RequestError
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.commands import Commands
from mutransfer.sweeps.executors import executor_for
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, RunContext, SequentialExecutor, run_jobs
from mutransfer.sweeps.processes import ProcessExecutor
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.user_trainers import TrialRun
from mutransfer.sweeps.verify import basins

from ..helpers.planted_trainers import TRAINER
from ..helpers.scripts import MODEL, states
from ..helpers.small import SMALL, contents, experiment, journal, within

LR = {"lr": {"low": 2**-9, "high": 2**-3, "log": True}}


@pytest.fixture(autouse=True)
def _shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODEL)
    (tmp_path / "own.py").write_text(TRAINER)
    (tmp_path / "helper.py").write_text("def labels(x):\n    return (x[:, 0] > 0).long()\n")
    (tmp_path / "broken.py").write_text("raise OSError('no licence')\n")


def own(name: str, **changes: Any) -> Experiment:
    return experiment(**{"model": "models.py:build", "data": "none", "trainer": f"own.py:{name}", **changes})


def refusal(given: Experiment, folder: RunFolder) -> str:
    with pytest.raises(RequestError) as caught:
        tune(given, folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


def test_it_trains_by_the_plan_and_everywhere_alike(folder: RunFolder) -> None:
    given = own("train", search={"lr": {"low": 2**-6, "high": 2**-3, "log": True}})
    found = tune(given, folder)
    assert found.trials["state"].tolist() == ["COMPLETE"] * 4
    assert found.value < math.log(2) < found.default  # type: ignore[operator]
    assert found.trials["flops"].isna().all()
    assert (found.trials["seconds"] > 0).all()
    assert [trial.intermediate_values.keys() for trial in journal(folder).trials] == [{3, 5}] * 4
    noted = json.loads(folder.environment.read_text())
    assert noted["data"] == "none"
    assert "data_sha256" not in noted

    job = Job(0, given.proxy_scale, "mup", found.best, 0)
    ((_, alone),) = run_jobs(SequentialExecutor(), RunContext(given), [job])
    with executor_for(given, "processes", 1) as executor:
        ((_, beside),) = run_jobs(executor, RunContext(given), [job])
    assert alone.loss == beside.loss == found.value


@pytest.mark.parametrize(
    ("how", "at_once", "expected"),
    [
        ("auto", None, SequentialExecutor),
        ("one", None, SequentialExecutor),
        ("auto", 2, ProcessExecutor),
        ("processes", 2, ProcessExecutor),
        ("fused", 2, SequentialExecutor),
    ],
)
def test_it_is_never_measured_nor_fused(
    how: str, at_once: int | None, expected: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with executor_for(own("bowl"), how, at_once, "cuda") as executor:
        assert type(executor) is expected
    said = "trials are not fused: own.py:bowl trains them.\n" if how == "fused" else ""
    assert capsys.readouterr().err == said
    command = experiment(model="models.py:build", data="none", trainer={"command": "c {plan}"})
    with executor_for(command, how, at_once, "cuda") as executor:
        assert isinstance(executor, Commands)
        assert executor.capacity == (2 if expected is ProcessExecutor else 1)
    with (
        pytest.raises(RequestError, match=r"bfloat16 is for fused trials, but own\.py:bowl trains"),
        executor_for(own("bowl"), "auto", precision="bfloat16"),
    ):
        pass


def test_widths_are_compared_with_it(folder: RunFolder) -> None:
    given = own("train")
    frame = basins(
        RunContext(given), given.recipe, [8, 16], folder=folder.make(), executor=SequentialExecutor(), seeds=1
    )
    assert frame["loss"].notna().all()
    assert frame["flops"].isna().all()
    assert frame["loss"].nunique() == len(frame)


@pytest.mark.parametrize("name", ["bowl", "stubborn"])
def test_it_is_pruned(name: str, folder: RunFolder) -> None:
    found = tune(own(name, pruner="median", sampler="random", trials=12), folder)
    pruned = found.trials[found.trials["state"] == "PRUNED"]
    assert 1 <= len(pruned) < 12
    assert set(pruned["steps"]) <= {3, 5}
    assert set(states(found)) == {"COMPLETE", "PRUNED"}
    assert found.warnings == []


@pytest.mark.extended
def test_it_is_pruned_in_processes(folder: RunFolder) -> None:
    with within(60), ProcessExecutor(2) as executor:
        found = tune(own("bowl", pruner="half", sampler="random", trials=12), folder, executor=executor)
    assert states(found).count("PRUNED") >= 1
    assert len(found.trials) == 12


@pytest.mark.parametrize("name", ["silent", "epochs"])
def test_a_trainer_that_cannot_be_pruned_is_told_so(name: str, folder: RunFolder) -> None:
    found = tune(own(name, pruner="median"), folder)
    assert any("no trial reported a loss at or after step 3" in warning for warning in found.warnings)
    other = tune(own(name), RunFolder(folder.path.with_name("none")))
    assert not any("no trial reported" in warning for warning in other.warnings)


@pytest.mark.parametrize("name", ["overflows", "grows"])
def test_a_loss_that_is_no_number_or_above_its_start_has_diverged(name: str, folder: RunFolder) -> None:
    found = tune(own(name, trials=6, sampler="random"), folder)
    assert states(found) == ["COMPLETE"] * 6
    assert (found.trials["diverged"] == (found.trials["lr"] > 2**-6)).all()
    assert 1 <= found.trials["diverged"].sum() < 6
    told = [trial.value for trial in journal(folder).trials]
    assert all((value == 8.0) == lost for value, lost in zip(told, found.trials["diverged"], strict=True))


def test_a_divergence_without_a_start_is_told_as_worse_than_all(folder: RunFolder) -> None:
    (folder.path.parent / "huge.py").write_text(
        "def train(recipe, plan, seed, report):\n    return 4000.0 if recipe.lr <= 2 ** -6 else float('nan')\n"
    )
    found = tune(own("", trainer="huge.py:train", trials=6, sampler="random"), folder)
    told = [trial.value for trial in journal(folder).trials]
    assert found.trials["diverged"].any()
    assert all((value == 8000.0) == lost for value, lost in zip(told, found.trials["diverged"], strict=True))


def test_a_failing_trial_is_replaced_and_named(folder: RunFolder) -> None:
    # The recipe's own learning rate works; a row of three that do not is unlikely, and of no interest here.
    search = {"lr": {"low": 2**-9, "high": 2**-5.5, "log": True}}
    found = tune(own("sometimes", trials=12, sampler="random", search=search), folder)
    assert states(found).count("COMPLETE") == 12
    lost = found.trials[found.trials["state"] == "FAIL"]
    assert len(lost) >= 1
    assert (lost["lr"] > 2**-6).all()
    line = 1 + TRAINER.splitlines().index('        raise MemoryError("too large")')
    assert any(f"MemoryError: too large (line {line} of {Path('own.py').resolve()})" in said for said in found.warnings)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", ["trial 0 failed because own.py:fails raised ValueError: no such dataset (line", "own.py)", "again"]),
        ("leaves", ["own.py:leaves raised SystemExit: out of licences (line"]),
        ("returns_none", ["own.py:returns_none returned None: give the loss, one number"]),
        ("returns_text", ["own.py:returns_text returned str 2.5"]),
        ("reports_text", ["own.py:reports_text reported at step 'first': give the number of optimizer steps"]),
        ("reports_pair", ["own.py:reports_pair reported tuple (2.5, 2.6)"]),
    ],
)
def test_a_trainer_that_never_works_ends_the_sweep_in_a_sentence(name: str, said: list[str], folder: RunFolder) -> None:
    sentence = refusal(own(name), folder)
    assert all(part in sentence for part in said), sentence
    assert [trial.state.name for trial in journal(folder).trials] == ["FAIL", "WAITING"]
    (folder.path.parent / "own.py").write_text(
        TRAINER.replace(f"def {name}(", f"def {name}(*_):\n    return 1.0\ndef _(")
    )
    assert tune(own(name, trials=1), folder).default == 1.0


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("none.py:train", ["there is no file none.py", "path/to/file.py:name or package.module:name"]),
        ("own.py:trian", ["own.py has no 'trian'", "did you mean 'train'?"]),
        ("own.py:two", ["own.py:two is called as two(recipe, plan, seed, report) but takes (recipe, plan)"]),
        ("own.py:number", ["own.py:number is of type int"]),
        ("broken.py:train", ["broken.py could not be imported", "OSError: no licence (line 1"]),
        ("no_such_package.train:go", ["there is no module 'no_such_package'"]),
    ],
)
def test_what_is_no_trainer_is_said_before_anything_is_written(
    trainer: str, said: list[str], folder: RunFolder
) -> None:
    before = contents(folder.path.parent)
    sentence = refusal(own("", trainer=trainer), folder)
    assert all(part in sentence for part in said), sentence
    assert {name for name in contents(folder.path.parent) if "__pycache__" not in name} == set(before)


def test_another_trainer_is_another_study(folder: RunFolder) -> None:
    tune(own("bowl"), folder)
    assert "trainer = own.py:bowl" in refusal(own("silent"), folder)


def test_a_study_from_before_there_were_trainers_goes_on(folder: RunFolder) -> None:
    tune(experiment(trials=1), folder)
    study = journal(folder)
    study.set_user_attr("experiment", {k: v for k, v in study.user_attrs["experiment"].items() if k != "trainer"})
    assert len(tune(experiment(trials=2), folder).trials) == 2


# trainer, other changes → what the sentence must say
WRONG = [
    ("train.py", {}, ["'train.py' does not name a function", "file.py:name"]),
    ("torchrun train.py --recipe {recipe}", {}, ["does not name a function", "trainer: {command:"]),
    ({"call": "a.py:b", "command": "c {plan}"}, {}, ["trainer", "either call", "or command"]),
    ({}, {}, ["either call"]),
    ({"call": "a.py:b", "timeout": 3}, {}, ["timeout and retries only apply to a command"]),
    ({"comand": "c {plan}"}, {}, ["'trainer.comand'", "did you mean 'command'?"]),
    ({"command": "train --recipe {recpie}"}, {}, ["placeholder {recpie}", "did you mean 'recipe'?"]),
    ({"command": "train {plan.scale}"}, {}, ["placeholder {plan.scale}"]),
    ({"command": "train {plan} {}"}, {}, ["placeholder {}", "known names are out, plan, recipe, seed, slot"]),
    ({"command": "train --seed {seed}"}, {}, ["neither {recipe} nor {plan}"]),
    ({"command": "train {plan} {"}, {}, ["cannot be read"]),
    ({"command": "train '{plan}"}, {}, ["cannot be read", "No closing quotation"]),
    ({"command": " "}, {}, ["command is empty"]),
    ({"command": "c {plan}", "timeout": 0}, {}, ["trainer.timeout is 0", "greater than 0"]),
    ({"command": "c {plan}", "retries": -1}, {}, ["trainer.retries is -1"]),
    (None, {"data": "none"}, ["data none is for a trainer that loads its own"]),
]


@pytest.mark.parametrize(("trainer", "changes", "said"), WRONG, ids=str)
def test_a_wrong_trainer_is_refused(trainer: Any, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        Experiment.read({**SMALL, **changes, "trainer": trainer}, "test")
    assert all(part in str(caught.value) for part in said), caught.value


def test_a_trainer_survives_its_file_and_the_command_line(tmp_path: Path) -> None:
    given = own("train")
    assert Experiment.load(given.save(tmp_path / "one.yaml")) == given
    changed = Experiment.load(tmp_path / "one.yaml", ["trainer=own.py:bowl"])
    assert changed.trainer is not None
    assert changed.trainer.call == "own.py:bowl"
    command = "train.py --plan {plan} --text '{{1}} and {{2}}' {out}/x"
    loaded = Experiment.load(tmp_path / "one.yaml", ["trainer=", f"trainer.command={command}", "trainer.timeout=5"])
    assert loaded.trainer is not None
    assert loaded.trainer.words({"plan": "a b", "out": "/c d"}) == [
        "train.py",
        "--plan",
        "a b",
        "--text",
        "{1} and {2}",
        "/c d/x",
    ]
    assert loaded.trainer.timeout == 5


def test_rungs_are_asked_once_and_in_order() -> None:
    asked: list[tuple[int, float]] = []

    attempt = TrialRun(50, (10, 20, 30, 40))

    def reported(step: int, loss: float) -> bool:
        if (rung := attempt.on_report(step, loss)) is not None:
            asked.append((rung, loss))
            attempt.stopped = rung == 30
        return attempt.over

    assert [reported(step, step / 10) for step in (0, 9, 11, 19, 29, 29)] == [False] * 6
    attempt.again()
    assert attempt.last is None
    assert [reported(step, step / 10) for step in (1, 15, 33)] == [False, False, True]
    assert asked == [(10, 1.1), (20, 2.9), (30, 3.3)]
    outcome = attempt.outcome()
    assert (outcome.loss, outcome.start, outcome.steps, outcome.stopped) == (3.3, 0.0, 33, True)
