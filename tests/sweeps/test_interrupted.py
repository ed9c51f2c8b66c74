"""Whatever interrupts a sweep, nothing finished is lost and the total stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.tune import tune

from ..helpers.small import Counting, Failing, Planted, experiment, journal, within
from ..helpers.tuned import assert_agrees, bowl, states


@pytest.mark.parametrize("tail", [b'{"op_code":4,"worker_id":"0', b"{", b'{"op_code":4}'])
def test_a_torn_journal_heals(tail: bytes, folder: RunFolder) -> None:
    tune(experiment(trials=2), folder, executor=Planted(bowl))
    whole = folder.journal.read_bytes()
    folder.journal.write_bytes(whole + tail)
    found = tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder) == ["COMPLETE"] * 4
    assert folder.journal.read_bytes().startswith(whole + b"{")
    assert_agrees(found, folder)


def test_a_lock_that_a_killed_process_left_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, as on the command line: Optuna's link then points nowhere, and it would wait for ever."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("run"))
    tune(experiment(trials=2), folder, executor=Planted(bowl))
    (tmp_path / "run" / "study.journal.lock").symlink_to("run/study.journal")
    with within(20):
        tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder) == ["COMPLETE"] * 4


def test_what_a_killed_process_had_begun_is_done_again(folder: RunFolder) -> None:
    tune(experiment(trials=2), folder, executor=Planted(bowl))
    space = {"lr": optuna.distributions.FloatDistribution(2**-9, 2**-3, log=True)}
    zombie = journal(folder).ask(fixed_distributions=space)
    assert states(folder) == ["COMPLETE", "COMPLETE", "RUNNING"]
    found = tune(experiment(), folder, executor=(counting := Counting(Planted(bowl))))
    assert states(folder) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert counting.jobs[0].recipe.lr == zombie.params["lr"]
    assert_agrees(found, folder)


def test_an_exception_gives_the_trial_back(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError):
        tune(experiment(), folder, executor=Failing(2, ZeroDivisionError(), Planted(bowl)))
    assert states(folder) == ["COMPLETE", "COMPLETE", "WAITING", "FAIL"] or states(folder) == [
        "COMPLETE", "COMPLETE", "FAIL", "WAITING",
    ]  # fmt: skip
    lost = next(trial.params for trial in journal(folder).trials if trial.state is TrialState.FAIL)
    found = tune(experiment(), folder, executor=(counting := Counting(Planted(bowl))))
    assert sorted(states(folder)) == ["COMPLETE"] * 4 + ["FAIL"]
    assert counting.jobs[0].recipe.lr == lost["lr"]
    assert len(counting.jobs) == 2
    assert_agrees(found, folder)


def test_an_interrupted_default_is_still_the_default(folder: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(experiment(), folder, executor=Failing(0, KeyboardInterrupt(), Planted(bowl)))
    found = tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder).count("COMPLETE") == 4
    assert found.default == pytest.approx(1.1)


def test_an_interruption_right_after_a_trial_was_told(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = optuna.Study.tell

    def interrupted(study: optuna.Study, trial: Any, *args: Any, **kwargs: Any) -> Any:
        told = tell(study, trial, *args, **kwargs)
        if kwargs.get("state") is None and told.number == 1:
            raise KeyboardInterrupt
        return told

    monkeypatch.setattr(optuna.Study, "tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(experiment(), folder, executor=Planted(bowl))
    monkeypatch.undo()
    assert states(folder) == ["COMPLETE", "COMPLETE"]
    tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder) == ["COMPLETE"] * 4
