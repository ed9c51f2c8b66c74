"""An interruption inside Optuna's replay of a journal, after a line is counted as read and before it is applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages.journal._storage import JournalStorageReplayResult

from mutransfer.runs import RunFolder
from mutransfer.sweeps.claims import Claims
from mutransfer.sweeps.storages import own_journal


def test_the_parameters_it_met_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = own_journal(RunFolder(tmp_path / "run").make()).backend
    study = optuna.create_study(storage=storage, study_name="s")
    claims = Claims(study, {"lr": FloatDistribution(0, 1)}, 4, None, "me")

    def met(self: Any, log: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(JournalStorageReplayResult, "_apply_set_trial_param", met)
        with pytest.raises(KeyboardInterrupt):
            claims.next()
    claims.give_back_own()
    lost, again = claims.trials()
    assert [lost.state.name, again.state.name] == ["FAIL", "WAITING"]
    assert lost.params.keys() == {"lr"}
    assert again.system_attrs["fixed_params"] == lost.params
