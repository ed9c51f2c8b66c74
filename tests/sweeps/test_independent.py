"""Independent search finds what a separable loss has, waits where it must, and does a failed point again."""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from mutransfer.sweeps.independent import Independent

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
    assert {(p["init_scale"], p["schedule"]) for p in points[1:9]} == {(1.0, "constant")}
    assert points[1]["lr"] == 2**-10
    assert len({p["lr"] for p in points[9:]}) == 1  # the best of the line, or the recipe's own
    assert found.best_trial.number == 21
    assert found.best_value < 0.3
    assert points[-1]["schedule"] == "linear"


def test_the_last_point_is_the_best_value_of_each_line() -> None:
    found = study()
    go(found, 22)
    lines = found.trials[1:21]
    best = min(lines[8:14], key=lambda trial: trial.value or 0.0)
    assert found.trials[-1].params["init_scale"] == best.params["init_scale"]


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


def test_a_failed_point_is_free_again() -> None:
    found = study()
    go(found, 3)
    lost = found.ask(fixed_distributions=SPACE)
    found.tell(lost, state=TrialState.FAIL)
    assert found.ask(fixed_distributions=SPACE).params == lost.params


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
