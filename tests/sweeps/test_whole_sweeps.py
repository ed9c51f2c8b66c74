"""How far a sweep goes: budgets, repeats with other seeds, halving and independent search, in whole sweeps."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mutransfer.errors import RequestError
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import REPEATS, TRIALS
from mutransfer.sweeps.jobs import Job
from mutransfer.sweeps.processes import ProcessExecutor
from mutransfer.sweeps.results import CLAIM
from mutransfer.sweeps.tune import Tuned, tune

from ..helpers.small import Counting, Failing, Planted, experiment


def bowl(job: Job) -> float:
    """The seed moves the loss by more than neighbouring learning rates differ."""
    return 1 + (math.log2(job.recipe.lr) + 5) ** 2 / 10 + 0.3 * math.sin(1e3 * job.recipe.lr * (1 + job.seed))


def test_a_budget_of_flops_ends_the_sweep_below_it_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    one = tune(experiment(trials=1), RunFolder(tmp_path / "one"), executor=Planted(bowl)).trials["flops"].sum()
    found = tune(experiment(trials=50, budget={"flops": 5.5 * one}), folder, executor=Planted(bowl))
    assert found.trials["flops"].sum() == pytest.approx(5 * one)
    more = tune(experiment(trials=50, budget={"flops": 7 * one}), folder, executor=Planted(bowl))
    assert len(more.trials) == 7
    assert more.trials.head(5).equals(found.trials)


def test_a_budget_of_seconds_counts_the_trials_own(tmp_path: Path) -> None:
    found = tune(experiment(trials=50, budget={"seconds": 0.055}), RunFolder(tmp_path / "run"), executor=Planted(bowl))
    assert len(found.trials) == 5  # of 0.01 s each


def test_a_budget_for_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the budget does not allow a single trial: raise it, or lower steps"):
        tune(experiment(budget={"flops": 1.0}), RunFolder(tmp_path / "run"), executor=Planted(bowl))


def test_the_best_few_are_repeated_and_the_best_mean_wins(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    given = experiment(trials=12, repeats={"top": 3, "seeds": 4}, seed=5)
    found = tune(given, folder, executor=(executor := Counting(Planted(bowl))))
    again = REPEATS.read(folder.repeats)
    top = found.trials.nsmallest(3, "value")
    assert sorted(again["number"].unique()) == sorted(top["number"])
    assert sorted(again["seed"].unique()) == [6, 7, 8]
    assert len(executor.jobs) == 12 + 9
    means = {
        number: (top.set_index("number")["value"][number] + again[again["number"] == number]["loss"].sum()) / 4
        for number in top["number"]
    }
    assert found.value == pytest.approx(min(means.values()))
    assert found.params["lr"] == top.set_index("number")["lr"][min(means, key=means.__getitem__)]
    assert found.value != top["value"].min()  # the luckiest is not the best here


def test_interrupted_repeats_go_on_and_are_done_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    given = experiment(trials=6, repeats={"top": 2, "seeds": 3})
    with pytest.raises(KeyboardInterrupt):
        tune(given, folder, executor=Failing(8, KeyboardInterrupt(), Planted(bowl)))
    assert len(REPEATS.read(folder.repeats)) == 2
    found = tune(given, folder, executor=(executor := Counting(Planted(bowl))))
    assert len(executor.jobs) == 2
    assert tune(given, folder, executor=(idle := Counting(Planted(bowl)))).value == found.value
    assert idle.jobs == []


def test_a_winner_that_diverges_with_another_seed_does_not_win(tmp_path: Path) -> None:
    first = tune(experiment(trials=6), RunFolder(tmp_path / "first"), executor=Planted(bowl))
    winner = first.trials["value"].idxmin()
    found = tune(
        experiment(trials=6, repeats={"top": 2, "seeds": 2}),
        folder := RunFolder(tmp_path / "run"),
        executor=Planted(lambda job: math.nan if job.key == (winner, 1) else bowl(job)),
    )
    assert REPEATS.read(folder.repeats)["diverged"].sum() == 1
    assert found.params != first.params


def test_workers_share_the_repeats_and_agree(tmp_path: Path) -> None:
    given = experiment(trials=8, repeats={"top": 4, "seeds": 4})
    both = Barrier(2)

    def worker() -> Counting:
        met = []

        def loss(job: Job) -> float:
            if isinstance(job.key, tuple) and not met:  # nobody repeats all before the other has begun
                met.append(both.wait(timeout=60))
            return bowl(job)

        return Counting(Planted(loss))

    workers = [worker() for _ in range(2)]

    def work(number: int) -> Tuned:
        folder = RunFolder(tmp_path / f"run{number}")
        return tune(given, folder, storage=f"journal:{tmp_path / 'shared'}", executor=workers[number])

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert (first.value, first.params) == (second.value, second.params)
    assert REPEATS.read(tmp_path / "run0" / "repeats.csv").equals(REPEATS.read(tmp_path / "run1" / "repeats.csv"))
    repeats = [[job.key for job in worker.jobs if isinstance(job.key, tuple)] for worker in workers]
    assert all(repeats)
    done = [key for each in repeats for key in each]
    assert len(set(done)) == 12
    assert len(done) <= 14  # two that claim at the same moment both do a run


def test_repeats_of_a_dead_worker_are_taken_over(tmp_path: Path) -> None:
    given, storage = experiment(trials=4, repeats={"top": 1, "seeds": 2}), f"journal:{tmp_path / 'shared'}"
    once = tune(
        given.model_copy(update={"repeats": None}), RunFolder(tmp_path / "a"), storage=storage, executor=Planted(bowl)
    )
    study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(tmp_path / "shared"))))
    study.set_user_attr(f"{CLAIM}{once.trials['value'].idxmin()}:1", "gone")
    begun = time.monotonic()
    tune(given, RunFolder(tmp_path / "b"), storage=storage, lease=1.0, executor=(executor := Counting(Planted(bowl))))
    assert len(executor.jobs) == 1
    assert time.monotonic() - begun > 1.0


def test_repeats_are_of_the_study_not_of_the_folder(tmp_path: Path) -> None:
    given, folder = experiment(trials=4, repeats={"top": 2, "seeds": 2}), RunFolder(tmp_path / "run")
    first = tune(given, folder, executor=Planted(bowl))
    executor = Counting(Planted(lambda job: bowl(job) + 1))
    found = tune(given, folder, storage=f"journal:{tmp_path / 'other'}", executor=executor)
    assert len(executor.jobs) == 6
    assert found.value > first.value + 0.5


@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
def test_halving_saves_most_of_the_steps(tmp_path: Path, pruner: str) -> None:
    given = experiment(trials=27, pruner=pruner, steps=90, rungs=2, sampler="random")
    found = tune(given, folder := RunFolder(tmp_path / "run"), executor=Planted(bowl))
    trials = TRIALS.read(folder.trials)
    assert set(trials[trials["state"] == "PRUNED"]["steps"]) <= {10, 30}
    assert trials["steps"].sum() < 27 * 90 * (0.6 if pruner == "halving" else 0.9)
    assert found.value == trials[trials["state"] == "COMPLETE"]["value"].min()


@pytest.mark.extended
def test_an_independent_search_of_a_real_model(tmp_path: Path) -> None:
    search = {"lr": {"low": 2**-9, "high": 2**-3, "log": True}, "init_scale": {"low": 0.25, "high": 4, "log": True}}
    given = experiment(trials=11, sampler="independent", search=search)
    with ProcessExecutor(2) as two:
        found = tune(given, RunFolder(tmp_path / "run"), executor=two)
    trials = found.trials.sort_values("number")
    assert trials["lr"].nunique() == len(trials["lr"][:6])  # the recipe's own, and the line's five
    assert set(trials["init_scale"][:6]) == {1.0}
    assert trials["lr"][6:].nunique() == 1
    assert found.value <= trials["value"][:5].min()
