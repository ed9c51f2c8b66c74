"""Halving of batches and of trials in turn, and Hyperband's brackets."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest

from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.pruners import Halving, bracket_sequence, geometric_rungs, judged_once
from mutransfer.sweeps.study import pruner_for
from mutransfer.sweeps.workers import REPEATS


def study(pruner: optuna.pruners.BasePruner) -> optuna.Study:
    return optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))


def batch(study: optuna.Study, values: list[float], step: int) -> list[bool]:
    """Report all at the rung, then ask of each."""
    trials = [study.ask() for _ in values]
    for trial, value in zip(trials, values, strict=True):
        trial.report(value, step)
    return [trial.should_prune() for trial in trials]


def test_a_batch_keeps_its_best_third_whatever_the_order() -> None:
    for values in ([1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1], [3.0, 6, 1, 5, 2, 4]):
        kept = [
            value for value, pruned in zip(values, batch(study(Halving((20,))), values, 20), strict=True) if not pruned
        ]
        assert sorted(kept) == [1, 2]


def test_optunas_own_halving_depends_on_the_order() -> None:
    """What this pruner is there for: were it mended, ours could go."""
    own = optuna.pruners.SuccessiveHalvingPruner(min_resource=20, reduction_factor=3)
    assert batch(study(own), [6.0, 5, 4, 3, 2, 1], 20) == [False] * 6


def test_trials_in_turn_are_compared_with_those_before() -> None:
    found = study(Halving((20,)))
    assert [batch(found, [value], 20)[0] for value in (3.0, 4, 2, 5, 1)] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("steps", "rungs", "judged"),
    [(100, 4, 40), (80, 4, 32), (100, 1, 50), (100, 2, 33), (100, 9, 40), (1000, 32, 394), (2, 4, 1), (1, 4, None)],
)
def test_half_judges_a_trial_once_two_fifths_into_its_run(steps: int, rungs: int, judged: int | None) -> None:
    given = Experiment(steps=steps, rungs=rungs)
    assert judged_once(given.rung_steps, steps) == (() if judged is None else (judged,))
    assert given.pruner == "half"
    for step in set(given.rung_steps):
        kept = [not pruned for pruned in batch(study(pruner_for(given)), [4.0, 1.0, 3.0, 2.0], step)]
        assert kept == ([False, True, False, True] if step == judged else [True] * 4)


def test_ties_nan_and_other_steps() -> None:
    assert batch(study(Halving((20,))), [1.0] * 6, 20) == [False] * 6
    assert batch(study(Halving((20,))), [float("nan"), 1.0], 20) == [True, False]
    assert batch(study(Halving((20,))), [1.0, 2.0, 3.0], 19) == [False] * 3


def test_a_failed_trial_is_no_rival() -> None:
    found = study(Halving((20,)))
    lost = found.ask()
    lost.report(0.0, 20)
    found.tell(lost, state=optuna.trial.TrialState.FAIL)
    assert batch(found, [1.0], 20) == [False]


@pytest.mark.parametrize(
    ("steps", "most", "rungs"),
    [(200, 4, (22, 67)), (1000, 4, (12, 37, 111, 333)), (80, 1, (27,)), (12, 4, (4,)), (1, 4, ())],
)
def test_rungs_are_thirds_of_thirds_and_not_in_the_warmup(steps: int, most: int, rungs: tuple[int, ...]) -> None:
    assert geometric_rungs(steps, most) == rungs


def test_hyperband_deals_brackets_as_its_first_algorithm_does() -> None:
    # R = 81, eta = 3 (Li et al. 2018, Table 1): n = 81, 34, 15, 8, 5
    dealt = bracket_sequence(4, 3)
    assert Counter(dealt) == {0: 81, 1: 34, 2: 15, 3: 8, 4: 5}
    assert set(dealt[: len(dealt) // 4]) == {0, 1, 2, 3, 4}


def test_hyperband_spares_a_bracket_its_first_rungs() -> None:
    found = study(Halving((7, 20), hyperband=True))
    dealt = bracket_sequence(2, 3)
    pruned = batch(found, [float(i) for i in range(17)], 7)
    assert [p for p, bracket in zip(pruned, dealt, strict=True) if bracket] == [False] * 8
    assert sum(not p for p, bracket in zip(pruned, dealt, strict=True) if bracket == 0) == 3


def test_what_is_done_again_stays_in_its_bracket() -> None:
    found = study(pruner := Halving((7, 20), hyperband=True))
    dealt = bracket_sequence(2, 3)
    batch(found, [1.0] * 17, 7)
    ticket = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, system_attrs={REPEATS: 1})
    found.add_trial(ticket)
    assert dealt[1] != dealt[17 % len(dealt)]
    assert pruner.bracket(found, found.trials[17]) == dealt[1]
