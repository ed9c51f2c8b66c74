"""Independent search finds what a separable loss has, waits where it must, and does a failed point again."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from mutransfer.sweeps.samplers import Independent
from mutransfer.sweeps.workers import TrialQueue

SPACE: dict[str, BaseDistribution] = {
    "init_scale": FloatDistribution(0.25, 4, log=True),
    "lr": FloatDistribution(2**-10, 2**-2, log=True),
    "schedule": CategoricalDistribution(("constant", "linear", "cosine")),
}
DEFAULTS = {"init_scale": 1.0, "lr": 2**-4, "schedule": "constant"}


def study(trials: int = 22) -> optuna.Study:
    return optuna.create_study(sampler=Independent(SPACE, DEFAULTS, trials))


def loss(params: dict[str, float]) -> float:
    return (
        (math.log2(params["lr"]) + 7) ** 2
        + (math.log2(params["init_scale"]) - 1) ** 2
        + (0.0 if params["schedule"] == "linear" else 0.5)
    )


def go(found: optuna.Study, trials: int) -> None:
    for _ in range(trials):
        trial = found.ask(fixed_distributions=SPACE)
        found.tell(trial, loss(trial.params))


def test_lines_then_the_best_of_each() -> None:
    found = study()
    go(found, 22)
    points = [trial.params for trial in found.trials]
    assert points[0] == DEFAULTS
    lines = points[1:10], points[10:18], points[18:21]  # a choice is tried once, the learning rate gets what is left
    assert {(p["init_scale"], p["schedule"]) for p in lines[0]} == {(1.0, "constant")}
    assert (lines[0][0]["lr"], lines[0][-1]["lr"]) == (2**-10, 2**-2)
    assert {p["schedule"] for p in lines[1]} == {"constant"}
    assert {p["schedule"] for p in lines[2]} == {"constant", "linear", "cosine"}
    assert {p["init_scale"] for p in lines[2]} == {1.0}
    assert len({p["lr"] for p in points[10:]}) == 1  # the best of the line, or the recipe's own
    best = min(found.trials[10:18], key=lambda trial: trial.value or 0.0)
    assert points[-1]["init_scale"] == best.params["init_scale"]
    assert points[-1]["schedule"] == "linear"
    assert found.best_trial.number == 21
    assert found.best_value < 0.3


def test_a_line_waits_for_the_learning_rate() -> None:
    found = study()
    sampler = found.sampler
    assert isinstance(sampler, Independent)
    begun = []
    while not sampler.waits(found):
        begun.append(found.ask(fixed_distributions=SPACE))
    assert len(begun) == 1  # the recipe itself comes before the line, but nothing of the line depends on it
    found.tell(begun[0], loss(begun[0].params))
    while not sampler.waits(found):
        begun.append(found.ask(fixed_distributions=SPACE))
    assert {trial.params["init_scale"] for trial in begun} == {1.0}


def test_workers_that_die_and_begin_together_do_every_point_once() -> None:
    alone, shared = study(), study()
    go(alone, 22)
    sampler = shared.sampler
    assert isinstance(sampler, Independent)
    workers = [TrialQueue(shared, SPACE, 22, DEFAULTS, name, waits=sampler.waits) for name in "abc"]
    turn = 0
    while workers[0].finished() < 22:
        turn += 1
        worker = workers[turn % 3]
        if worker.next() is not None and turn % 2:
            continue  # begins another before it ends this one
        if turn % 7 == 0:
            worker.requeue_own()
        for number, trial in list(worker.begun.items()):
            shared.tell(trial, loss(trial.params))
            del worker.begun[number]

    def points(found: optuna.Study) -> list[tuple[Any, ...]]:
        complete = found.get_trials(states=(TrialState.COMPLETE,))
        return sorted(tuple(trial.params[name] for name in sorted(SPACE)) for trial in complete)

    assert sum(trial.state is TrialState.FAIL for trial in shared.trials) >= 3
    assert points(shared) == points(alone)


def test_more_trials_than_were_laid_out_fill_the_lines_through_the_best() -> None:
    found = study()
    go(found, 22)
    best = found.best_params
    go(found, 9)
    more = found.trials[22:]
    assert len({tuple(trial.params.items()) for trial in found.trials}) >= 31 - 4
    assert [len(trial.params.items() - best.items()) <= 1 for trial in more[:3]] == [True] * 3
    assert more[0].params["lr"] == pytest.approx(2**-6)  # the middle of its line


def test_the_recipe_may_be_given_and_outside_of_the_ranges() -> None:
    found = study()
    found.enqueue_trial(DEFAULTS)
    go(found, 2)
    assert found.trials[1].params["lr"] == 2**-10
    outside = optuna.create_study(sampler=Independent(SPACE, DEFAULTS | {"lr": 1.0, "schedule": "none"}, 22))
    go(outside, 1)
    assert outside.trials[0].params == {"init_scale": 1.0, "lr": pytest.approx(2**-6), "schedule": "linear"}


@pytest.mark.parametrize("trials", [1, 3, 5, 40])
def test_any_number_of_trials(trials: int) -> None:
    found = study(trials)
    go(found, trials + 3)
    assert len(found.trials) == trials + 3
