"""Places, tickets and retries: exact in every order in which workers can do their steps, and wherever one is killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.trial import TrialState, create_trial

from mutransfer.sweeps._optuna_internals import storage_of, trial_id
from mutransfer.sweeps.retry import RetryingStorage
from mutransfer.sweeps.storage import Journal
from mutransfer.sweeps.workers import OWNER, TrialQueue, valid_trials

SPACE = {"lr": FloatDistribution(0.01, 1.0, log=True)}
FIRST = {"lr": 0.5}


class Killed(BaseException):
    """As SIGKILL: nobody cleans up."""


class Steps(JournalStorage):
    """A storage that calls ``before`` ahead of each write to a trial."""

    def __init__(self, path: Path, before: Callable[[], None]) -> None:
        super().__init__(Journal(path))
        self.before = before

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith(("set_trial", "create_new_trial")):
            return found

        def step(*arguments: Any, **named: Any) -> Any:
            self.before()
            return found(*arguments, **named)

        return step


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    optuna.create_study(storage=JournalStorage(Journal(tmp_path / "j")), study_name="s")
    return tmp_path / "j"


def worker(path: Path, name: str, total: int = 6, before: Callable[[], None] = lambda: None) -> TrialQueue:
    storage = RetryingStorage(lambda: Steps(path, before), str(path))
    sampler = optuna.samplers.RandomSampler(seed=sum(name.encode()))
    study = optuna.load_study(storage=storage, study_name="s", sampler=sampler)
    return TrialQueue(study, SPACE, total, FIRST, name)


def tell(claims: TrialQueue, number: int) -> None:
    claims.study.tell(claims.begun.pop(number), 1.0)


def assert_exact(claims: TrialQueue, total: int) -> None:
    claims.withdraw()
    trials = claims.trials()
    finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    assert len(finished) == total
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    values = [trial.params["lr"] for trial in finished]
    assert len(set(values)) == total
    assert values.count(0.5) == 1
    lost = {trial.params["lr"] for trial in trials if trial.state is TrialState.FAIL and trial.params}
    assert lost <= set(values)


def all_running(claims: TrialQueue) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in claims.trials() if trial.state is TrialState.RUNNING]


def test_one_worker_begins_exactly_the_total_and_the_recipe_first(path: Path) -> None:
    one = worker(path, "one", total=3)
    begun = [one.next() for _ in range(3)]
    assert begun[0] is not None
    assert begun[0].params == FIRST
    assert one.next() is None
    for number in range(3):
        tell(one, number)
    assert one.next() is None
    assert_exact(one, 3)


def test_of_two_workers_who_make_the_last_trial_at_once_the_second_takes_its_own_back(path: Path) -> None:
    other = worker(path, "other", total=1)
    met = []

    def meanwhile() -> None:
        if not met:
            met.append("once")
            assert other.next() is not None

    one = worker(path, "one", total=1, before=meanwhile)
    assert one.next() is None  # it had seen a free place
    tell(other, 0)
    assert [trial.state for trial in one.trials()] == [TrialState.COMPLETE, TrialState.FAIL]
    assert_exact(one, 1)


def test_a_trial_buried_by_two_at_once_is_repeated_once(path: Path) -> None:
    dead = worker(path, "dead", total=1)
    dead.next()
    other = worker(path, "other", total=1)
    met = []

    def meanwhile() -> None:
        if not met:
            met.append("once")
            other.requeue(all_running(other))

    one = worker(path, "one", total=1, before=meanwhile)
    one.requeue(all_running(one))
    assert [trial.state.name for trial in one.trials()] == ["FAIL", "WAITING", "WAITING"]
    assert [trial.number for trial in valid_trials(one.trials())] == [1]
    again = one.next()
    assert again is not None
    assert (again.number, again.params) == (1, FIRST)
    assert other.next() is None
    tell(one, 1)
    assert_exact(one, 1)


def test_a_worker_that_was_alive_all_the_same_ends_with_its_trial_done_once(path: Path) -> None:
    slow, other = worker(path, "slow", total=1), worker(path, "other", total=1)
    slow.next()
    other.requeue(all_running(other))
    other.next()
    with pytest.raises((ValueError, optuna.exceptions.UpdateFinishedTrialError)):
        slow.study.tell(slow.begun[0], 1.0)
    tell(other, 1)
    assert_exact(other, 1)


def test_a_ticket_whose_trial_ended_well_is_void(path: Path) -> None:
    """Its maker was killed between making it and failing the trial, whose worker lives."""
    steps = iter(range(100))

    def killed() -> None:
        if next(steps) == 1:
            raise Killed

    owner = worker(path, "owner", total=1)
    owner.next()
    burier = worker(path, "burier", total=1, before=killed)
    with pytest.raises(Killed):
        burier.requeue(all_running(burier))
    assert [trial.state.name for trial in owner.trials()] == ["RUNNING", "WAITING"]
    assert worker(path, "third", total=1).next() is None
    tell(owner, 0)
    assert_exact(owner, 1)


def test_a_trial_that_a_worker_does_not_know_of_is_given_back(path: Path) -> None:
    """The answer to its making was lost with the connection, and it was made again."""
    one = worker(path, "one", total=3)
    one.study.add_trial(create_trial(state=TrialState.RUNNING, system_attrs={OWNER: "one"}))
    while (trial := one.next()) is not None:
        one.study.tell(one.begun.pop(trial.number), 1.0)
    assert_exact(one, 3)


def test_tickets_keep_the_sampler_s_notes_and_not_the_owner(path: Path) -> None:
    one = worker(path, "one", total=2)
    trial = one.next()
    assert trial is not None
    for key, value in {"mutransfer:point": 7, "completed_rung_0": 1.0}.items():
        storage_of(one.study).set_trial_system_attr(trial_id(trial), key, value)
    one.requeue_own()
    ticket = one.trials()[1]
    assert ticket.system_attrs == {"mutransfer:point": 7, "mutransfer:repeats": 0, "fixed_params": FIRST}


def test_parameters_that_a_person_put_into_the_queue_are_done(path: Path) -> None:
    one = worker(path, "one", total=2)
    one.study.enqueue_trial({"lr": 0.125})
    done = []
    while (trial := one.next()) is not None:
        done.append(trial.params["lr"])
        one.study.tell(one.begun.pop(trial.number), 1.0)
    assert done[0] == 0.125
    assert len(done) == 2


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_order_and_whoever_is_killed(seed: int, path: Path) -> None:
    """Four workers step in a random order, each step of a storage may be a worker's last, and anyone buries the dead."""
    rng = random.Random(seed)
    total, made, kills = 6, 0, 12
    alive: list[TrialQueue] = []
    dead: set[str] = set()

    def perhaps_killed() -> None:
        nonlocal kills
        if kills and rng.random() < 0.12:
            kills -= 1
            raise Killed

    for _ in range(2000):
        while len(alive) < 4:
            made += 1
            alive.append(worker(path, f"w{made}", total, perhaps_killed))
        one = rng.choice(alive)
        if one.finished() >= total:
            break
        try:
            if one.begun and rng.random() < 0.6:
                number = rng.choice(sorted(one.begun))
                one.study.tell(one.begun[number], float(number))
                del one.begun[number]
            elif rng.random() < 0.3:
                owner = "mutransfer:owner"
                one.requeue([t for t in all_running(one) if t.system_attrs.get(owner) in dead | {None}])
            else:
                one.next()
        except Killed:
            dead.add(one.owner)
            alive.remove(one)
        assert one.finished() <= total
    last = worker(path, "last", total)
    last.requeue(all_running(last))
    assert_exact(last, total)
