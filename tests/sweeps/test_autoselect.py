"""The planner: the manner that is done first by what was measured, said in one line; and real measurements of small models."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mutransfer.errors import RequestError
from mutransfer.sweeps import autoselect
from mutransfer.sweeps.autoselect import Timed, chosen
from mutransfer.sweeps.executors import LazyExecutor, executor_for
from mutransfer.sweeps.jobs import Job, RunContext, SequentialExecutor, run_jobs
from mutransfer.sweeps.processes import ProcessExecutor
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

from ..helpers.small import experiment

Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Put numbers in the place of measurements, on two cores: seconds one by one, fused by number, what compiling gains."""

    def put(one: float, fused: dict[int, float], gains: tuple[float, float] = (1.0, 1.0)) -> None:
        def timed(step: float | None, compile: bool, gain: float) -> Timed | None:
            return None if step is None else Timed(step / gain, 30.0) if compile else Timed(step, 0.1)

        monkeypatch.setattr(autoselect, "single_step", lambda *given: timed(one, given[3], gains[0]))
        monkeypatch.setattr(autoselect, "fused_step", lambda *given: timed(fused.get(given[1]), given[4], gains[1]))
        monkeypatch.setattr(autoselect.os, "sched_getaffinity", lambda _: {0, 1})

    return put


def test_narrow_models_are_fused_as_long_as_more_pay(plant: Plant) -> None:
    plant(5e-3, {4: 4e-3, 8: 3e-3, 16: 2.5e-3, 32: 2.45e-3, 64: 1e-9}, (1.1, 1.6))
    choice = chosen(RunContext(experiment(steps=1000)), 400)
    assert (choice.how, choice.at_once, choice.compile) == ("fused", 32, True)  # 64 is not tried once 32 hardly pays
    assert str(choice).startswith(
        "trials are trained 32 at a time, fused, compiled: a step of one trial takes 5.00 ms one by one; about 2.75 ms in 2 "
        "processes; 4.00 ms 4 at a time, fused; "
    )
    assert (
        "2.45 ms 32 at a time, fused; about 2.50 ms in 2 processes, compiled; 1.53 ms 32 at a time, fused, compiled."
        in str(choice)
    )


def test_fused_trials_are_not_compiled_where_that_gains_single_ones_nothing(plant: Plant) -> None:
    """It takes half a minute; a little gain would still be worth that in a sweep of hours."""
    plant(70e-3, {3: 40e-3}, (1.03, 1.6))
    assert "fused, compiled" not in chosen(RunContext(experiment(steps=1000)), 10).reason
    plant(70e-3, {3: 40e-3}, (1.2, 1.6))
    assert "fused, compiled" in chosen(RunContext(experiment(steps=1000)), 10).reason


def test_nothing_is_compiled_for_minutes_of_work_where_fusing_gains_nothing(plant: Plant) -> None:
    """Measured at width 256: fusing gained 3%, and two compilations took 35 of 150 seconds, for slower steps."""
    plant(76e-3, {4: 77e-3, 8: 74e-3}, (0.92, 0.92))
    assert "compiled" not in chosen(RunContext(experiment(steps=40)), 75, independent=True).reason
    plant(76e-3, {4: 25e-3, 8: 19e-3}, (1.8, 1.6))
    assert "compiled" in chosen(RunContext(experiment(steps=40)), 250, independent=True).reason
    plant(76e-3, {4: 77e-3, 8: 74e-3}, (0.92, 0.92))
    assert "compiled" in chosen(RunContext(experiment(steps=400)), 75, independent=True).reason


def test_processes_that_run_already_cost_no_start(plant: Plant) -> None:
    plant(20e-3, {4: 10e-3})
    context = RunContext(experiment(steps=40))
    assert chosen(context, 40, independent=True).how == "fused"
    plant(20e-3, {4: 11.2e-3})
    found = {started: chosen(context, 40, independent=True, started=started) for started in (False, True)}
    assert {started: choice.how for started, choice in found.items()} == {False: "fused", True: "processes"}


def test_wide_models_go_to_processes(plant: Plant) -> None:
    plant(50e-3, {4: 49e-3})
    choice = chosen(RunContext(experiment(steps=1000)), 60)
    assert (choice.how, choice.at_once, choice.compile) == ("processes", 2, False)
    plant(50e-3, {4: 49e-3}, (1.5, 1.6))
    choice = chosen(RunContext(experiment(steps=1000)), 60)
    assert (choice.how, choice.at_once, choice.compile) == ("processes", 2, True)


def test_a_sweep_that_does_not_last_is_not_compiled(plant: Plant) -> None:
    plant(5e-3, {4: 2e-3, 8: 1e-3})
    choice = chosen(RunContext(experiment(steps=400)), 24)
    assert (choice.how, choice.at_once, choice.compile) == ("fused", 8, False)  # a third of the trials at most


@pytest.mark.parametrize(("seconds", "at_once"), [(0.1, 64), (1.0, 32), (6.0, 16), (15.0, 8), (25.0, 4)])
def test_no_more_is_measured_than_can_be_gained(
    seconds: float, at_once: int, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first doubling may gain 40 s; doublings then gain 100, 50, 25 and 12.5 s, and each takes twice as long to measure."""
    fused = {count: 1e-3 + 4e-3 / count for count in (4, 8, 16, 32, 64)}
    plant(5e-3, fused)
    passed = [0.0]
    monkeypatch.setattr(autoselect, "perf_counter", lambda: passed[0])

    def slow(*given: Any) -> Timed:
        passed[0] += seconds * given[1] / 4
        return Timed(fused[given[1]], 0.1)

    monkeypatch.setattr(autoselect, "fused_step", slow)
    monkeypatch.setattr(autoselect, "WORTH", 1.0)
    choice = chosen(RunContext(experiment(steps=1000)), 200, independent=True)
    assert choice.how == "fused"
    assert f"ms {at_once} at a time, fused" in choice.reason
    assert f"ms {2 * at_once} at a time, fused" not in choice.reason


def test_validations_count(plant: Plant) -> None:
    plant(5e-3, {})
    few, many = (chosen(RunContext(experiment(steps=steps)), 3).seconds for steps in (10, 20))
    examples = sum(len(targets) for _, targets in RunContext(experiment()).required_data.validation())
    assert many - few == pytest.approx(3 * 10 * 5e-3)
    assert few == pytest.approx(3 * 5e-3 * (10 + 2 / 3 * examples / experiment().batch_size))


def test_memory_ends_the_search_for_more(plant: Plant) -> None:
    plant(5e-3, {4: 1e-3})
    assert chosen(RunContext(experiment(steps=1000)), 400).at_once == 4


def test_a_number_that_memory_does_not_suffice_for_is_halved(plant: Plant) -> None:
    plant(5e-3, {2: 1e-3})
    assert chosen(RunContext(experiment(steps=1000)), 400, at_once=8, only="fused").at_once == 2
    plant(5e-3, {})
    with pytest.raises(RequestError, match="there is not enough memory for one trial"):
        chosen(RunContext(experiment(steps=1000)), 400, at_once=8, only="fused")


def test_a_given_number_is_kept(plant: Plant) -> None:
    plant(5e-3, {6: 1e-3})
    assert chosen(RunContext(experiment(steps=1000)), 400, at_once=6, only="fused").at_once == 6


def test_a_short_sweep_is_not_measured_for_long() -> None:
    choice = chosen(RunContext(experiment()), 4)
    assert (choice.how, choice.at_once) == ("one", 1)
    assert math.isfinite(choice.seconds)


def test_real_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    with executor_for(experiment(trials=12), "fused") as executor:
        assert isinstance(executor, LazyExecutor)
        assert isinstance(executor.chosen, VectorizedExecutor)
        assert executor.capacity == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trials are trained 4 at a time, fused: a step of one trial takes ")


def test_auto_says_what_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    with executor_for(experiment(), "auto") as executor:
        assert isinstance(executor, LazyExecutor)
        assert isinstance(executor.chosen, SequentialExecutor)
    assert capsys.readouterr().err.startswith("trials are trained one by one: a step of one trial takes ")


def test_what_is_not_fused_says_why(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(1.0, {})
    asked = experiment(optimizer="adagrad", trials=40)
    with executor_for(asked, "auto") as executor:
        assert isinstance(executor, LazyExecutor)
        assert isinstance(executor.chosen, ProcessExecutor)
    assert "; they cannot be fused, as adagrad has no update of many trials at once" in capsys.readouterr().err
    with executor_for(asked, "fused") as executor:
        assert isinstance(executor, LazyExecutor)
        assert isinstance(executor.chosen, SequentialExecutor)
    assert capsys.readouterr().err.startswith("trials are trained one by one: adagrad has no update")


def given(how: str, **options: Any) -> None:
    with executor_for(experiment(optimizer="adagrad"), how, **options) as executor:
        assert executor.capacity


def test_a_precision_that_nothing_has() -> None:
    with pytest.raises(RequestError, match="--precision bfloat16 needs trials that can be fused, but adagrad"):
        given("auto", precision="bfloat16")
    with pytest.raises(RequestError, match="--precision bfloat16 needs --executor fused"):
        given("one", precision="bfloat16")


def test_checkpoints_are_where_they_are_told(tmp_path: Path) -> None:
    with executor_for(experiment(trials=12), "fused", 2, checkpoints=tmp_path) as executor:
        assert isinstance(executor, LazyExecutor)
        assert isinstance(executor.chosen, VectorizedExecutor)
        assert executor.chosen.checkpoints is not None
        assert executor.chosen.checkpoints.folder == tmp_path


WITHOUT_A_COMPILER = """
import warnings
from mutransfer.sweeps.autoselect import fused_step, single_step
from mutransfer.sweeps.jobs import RunContext
from tests.helpers.small import experiment
warnings.simplefilter("ignore")
assert single_step(RunContext(experiment()), "cpu", 1, False) is not None
assert single_step(RunContext(experiment()), "cpu", 1, True) is None
assert fused_step(RunContext(experiment()), 2, "cpu", None, False) is not None
assert fused_step(RunContext(experiment()), 2, "cpu", None, True) is None
"""


@pytest.mark.extended
def test_what_cannot_be_compiled_is_no_choice(tmp_path: Path) -> None:
    """In a process of its own, as torch looks for a compiler once."""
    env = os.environ | {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    given = [sys.executable, "-c", WITHOUT_A_COMPILER]
    done = subprocess.run(given, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, on importing its compiler
def test_compiled_models_train_the_same() -> None:
    given = experiment()
    job = Job(0, given.proxy_scale, "mup", given.recipe, 0)
    ((_, apart),) = run_jobs(SequentialExecutor(), RunContext(given), [job])
    ((_, compiled),) = run_jobs(SequentialExecutor(compile=True), RunContext(given), [job])
    assert compiled.loss == pytest.approx(apart.loss, rel=1e-5)


def test_what_is_left_to_do_is_planned_and_what_was_fused_goes_on(tmp_path: Path, plant: Plant) -> None:
    plant(5e-3, {2: 4e-3})
    asked = experiment(steps=1000, trials=400)
    with executor_for(asked, "auto") as executor:
        assert isinstance(executor, LazyExecutor)
        executor.expect(2)
        assert isinstance(executor.chosen, SequentialExecutor)
    (tmp_path / "some.trials").touch()
    with executor_for(asked, "auto", checkpoints=tmp_path) as executor:
        assert isinstance(executor, LazyExecutor)
        executor.expect(2)
        assert isinstance(executor.chosen, VectorizedExecutor)
