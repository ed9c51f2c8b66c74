"""Tuning: exact totals, divergence that is told and kept, samplers and pruners."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest

from mutransfer.recipe import Scale
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.jobs import Job, RunContext, SequentialExecutor, run_jobs
from mutransfer.sweeps.results import best_so_far
from mutransfer.sweeps.tune import tune

from ..helpers.small import Counting, Planted, each, experiment, journal, within
from ..helpers.tuned import assert_agrees, bowl, refusal, states

# From lr 4 on everything overflows or ends above its start; at the recipe's own 2^-6 it learns.
WILD = {"lr": {"low": 2**-9, "high": 2.0**40, "log": True}}


def test_a_total_is_a_total(folder: RunFolder) -> None:
    counting, seen = Counting(), []
    found = tune(experiment(), folder, executor=counting, progress=lambda *at: seen.append(at[:2]))
    assert [job.key for job in counting.jobs] == [0, 1, 2, 3]
    assert states(folder) == ["COMPLETE"] * 4
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert_agrees(found, folder)

    before = folder.trials.read_bytes()
    again = tune(experiment(), folder, executor=(idle := Counting()))
    assert idle.jobs == []
    assert folder.trials.read_bytes() == before
    assert (again.best, again.value, again.default) == (found.best, found.value, found.default)

    more = tune(experiment(trials=6), folder, executor=(adding := Counting()))
    assert [job.key for job in adding.jobs] == [4, 5]
    assert more.trials["value"].tolist()[:4] == found.trials["value"].tolist()
    assert more.value <= found.value
    assert_agrees(more, folder)


def test_fewer_than_there_are_adds_nothing_and_ends(folder: RunFolder) -> None:
    tune(experiment(), folder, executor=Planted(bowl))
    with within(20):
        found = tune(experiment(trials=2), folder, executor=(idle := Counting(Planted(bowl))))
    assert idle.jobs == []
    assert len(found.trials) == 4


def test_the_first_trial_is_the_recipe_to_beat(folder: RunFolder) -> None:
    given = experiment(
        recipe={"lr": 2**-6, "warmup": 0.0, "betas": [0.8, 0.99], "schedule": "linear"},
        search={
            "lr": {"low": 2**-9, "high": 2**-3, "log": True},
            "beta2": {"low": 0.9, "high": 0.999},
            "schedule": {"choices": ["cosine", "linear"]},
        },
    )
    found = tune(given, folder, executor=(counting := Counting(Planted(bowl))))
    assert counting.jobs[0].recipe == given.recipe
    assert counting.jobs[0].scale == Scale(8, 2)
    assert found.default == pytest.approx(1.1)
    assert set(found.params) == {"lr", "beta2", "schedule"}
    assert found.best.betas == (0.8, found.params["beta2"])


def test_a_recipe_outside_the_ranges_is_not_tried(folder: RunFolder) -> None:
    given = experiment(recipe={"lr": 2**-12})
    found = tune(given, folder, executor=(counting := Counting(Planted(bowl))))
    assert found.default is None
    assert all(job.recipe.lr >= 2**-9 for job in counting.jobs)


def test_divergence_is_told_kept_and_never_chosen(folder: RunFolder) -> None:
    found = tune(experiment(search=WILD, sampler="random", trials=8), folder)
    diverged = found.trials[found.trials["diverged"]]
    assert 1 <= len(diverged) < 8
    assert (diverged["state"] == "COMPLETE").all()
    assert (diverged["lr"] > 2**-6).all()
    told = {trial.number: trial.value for trial in journal(folder).trials}
    outcomes = {trial.number: trial.user_attrs["outcome"] for trial in journal(folder).trials}
    for number in diverged["number"]:
        assert told[number] == 2 * outcomes[number]["start"]
        assert told[number] > max(value for other, value in told.items() if not outcomes[other]["diverged"])
    assert found.best.lr < 4
    assert found.value < 2.4
    # A loss that is not finite stays missing, rather than being told as the penalty.
    overflowed = found.trials[found.trials["lr"] > 2**30]
    assert len(overflowed)
    assert (overflowed["value"].isna() | (overflowed["value"] > 100)).all()
    assert_agrees(found, folder)


def test_a_loss_that_is_no_number_is_missing_in_the_table(folder: RunFolder) -> None:
    found = tune(experiment(), folder, executor=Planted(lambda job: math.nan if job.key == 1 else bowl(job)))
    assert found.trials["value"].isna().tolist() == [False, True, False, False]
    assert found.trials["diverged"].tolist() == [False, True, False, False]
    assert journal(folder).trials[1].value == 20  # twice the start


def test_a_recipe_below_its_start_only_by_diverging_is_no_best(folder: RunFolder) -> None:
    """Above its start, though finite: told as the penalty, not as its own loss."""
    found = tune(experiment(), folder, executor=Planted(lambda job: 11.0 if job.key == 0 else 9.0))
    assert found.trials["diverged"].tolist() == [True, False, False, False]
    assert found.value == 9.0
    assert found.default == 11.0


def test_all_diverged_is_said(folder: RunFolder) -> None:
    sentence = refusal(experiment(), folder, executor=Planted(lambda job: math.inf))
    assert "all 4 trials diverged" in sentence
    assert "lower search.lr" in sentence
    assert TRIALS.read(folder.trials)["diverged"].all()
    assert not folder.best.exists()


@pytest.mark.parametrize("sampler", ["auto", "tpe", "random", "gp", "qmc"])
def test_resuming_does_not_repeat_the_first_draws(sampler: str, folder: RunFolder) -> None:
    values = []
    for total in (3, 6, 10):
        found = tune(experiment(sampler=sampler, trials=total), folder, executor=Planted(bowl))
        values = found.trials["lr"].tolist()
    assert len({round(math.log2(value), 6) for value in values}) == 10


def test_the_same_seed_gives_the_same_trials(tmp_path: Path) -> None:
    def draws(name: str, seed: int) -> list[float]:
        found = tune(experiment(sampler="random", seed=seed), RunFolder(tmp_path / name), executor=Planted(bowl))
        return found.trials["lr"].tolist()

    assert draws("one", 0) == draws("two", 0)
    assert draws("one", 0) != draws("three", 1)


@pytest.mark.parametrize("pruner", ["half", "median", "halving"])
def test_hopeless_trials_are_pruned_and_count_as_finished(pruner: str, folder: RunFolder) -> None:
    """Each trial is worse than all before it."""
    planted = Planted(lambda job: 1 + job.key / 10)
    found = tune(experiment(pruner=pruner, trials=9), folder, executor=planted)
    pruned = found.trials[found.trials["state"] == "PRUNED"]
    assert len(found.trials) == 9
    assert len(pruned) >= 3
    assert (pruned["steps"] < 8).all()
    assert (pruned["flops"] < found.trials["flops"].max()).all()
    assert found.value == 1.0
    again = tune(experiment(pruner=pruner, trials=9), folder, executor=(idle := Counting(planted)))
    assert idle.jobs == []
    assert len(again.trials) == 9


def test_without_a_pruner_every_trial_runs_to_its_end(folder: RunFolder) -> None:
    found = tune(experiment(trials=9), folder, executor=Planted(lambda job: 1 + job.key / 10))
    assert found.trials["state"].tolist() == ["COMPLETE"] * 9


def test_a_real_run_stops_at_the_rung_where_it_is_told_to() -> None:
    heard: list[tuple[int, float]] = []

    def stop_at_the_second(job: Job, step: int, loss: float) -> bool:
        heard.append((step, loss))
        return len(heard) == 2

    given = experiment()
    job = Job(0, given.proxy_scale, "mup", given.recipe, 0, rungs=(3, 5, 7))
    ((_, outcome),) = run_jobs(SequentialExecutor(), RunContext(given), [job], each(stop_at_the_second))
    assert [step for step, _ in heard] == [3, 5]
    assert outcome.stopped
    assert (outcome.steps, outcome.loss) == heard[1]
    assert not outcome.diverged


@pytest.mark.parametrize("diverged", [True, False])
def test_a_penalty_is_not_shown_as_the_best_loss(diverged: bool) -> None:
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=100.0, user_attrs={"outcome": {"diverged": diverged}}))
    assert best_so_far(study) == ("" if diverged else "best loss 100.0000")
