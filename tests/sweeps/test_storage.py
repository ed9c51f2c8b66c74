"""Storages by address: refused in a sentence without a password, waited for when away, and done once though asked twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from mutransfer.errors import RequestError
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps import storage
from mutransfer.sweeps._optuna_internals import trial_id
from mutransfer.sweeps.jobs import Done, Events, Session
from mutransfer.sweeps.retry import RetryingStorage, outage
from mutransfer.sweeps.storage import opened
from mutransfer.sweeps.tune import tune

from ..helpers.servers import PASSWORD, Postgres, free_port, postgres, proxy
from ..helpers.small import Planted, contents, experiment, within

WORKERS = 8


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


def refusal(address: str) -> str:
    with pytest.raises(RequestError) as caught, opened(address):
        pass
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "s3cret" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("postgresql://ann:s3cret@127.0.0.1:{port}/x", ["postgresql://ann:***@127.0.0.1", "refused", "check that it runs"]),
        ("redis://:s3cret@127.0.0.1:{port}/0", ["redis://:***@127.0.0.1", "refused"]),
        ("grpc://127.0.0.1:{port}", ["grpc://127.0.0.1", "check that it runs"]),
        ("mysql+nosuchdriver://ann:s3cret@127.0.0.1/x", ["mysql+nosuchdriver://ann:***@127.0.0.1/x"]),
        ("mysql+pymysql://ann:s3cret@127.0.0.1/x", ["needs the Python package pymysql: pip install pymysql"]),
        ("grpc://head-node", ["has no host and port: write grpc://HOST:PORT"]),
        ("mongodb://ann:s3cret@h/x", ["mongodb://ann:***@h/x", "postgresql://", "journal:FILE"]),
        ("postgres", ["'postgres' is of an unknown kind"]),
        ("journal:none/at/all.journal", ["none/at/all.journal", "No such file"]),
        ("sqlite:///none/at/all.db", ["sqlite:///none/at/all.db", "No such file"]),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_said(
    address: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "ANSWER_WITHIN", 1)
    with within(20):
        sentence = refusal(address.format(port=free_port()))
    assert all(part in sentence for part in said), sentence
    assert contents(tmp_path) == {}


@pytest.mark.integration
def test_a_wrong_password_is_not_waited_for(database: Postgres) -> None:
    with within(20):
        sentence = refusal(database.url().replace(PASSWORD, "s3cret"))
    assert "password authentication failed" in sentence


@pytest.mark.integration
def test_workers_that_open_a_new_database_at_once_make_its_tables_once(database: Postgres) -> None:
    address = database.fresh()
    together = threading.Barrier(WORKERS)

    def opens(number: int) -> int:
        together.wait(30)
        with opened(address) as storage:
            return len(storage.backend.get_all_studies())

    with ThreadPoolExecutor(WORKERS) as pool:
        assert list(pool.map(opens, range(WORKERS))) == [0] * WORKERS


def test_a_sqlite_file_serves_one_worker(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'study.db'}"
    with opened(address) as first:
        assert not first.shared
        assert "SQLite serves one at a time" in refusal(address)
    with opened(address):
        pass


def test_a_study_that_others_made_is_left_alone(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'study.db'}"
    theirs = RDBStorage(address)
    study = optuna.create_study(storage=theirs, study_name="theirs")
    study.optimize(lambda trial: trial.suggest_float("dropout", 0, 1), n_trials=2)
    theirs.engine.dispose()
    with pytest.raises(RequestError, match=r"was not made by mutransfer \(its 2 trials search dropout\): name another"):
        tune(
            experiment(), RunFolder(tmp_path / "run"), storage=address, name="theirs", executor=Planted(lambda job: 1.0)
        )
    with opened(address) as storage:
        left = optuna.load_study(study_name="theirs", storage=storage.backend)
        assert len(left.trials) == 2
        assert left.user_attrs == {}


class Flaky(InMemoryStorage):
    """Loses the connection at each call of ``name``, before or after it has done what was asked, as often as ``times``."""

    def __init__(self, name: str, times: int, after: bool) -> None:
        super().__init__()
        self.name, self.times, self.after = name, times, after

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name == "times" or name != super().__getattribute__("name") or not super().__getattribute__("times"):
            return found

        def lost(*arguments: Any, **named: Any) -> None:
            self.times -= 1
            if self.after:
                found(*arguments, **named)
            raise ConnectionResetError("the connection was lost")

        return lost


def patient(name: str, times: int, after: bool, longest: float = 60) -> tuple[RetryingStorage, optuna.Study]:
    flaky = Flaky("", 0, after)
    storage = RetryingStorage(lambda: flaky, "grpc://head:1", longest=longest)
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
    flaky.name, flaky.times = name, times
    return storage, study


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "name",
    ["set_trial_param", "set_trial_state_values", "set_trial_user_attr", "set_trial_intermediate_value", "get_all_trials"],
)  # fmt: skip
def test_what_is_asked_twice_is_done_once(name: str, after: bool, capsys: pytest.CaptureFixture[str]) -> None:
    _, study = patient(name, 2, after)
    for i in range(2):
        trial = study.ask()
        lr = trial.suggest_float("lr", 0, 1)
        trial.set_user_attr("note", i)
        trial.report(lr, 1)
        study.tell(trial, lr)
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert [trial.value for trial in trials] == [trial.params["lr"] for trial in trials]
    assert [trial.user_attrs["note"] for trial in trials] == [0, 1]
    said = capsys.readouterr().err
    assert (
        said.count("waiting for the storage grpc://head:1 (ConnectionResetError: the connection was lost), 0 of") == 1
    )
    assert "the storage answers again, after" in said


def test_a_trial_that_others_have_failed_is_not_taken_for_told(capsys: pytest.CaptureFixture[str]) -> None:
    storage, study = patient("set_trial_state_values", 1, after=False)
    trial = study.ask()
    InMemoryStorage.set_trial_state_values(storage.storage, trial_id(trial), TrialState.FAIL)  # type: ignore[arg-type]
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial_id(trial), TrialState.COMPLETE, [1.0])


def test_waiting_has_an_end_that_says_what_to_do() -> None:
    _, study = patient("get_all_trials", 10**6, after=False, longest=0.5)
    with (
        within(20),
        pytest.raises(RequestError, match=r"grpc://head:1 has not answered for 0 s .*run the same command"),
    ):
        study.get_trials()


def test_an_end_is_hurried_when_somebody_wants_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, study = patient("get_all_trials", 10**6, after=False)
    storage.hurry()
    with within(20), pytest.raises(RequestError):
        study.get_trials()


def test_a_mistake_is_not_waited_for() -> None:
    storage, _ = patient("", 0, after=False)
    with within(5), pytest.raises(KeyError):
        storage.get_trial(99)


@pytest.mark.integration
def test_a_proxy_that_is_restarted_within_a_trial_is_told_its_parameters(database: Postgres) -> None:
    """It answers that there is no such trial, until somebody has read the study."""
    with proxy(database.fresh()) as server, opened(server.url) as storage:
        study = optuna.create_study(storage=storage.backend, sampler=optuna.samplers.RandomSampler(seed=0))
        trial = study.ask()
        server.stop()
        server.start()
        lr = trial.suggest_float("lr", 0, 1)
        assert [each.params for each in study.get_trials()] == [{"lr": lr}]


@pytest.mark.integration
def test_which_errors_of_a_database_are_an_outage(database: Postgres) -> None:
    """Those of a real one: a table that is not there is no outage, a connection that is cut off is."""
    engine = sqlalchemy.create_engine(database.fresh().replace("postgresql://", "postgresql+psycopg://"))

    def asked(statement: str) -> Exception:
        with pytest.raises(Exception) as caught, engine.begin() as connection:  # noqa: PT011
            connection.exec_driver_sql(statement)
        return caught.value

    assert outage(asked("select * from no_such_table")) is None
    assert outage(asked("select pg_terminate_backend(pg_backend_pid())")) is not None
    wrapped = StorageInternalError("an exception is raised during the commit")
    wrapped.__cause__ = asked("select pg_terminate_backend(pg_backend_pid())")
    assert "terminating connection" in (outage(wrapped) or "")
    engine.dispose()


@pytest.mark.integration
def test_an_error_that_waiting_does_not_mend_is_a_sentence(database: Postgres, tmp_path: Path) -> None:
    address, total = database.fresh(), 4

    class Renaming(Planted):
        """Takes a table away after two trials, and gives it back in the end."""

        def events(self, session: Session) -> Events:
            done = 0
            for event in super().events(session):
                if isinstance(event, Done):
                    if done == 2:
                        renamed("trial_user_attributes", "gone")
                    done += 1
                yield event

    def renamed(before: str, after: str) -> None:
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"alter table {before} rename to {after}")

    folder, losses = RunFolder(tmp_path / "run"), Planted(lambda job: job.recipe.lr)
    with pytest.raises(RequestError) as caught:
        tune(experiment(trials=total), folder, storage=address, lease=1, executor=Renaming(losses.loss))
    sentence = str(caught.value)
    assert PASSWORD not in sentence
    assert 'relation "trial_user_attributes" does not exist' in sentence
    assert "finished trials are kept" in sentence
    renamed("gone", "trial_user_attributes")
    found = tune(experiment(trials=total), folder, storage=address, lease=1, executor=losses)
    assert sorted(found.trials["state"]) == ["COMPLETE"] * total + ["FAIL"]
