"""The Gaussian process learns from what was pruned: by the value it would have come to, never proposing it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna._gp import optim_mixed
from optuna._gp.acqf import BaseAcquisitionFunc
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutransfer.run_dir import RunFolder
from mutransfer.sweeps import _optuna_internals
from mutransfer.sweeps._optuna_internals import storage_of, study_id
from mutransfer.sweeps.jobs import Job
from mutransfer.sweeps.samplers import GaussianProcess, foreseen
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


RANGES: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(2**-12, 1, log=True), "scale": FloatDistribution(0.25, 4, log=True), "beta": FloatDistribution(0.8, 1)
}  # fmt: skip
SPACES = [RANGES, RANGES | {"schedule": CategoricalDistribution(["cosine", "linear", "wsd"])}, {"lr": RANGES["lr"]}]


def started(space: Mapping[str, BaseDistribution], seed: int, count: int) -> optuna.Study:
    """A study with ``count`` complete trials of a valley that is steep on one side."""
    study, rng = optuna.create_study(sampler=GaussianProcess(8, seed)), np.random.default_rng(seed)
    for _ in range(count):
        drawn = {
            name: rng.choice(each.choices)
            if isinstance(each, CategoricalDistribution)
            else float(np.exp(rng.uniform(np.log(each.low), np.log(each.high))))  # type: ignore[attr-defined]
            for name, each in space.items()
        }
        octave = math.log2(drawn["lr"]) + 6
        loss = 2 + 0.02 * octave**2 * (4 if octave > 0 else 1) + 0.1 * (drawn.get("scale", 1.0) - 1) ** 2
        loss += {"wsd": -0.02}.get(drawn.get("schedule", ""), 0.0) + rng.normal(0, 0.01)
        study.add_trial(create_trial(params=drawn, distributions=dict(space), value=loss))
    return study


@pytest.mark.parametrize("space", SPACES, ids=["ranges", "a choice", "one"])
@pytest.mark.parametrize("running", [0, 9])
def test_what_is_proposed_is_as_good_as_what_optuna_climbs_to(
    space: dict[str, BaseDistribution], running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the acquisition function itself, the logarithm of the expected improvement: on average within 5% of the improvement."""
    behind = list[float]()
    ours = _optuna_internals.BatchGPSampler._maximized

    def both(self: _optuna_internals.BatchGPSampler, acquisition: BaseAcquisitionFunc, best: np.ndarray) -> np.ndarray:
        found = ours(self, acquisition, best)
        _, climbed = optim_mixed.optimize_acqf_mixed(
            acquisition, warmstart_normalized_params_array=best, rng=np.random.RandomState(0)
        )
        behind.append(climbed - float(acquisition.eval_acqf_no_grad(found[None])[0]))
        return found

    monkeypatch.setattr(_optuna_internals.BatchGPSampler, "_maximized", both)
    for seed in range(4):
        study = started(space, seed, 24)
        for _ in range(running + 1):
            study.ask(dict(space))
    assert len(behind) == 4 * (running + 1)
    assert np.mean(behind) < 0.05
    assert max(behind) < 0.5


def test_a_batch_is_asked_with_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, fit = list[int](), _optuna_internals.fit_kernel_params

    def counted(known: np.ndarray, *rest: object) -> object:
        fits.append(len(known))
        return fit(known, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_optuna_internals, "fit_kernel_params", counted)
    study = started(RANGES, 0, 12)
    asked = [study.ask(dict(RANGES)) for _ in range(5)]
    assert fits == [12]
    assert len({each.params["lr"] for each in asked}) == 5
    study.tell(asked[0], 1.9)
    study.ask(dict(RANGES))
    assert fits == [12, 13]
    study.ask(dict(SPACES[1]))  # other hyperparameters
    assert fits[:2] == [12, 13]


def test_a_default_device_does_not_matter() -> None:
    asked = []
    for device in ("cpu", "meta"):
        study = started(RANGES, 0, 12)
        with torch.device(device):
            asked.append(study.ask(dict(RANGES)).params)
    assert asked[0] == asked[1]
