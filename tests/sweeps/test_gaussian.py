"""The Gaussian process learns from what was pruned: by the value it would have come to, never proposing it again."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutransfer.run_dir import RunFolder
from mutransfer.sweeps._optuna_internals import storage_of, study_id
from mutransfer.sweeps.jobs import Job
from mutransfer.sweeps.samplers import LOOKED_AT, GaussianProcess, foreseen
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.workers import FIXED

from ..helpers.small import Planted, experiment, octaves


def complete(there: float, final: float) -> FrozenTrial:
    return create_trial(value=final, intermediate_values={20: 9.0, 40: there})


def pruned(*reports: tuple[int, float]) -> FrozenTrial:
    return create_trial(state=TrialState.PRUNED, intermediate_values=dict(reports))


def test_a_pruned_trial_is_on_the_line_of_the_complete_ones() -> None:
    """2 · loss − 3 at step 40; one that went another way does not bend it."""
    done = [complete(x, 2 * x - 3) for x in (3.0, 3.1, 3.2, 3.4)] + [complete(3.3, 9.0)]
    lost = pruned((20, 8.0), (40, 3.45))
    *kept, seen = foreseen([*done, lost])
    assert kept == done
    assert seen.state is TrialState.COMPLETE
    assert seen.value == pytest.approx(3.9)
    assert lost.state is TrialState.PRUNED
    assert lost.value is None or lost.value == lost.intermediate_values[40]


def test_it_is_at_most_as_bad_as_the_worst_that_is_complete() -> None:
    done = [complete(x, x - 1) for x in (3.0, 3.1, 3.2, 3.4)]
    assert foreseen([*done, pruned((40, 50.0))])[-1].value == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("done", "value"),
    [
        ([], 3.5),  # nothing is known: the report itself
        ([complete(3.0, 2.0), complete(3.2, 4.0)], 3.4),  # two make no line: their median change
        ([complete(3.0, 4.0), complete(3.1, 3.5), complete(3.2, 3.0)], 3.9),  # falling: the same
    ],
)
def test_with_little_to_go_by(done: list[FrozenTrial], value: float) -> None:
    assert foreseen([*done, pruned((40, 3.5))])[-1].value == pytest.approx(value)


def test_what_has_reported_nothing_finite_stays_pruned() -> None:
    for lost in (pruned(), pruned((40, math.nan))):
        assert [each.state for each in foreseen([complete(3.0, 2.0), lost])] == [TrialState.COMPLETE, TrialState.PRUNED]


def proposed(sampler: optuna.samplers.BaseSampler) -> float:
    """Losses fall towards 1, where a trial was pruned for the loss it had: how far from it is asked next?"""
    study, space = optuna.create_study(sampler=sampler), {"x": FloatDistribution(0, 1)}
    for k in range(9):
        loss = 3 - 0.1 * k
        study.add_trial(
            create_trial(params={"x": 0.1 * k}, distributions=space, value=loss, intermediate_values={40: loss})
        )
    lost = create_trial(state=TrialState.PRUNED, params={"x": 1.0}, distributions=space, intermediate_values={40: 5.0})
    for _ in range(4):
        study.add_trial(lost)
    return 1 - study.ask(dict(space)).params["x"]


def test_it_does_not_propose_again_what_was_pruned() -> None:
    assert proposed(GaussianProcess(8, seed=0)) > 0.05


def test_optunas_own_proposes_it_again() -> None:
    """What ours is there for: were it mended, ours could go."""
    assert proposed(GPSampler(n_startup_trials=8, seed=0)) < 0.001


@pytest.mark.parametrize("end", [1.0, 1 - 2**-53], ids=["one", "one but for rounding"])
@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING])
def test_the_very_same_is_not_asked_twice(state: TrialState, end: float) -> None:
    """Losses fall to the end of the range, which is taken, by a trial that is done, runs, or waits to be done again."""
    study, space = optuna.create_study(sampler=GaussianProcess(8, seed=0)), {"x": FloatDistribution(0, 1)}
    for k in range(9):
        study.add_trial(create_trial(params={"x": 0.1 * k}, distributions=space, value=3 - 0.1 * k))
    assert study.ask(dict(space)).params == {"x": pytest.approx(1.0, rel=0, abs=2**-52)}  # nobody has it
    study.tell(9, state=TrialState.FAIL)
    there = {"value": 2.0, "params": {"x": end}, "distributions": space}
    given = {"system_attrs": {FIXED: {"x": end}}} if state is TrialState.WAITING else there
    if state is TrialState.RUNNING:
        given.pop("value")
    study.add_trial(create_trial(state=state, **given))
    asked = storage_of(study).create_new_trial(study_id(study))
    assert optuna.trial.Trial(study, asked).suggest_float("x", 0, 1) < 1 - 1e-6


@pytest.mark.extended
def test_every_pruner_gets_to_the_minimum(tmp_path: Path) -> None:
    def valley(job: Job) -> float:
        return 1 + (octaves(job.recipe) + 6.3) ** 2

    for pruner in ("half", "median", "halving"):
        given = experiment(sampler="gp", pruner=pruner, trials=20, steps=40)
        assert tune(given, RunFolder(tmp_path / pruner), executor=Planted(valley)).value < 1.001


def test_optuna_looks_at_more_points() -> None:
    """Were their number called otherwise, ours would not count."""
    assert GPSampler()._n_preliminary_samples > LOOKED_AT
