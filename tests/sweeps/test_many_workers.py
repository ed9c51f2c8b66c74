"""One study and many worker processes: exactly as many trials as asked for, whoever is killed and whatever is restarted."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mutransfer.schemas import TRIALS
from mutransfer.sweeps.storage import opened

from ..helpers.servers import PASSWORD, Postgres, Proxy, Redis, postgres, proxy, redis, wait_for
from ..helpers.small import SMALL
from ..helpers.workers import Worker, Workers, workers

WORKERS = 4
LEASE = "6"
# After its first trials a worker waits in the next until the test opens the gate: whatever befalls it then finds it at work.
GATED = """
import time
from pathlib import Path

begun = 0

def train(recipe, plan, seed, report):
    global begun
    begun += 1
    end = time.monotonic() + 240
    while begun > FREE and not Path("open").exists() and time.monotonic() < end:
        time.sleep(0.02)
    loss = 1 + abs(recipe.lr - 0.01)
    for step in range(1, report.steps + 1):
        report(step, loss)
    return loss
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[Workers]:
    with workers() as made:
        yield made


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


class Shop:
    """A workplace of workers that share one storage."""

    def __init__(
        self, path: Path, forked: Workers, storage: str, total: int, steps: int = 200, free: int | None = None
    ) -> None:
        """``free`` trials of each worker pass the gate while it is shut; all, and with the built-in loop, if it is None."""
        self.path, self.storage, self.total, self.free, self._forked = path, storage, total, free, forked
        # TPE tells trials apart by their parameters; workers that ask a Gaussian process at once may both take a range's end.
        experiment: dict[str, Any] = {**SMALL, "steps": steps, "sampler": "tpe", "pruner": "median"}
        if free is not None:
            (path / "gated.py").write_text(GATED.replace("FREE", str(free)))
            experiment["trainer"] = "gated.py:train"
        (path / "experiment.yaml").write_text(yaml.safe_dump(experiment))

    def start(self, name: str, out: str | None = None) -> Worker:
        arguments = ("tune", "experiment.yaml", "--storage", self.storage, "--study", "shared", "--lease", LEASE)
        total = ("--trials", str(self.total), "--out", out or name, "--json")
        return self._forked.start(name, *arguments, *total, cwd=self.path)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        with opened(self.storage) as storage:
            try:
                return optuna.load_study(study_name="shared", storage=storage.backend).get_trials(deepcopy=False)
            except KeyError:
                return []

    def finished(self) -> int:
        return sum(trial.state.is_finished() and trial.state.name != "FAIL" for trial in self.trials())

    def running(self, worker: Worker) -> list[int]:
        """Numbers of the trials that ``worker`` has begun and not finished."""
        return [trial.number for trial in self.begun(worker) if trial.state.name == "RUNNING"]

    def begun(self, worker: Worker) -> list[optuna.trial.FrozenTrial]:
        """The trials that ``worker`` has begun."""
        return [t for t in self.trials() if f"-{worker.pid}-" in t.system_attrs.get("mutransfer:owner", "")]

    def come_halfway(self, workers: list[Worker]) -> None:
        """Wait until a third is finished, or with a gate, until every worker stands before it."""
        wait_for(lambda: all(self.begun(worker) for worker in workers), "a worker has begun no trial", 240)
        some = self.total // 3 if self.free is None else self.free * len(workers)
        wait_for(lambda: self.finished() >= some, "too few trials", 240)
        if self.free is not None:
            wait_for(lambda: all(self.running(worker) for worker in workers), "a worker is not at work", 240)

    def open(self) -> None:
        (self.path / "open").touch()

    def wait(self, worker: Worker) -> int:
        return self._forked.wait(worker)


def assert_exact(shop: Shop, done: list[Worker]) -> list[optuna.trial.FrozenTrial]:
    """All workers agree on a study of exactly the total, in which nothing was done twice and nothing lost."""
    trials = shop.trials()
    finished = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(finished) == shop.total
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED", "FAIL"}
    tried = [tuple(trial.params.items()) for trial in finished]
    assert len(set(tried)) == len(tried)
    # What a dead worker had begun was done again, by its parameters.
    lost = {tuple(trial.params.items()) for trial in trials if trial.state.name == "FAIL" and "lr" in trial.params}
    assert lost <= set(tried)
    # The recipe to beat was tried, once.
    assert [trial.params["lr"] for trial in finished].count(2**-6) == 1
    for worker in done:
        said = worker.json
        assert said["finished"] == shop.total, worker.err
        assert said["best"]["value"] == min(t.value for t in finished if t.state.name == "COMPLETE" and t.value)
        table = TRIALS.read(shop.path / said["run"] / "trials.csv")
        assert table["state"].tolist() == [trial.state.name for trial in trials]
    return trials


def journal(path: Path) -> str:
    return f"journal:{path / 'shared.journal'}"


def killed_halfway(shop: Shop) -> None:
    """Four workers, of which one is killed in a trial: the others finish its trial as well."""
    begun = [shop.start(f"worker{i}") for i in range(WORKERS)]
    shop.come_halfway(begun)
    lost: list[int] = []
    while not lost:  # rarely, and not before a gate, one dies between two trials
        victim = begun.pop(0)
        victim.kill()
        assert shop.wait(victim) == -signal.SIGKILL
        lost = shop.running(victim)
    shop.open()
    for worker in begun:
        assert shop.wait(worker) == 0, worker.err
    trials = assert_exact(shop, begun)
    assert {trials[number].state.name for number in lost} == {"FAIL"}
    # One who comes late finds it done.
    late = shop.start("late")
    assert shop.wait(late) == 0, late.err
    assert len(assert_exact(shop, [late])) == len(trials)


def restarted_halfway(shop: Shop, server: Postgres | Proxy | Redis, away: float) -> None:
    """The server is gone for a while, as after a crash; workers say that they wait, and go on."""
    begun = [shop.start(f"worker{i}") for i in range(WORKERS)]
    shop.come_halfway(begun)
    server.stop()
    shop.open()
    time.sleep(away)
    # Whoever was in a trial comes to its end first, on a busy machine later.
    wait_for(lambda: all("waiting for the storage" in worker.err for worker in begun), "a worker does not wait", 60)
    server.start()
    for worker in begun:
        assert shop.wait(worker) == 0, worker.err
        assert PASSWORD not in worker.err
    assert_exact(shop, begun)
    assert all("the storage answers again, after" in worker.err for worker in begun)


@pytest.mark.extended
def test_four_workers_on_a_journal_of_whom_one_is_killed(tmp_path: Path, forked: Workers) -> None:
    killed_halfway(Shop(tmp_path, forked, journal(tmp_path), total=24, free=2))


@pytest.mark.integration
def test_four_workers_on_postgresql_of_whom_one_is_killed(tmp_path: Path, forked: Workers, database: Postgres) -> None:
    killed_halfway(Shop(tmp_path, forked, database.fresh(), total=24, free=2))


@pytest.mark.integration
def test_postgresql_is_restarted_halfway(tmp_path: Path, forked: Workers, database: Postgres) -> None:
    restarted_halfway(Shop(tmp_path, forked, database.fresh(), total=16, free=2), database, away=3)


@pytest.mark.integration
def test_a_proxy_is_restarted_halfway(tmp_path: Path, forked: Workers, database: Postgres) -> None:
    with proxy(database.fresh()) as server:
        restarted_halfway(Shop(tmp_path, forked, server.url, total=16, free=2), server, away=3)


@pytest.mark.integration
def test_redis_is_restarted_halfway(tmp_path: Path, forked: Workers) -> None:
    (tmp_path / "redis").mkdir()
    with redis(tmp_path / "redis") as server:
        restarted_halfway(Shop(tmp_path, forked, server.url, total=16, free=2), server, away=3)


@pytest.mark.extended
def test_a_worker_that_was_only_stopped_finds_its_trial_done_by_others(tmp_path: Path, forked: Workers) -> None:
    shop = Shop(tmp_path, forked, journal(tmp_path), total=4, free=0)
    stopped = shop.start("stopped")
    shop.come_halfway([stopped])
    time.sleep(0.3)  # in the trial, and not in a write, whose lock it would keep
    stopped.kill(signal.SIGSTOP)
    (lost,) = shop.running(stopped)
    shop.open()
    other = shop.start("other")
    assert shop.wait(other) == 0, other.err
    stopped.kill(signal.SIGCONT)
    assert shop.wait(stopped) == 0, stopped.err
    trials = assert_exact(shop, [other, stopped])
    assert trials[lost].state.name == "FAIL"
    assert f"trial {lost} is retried by another worker" in stopped.err


@pytest.mark.extended
def test_a_worker_that_is_told_to_end_gives_its_trial_back_at_once(tmp_path: Path, forked: Workers) -> None:
    """As a cluster does before it takes a machine back."""
    shop = Shop(tmp_path, forked, journal(tmp_path), total=2, free=0)
    ended = shop.start("ended")
    shop.come_halfway([ended])
    time.sleep(0.3)
    ended.kill(signal.SIGTERM)
    assert shop.wait(ended) == 130
    assert ended.err.splitlines()[-1] == "mutransfer: interrupted; run the same command again to continue."
    assert [trial.state.name for trial in shop.trials()] == ["FAIL", "WAITING"]
    shop.open()
    again = shop.start("again")
    assert shop.wait(again) == 0
    assert_exact(shop, [again])


@pytest.mark.extended
def test_the_very_same_command_on_every_machine(tmp_path: Path, forked: Workers) -> None:
    """One run folder for all, as on a cluster's shared disk: its files are the whole study's in the end."""
    shop = Shop(tmp_path, forked, journal(tmp_path), total=12, steps=100)
    begun = [shop.start(f"worker{i}", out="same") for i in range(WORKERS)]
    for worker in begun:
        assert shop.wait(worker) == 0, worker.err
    assert_exact(shop, begun)
    assert {path.name for path in (tmp_path / "same").iterdir()} == {
        "experiment.yaml", "trials.csv", "best.json", "environment.json",
    }  # fmt: skip


@pytest.mark.slow
def test_two_hundred_trials_on_a_journal(tmp_path: Path, forked: Workers) -> None:
    killed_halfway(Shop(tmp_path, forked, journal(tmp_path), total=200))


@pytest.mark.slow
def test_two_hundred_trials_on_postgresql(tmp_path: Path, forked: Workers, database: Postgres) -> None:
    killed_halfway(Shop(tmp_path, forked, database.fresh(), total=200))


@pytest.mark.slow
def test_two_hundred_trials_on_a_postgresql_that_is_restarted(
    tmp_path: Path, forked: Workers, database: Postgres
) -> None:
    restarted_halfway(Shop(tmp_path, forked, database.fresh(), total=200), database, away=10)


@pytest.mark.slow
def test_two_hundred_trials_on_a_proxy_that_is_restarted(tmp_path: Path, forked: Workers, database: Postgres) -> None:
    with proxy(database.fresh()) as server:
        restarted_halfway(Shop(tmp_path, forked, server.url, total=200), server, away=10)
