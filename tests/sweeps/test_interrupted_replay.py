"""A Ctrl-C inside Optuna's replay of a journal, after a line is counted as read and before it is applied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal._storage import JournalStorageReplayResult
from optuna.trial import TrialState

from mutransfer.run_dir import RunFolder
from mutransfer.sweeps._optuna_internals import InterruptibleJournalStorage
from mutransfer.sweeps.storage import Journal, opened, own_journal
from mutransfer.sweeps.workers import TrialQueue

from ..helpers.servers import redis


@pytest.fixture(params=["own", "journal", pytest.param("redis", marks=pytest.mark.integration)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    if request.param == "own":
        yield own_journal(RunFolder(tmp_path / "run").make()).backend
    elif request.param == "journal":
        with opened(f"journal:{tmp_path / 'shared'}") as shared:
            yield shared.backend
    else:
        with redis(tmp_path) as server, opened(server.url) as shared:
            yield shared.backend


def interrupted(line: str, patched: pytest.MonkeyPatch) -> None:
    def met(self: Any, log: Any) -> None:
        raise KeyboardInterrupt

    patched.setattr(JournalStorageReplayResult, f"_apply_{line}", met)


@pytest.mark.parametrize("refused", [False, True], ids=["", "after a refusal"])
def test_the_parameters_that_it_met_are_tried_again(
    refused: bool, storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=storage, study_name="s")
    claims = TrialQueue(study, {"lr": FloatDistribution(0, 1)}, 4, None, "me")
    if refused:
        trial = study.ask()
        study.tell(trial, state=TrialState.FAIL)
        with pytest.raises(UpdateFinishedTrialError):
            trial.set_user_attr("late", 1)
    with monkeypatch.context() as patched:
        interrupted("set_trial_param", patched)
        with pytest.raises(KeyboardInterrupt):
            claims.next()
    claims.requeue_own()
    *_, lost, again = claims.trials()
    assert [lost.state.name, again.state.name] == ["FAIL", "WAITING"]
    assert lost.params.keys() == {"lr"}
    assert again.system_attrs["fixed_params"] == lost.params


@pytest.mark.parametrize("line", ["create_trial", "set_trial_intermediate_value", "set_trial_state_values"])
def test_afterwards_it_knows_what_a_new_reader_knows(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_trial(study: optuna.Study) -> None:
        trial = study.ask()
        trial.report(1.0, 3)
        study.tell(trial, 2.0)

    study = optuna.create_study(storage=InterruptibleJournalStorage(Journal(tmp_path / "j")), study_name="s")
    with monkeypatch.context() as patched:
        interrupted(line, patched)
        with pytest.raises(KeyboardInterrupt):
            one_trial(study)
    fresh = optuna.load_study(study_name="s", storage=JournalStorage(Journal(tmp_path / "j")))
    assert len(fresh.get_trials()) == 1
    assert study.get_trials() == fresh.get_trials()
