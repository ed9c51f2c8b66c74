"""A budget is never exceeded, and what a sweep has cost is what its trials have."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutransfer.sweeps.budgets import Spent
from mutransfer.sweeps.experiment import Budget


def trial(**outcome: Any) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(value=1.0, user_attrs={"outcome": outcome} if outcome else {})


def test_told_trials_add_up() -> None:
    spent = Spent.of(
        [trial(flops=3.0, seconds=1.0), trial(flops=1.0, seconds=2.5), trial(flops=None, seconds=None), trial()]
    )
    assert spent == Spent(4.0, 3.5, 1.0)


@given(st.integers(1, 8), st.floats(1, 100), st.floats(1, 1000))
def test_flops_are_never_exceeded(capacity: int, each: float, budget: float) -> None:
    """A batch of ``capacity`` is kept full, and the oldest ends first."""
    spent, running = Spent(), 0
    while True:
        while running < capacity and spent.allows(Budget(flops=budget), running, each):
            running += 1
        if not running:
            break
        running -= 1
        spent = Spent(spent.flops + each, spent.seconds + 1, 1.0)
    assert spent.flops <= budget
    assert spent.flops + each > budget  # and none is left that would have fitted


def test_seconds_are_judged_by_the_usual_trial() -> None:
    budget = Budget(seconds=10)
    assert Spent().allows(budget, 0, 1.0)
    assert Spent().allows(budget, 5, 1.0)  # nothing is known of how long they take
    assert Spent(0, 6.0, 3.0).allows(budget, 0, 1.0)
    assert not Spent(0, 6.0, 3.0).allows(budget, 1, 1.0)


@pytest.mark.parametrize("running", [0, 5])
def test_no_budget_allows_all(running: int) -> None:
    assert Spent(1e30, 1e9, 1e3).allows(Budget(), running, 1e20)
