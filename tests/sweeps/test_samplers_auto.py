"""What a sweep learns by where it names no sampler: a Gaussian process while trials are few, TPE beyond."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import TPESampler

from mutransfer.run_dir import RunFolder
from mutransfer.sweeps import samplers
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job
from mutransfer.sweeps.samplers import START, Auto, GaussianProcess, tpe
from mutransfer.sweeps.tune import tune

from ..helpers.small import Planted, experiment, octaves

SPACE = {name: FloatDistribution(0, 1) for name in ("x", "y")}


def asked(sampler: optuna.samplers.BaseSampler, told: int, count: int = 4) -> list[dict[str, float]]:
    """What is asked at once after ``told`` trials of a valley."""
    study = optuna.create_study(sampler=sampler)
    for k in range(told):
        x, y = math.modf(k * 0.618)[0], math.modf(k * 0.414)[0]
        study.add_trial(optuna.create_trial(params={"x": x, "y": y}, distributions=SPACE, value=(x - 0.9) ** 2 + y**2))
    return [study.ask(dict(SPACE)).params for _ in range(count)]


def process(seed: int) -> GaussianProcess:
    return GaussianProcess(START, seed)


@pytest.mark.parametrize(("told", "made"), [(12, process), (40, tpe)])
def test_the_number_of_a_trial_decides(
    told: int, made: Callable[[int], optuna.samplers.BaseSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "FEW", 30)
    assert asked(Auto(3), told) == asked(made(3), told)


def test_both_wait_for_as_many_trials() -> None:
    assert isinstance(tpe(0), TPESampler)
    for made in (process, tpe):
        assert asked(made(3), START - 1) == asked(optuna.samplers.RandomSampler(3), START - 1)


def test_it_goes_where_the_valley_leads() -> None:
    for each in asked(Auto(0), 16):
        assert math.hypot(each["x"] - 0.9, each["y"]) < 0.35


def test_it_is_the_default_and_finds_a_minimum(tmp_path: Path) -> None:
    assert Experiment().sampler == "auto"

    def valley(job: Job) -> float:
        return 1 + (octaves(job.recipe) + 4) ** 2 / 25 + (math.log2(job.recipe.init_scale) - 1) ** 2 / 4

    search = {"lr": {"low": 2**-9, "high": 2**-1, "log": True}, "init_scale": {"low": 0.25, "high": 4, "log": True}}
    given = experiment(sampler="auto", trials=20, search=search)
    found = tune(given, RunFolder(tmp_path / "run"), executor=Planted(valley))
    assert found.value < 1.02
