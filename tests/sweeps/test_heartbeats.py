"""Who is dead and who is not: by the clock of the one who looks, and only while it could look."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState, create_trial

from mutransfer.sweeps import workers
from mutransfer.sweeps._optuna_internals import storage_of, study_id
from mutransfer.sweeps.storage import Journal
from mutransfer.sweeps.workers import OWNER, Heartbeats, worker_name

LEASE = 60.0


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(workers, "time", made)
    return made


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(storage=JournalStorage(Journal(tmp_path / "j")))


def begun(study: optuna.Study, owner: str | None) -> None:
    attributes = {OWNER: owner} if owner else {}
    study.add_trial(create_trial(state=TrialState.RUNNING, system_attrs=attributes))


def watched(one: Heartbeats, clock: Clock, seconds: float, other: Heartbeats | None = None) -> list[int]:
    """Look every ten seconds for ``seconds``, in which ``other`` shows that it lives; return who is dead then."""
    for _ in range(round(seconds / 10)):
        clock.now += 10
        if other is not None:
            other.beat()
        one.watch()
    return [trial.number for trial in one.lapsed()]


def test_silence_as_long_as_a_lease_is_death_and_a_sign_is_life(study: optuna.Study, clock: Clock) -> None:
    me, other = Heartbeats(study, "me", LEASE), Heartbeats(study, "other", LEASE)
    other.beat()
    begun(study, "other")
    assert watched(me, clock, 600, other) == []
    assert watched(me, clock, 60) == []
    assert watched(me, clock, 10) == [0]
    assert watched(me, clock, 10, other) == []  # it was only slow


def test_one_s_own_trials_are_never_dead(study: optuna.Study, clock: Clock) -> None:
    begun(study, "me")
    assert watched(Heartbeats(study, "me", LEASE), clock, 600) == []


def test_a_trial_taken_from_the_queue_and_never_signed_is_dead(study: optuna.Study, clock: Clock) -> None:
    begun(study, None)
    me = Heartbeats(study, "me", LEASE)
    assert watched(me, clock, 60) == []
    assert watched(me, clock, 20) == [0]


def test_time_in_which_nothing_was_seen_does_not_count(study: optuna.Study, clock: Clock) -> None:
    """The server was away for an hour: the others could show no sign either."""
    me, other = Heartbeats(study, "me", LEASE), Heartbeats(study, "other", LEASE)
    other.beat()
    begun(study, "other")
    assert watched(me, clock, 50) == []
    clock.now += 3600
    assert watched(me, clock, 60) == []
    assert watched(me, clock, 20) == [0]


def test_a_lease_is_the_owner_s(study: optuna.Study, clock: Clock) -> None:
    me, quick = Heartbeats(study, "me", LEASE), Heartbeats(study, "quick", 20.0)
    quick.beat()
    begun(study, "quick")
    assert watched(me, clock, 20) == []
    assert watched(me, clock, 20) == [0]


def test_a_thread_shows_signs_and_looks_while_its_worker_trains(study: optuna.Study) -> None:
    begun(study, "dead")
    with Heartbeats(study, "me", 0.3) as me:
        time.sleep(1.0)
        assert [trial.number for trial in me.lapsed()] == [0]
        count, lease = storage_of(study).get_study_system_attrs(study_id(study))["mutransfer:sign:me"]
    assert count >= 3
    assert lease == 0.3
    assert "mutransfer-lease" not in [thread.name for thread in threading.enumerate()]


def test_no_two_workers_have_one_name() -> None:
    assert len({worker_name() for _ in range(1000)}) == 1000
