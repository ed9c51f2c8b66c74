"""Trials in the middle of their run survive an interruption and a SIGKILL, and end as if there had been none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mutransfer.errors import RequestError
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, Report, RunContext, run_jobs
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.vectorized.batch_training import VectorizedTraining, refusal
from mutransfer.sweeps.vectorized.executor import Checkpoints, VectorizedExecutor

from ...helpers.small import experiment, journal
from .test_executor import done, jobs


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call of a training's `advance` took."""
    found: list[int] = []
    advance = VectorizedTraining.advance

    def noting(self: VectorizedTraining, count: int) -> None:
        advance(self, count)
        found.append(count)

    monkeypatch.setattr(VectorizedTraining, "advance", noting)
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def interrupted(asked: Experiment, folder: Path, at: tuple[int, int]) -> None:
    def report(reports: Sequence[Report]) -> list[Any]:
        if any((one.job.key, one.step) == at for one in reports):
            raise KeyboardInterrupt
        return []

    executor = VectorizedExecutor(4, checkpoints=Checkpoints(folder, share=1))
    with pytest.raises(KeyboardInterrupt):
        for _ in run_jobs(executor, RunContext(asked), jobs(asked), report):
            pass


def test_an_interrupted_batch_goes_on_inside_of_its_trials(tmp_path: Path, trained: list[int]) -> None:
    asked = experiment(steps=9)
    whole, told = done(VectorizedExecutor(4), asked, jobs(asked))
    interrupted(asked, tmp_path, at=(2, 6))
    assert len(files(tmp_path)) == 1  # of the rung at 3
    trained.clear()
    resumed, told_again = done(VectorizedExecutor(4, checkpoints=Checkpoints(tmp_path, share=1)), asked, jobs(asked))
    assert trained[:2] == [3, 3]  # from 3 to 6 to 9: not from the beginning
    for key, outcome in whole.items():
        assert (resumed[key].loss, resumed[key].start, resumed[key].steps) == pytest.approx(
            (outcome.loss, outcome.start, outcome.steps), rel=1e-6, nan_ok=True
        )
    assert sorted(each[:2] for each in told_again) == sorted(each[:2] for each in told)
    assert not tmp_path.exists() or files(tmp_path) == []


def test_a_trial_may_be_stopped_where_it_goes_on(tmp_path: Path) -> None:
    asked = experiment(steps=9)
    interrupted(asked, tmp_path, at=(2, 6))
    outcomes, _ = done(VectorizedExecutor(4, checkpoints=Checkpoints(tmp_path)), asked, jobs(asked, 4), worst=0.0)
    assert {(each.steps, each.stopped) for each in outcomes.values()} == {(3, True)}


def test_another_recipe_seed_or_length_is_another_trial(tmp_path: Path, trained: list[int]) -> None:
    asked = experiment(steps=9)
    interrupted(asked, tmp_path, at=(2, 6))
    for other in (
        [*jobs(asked, 1, lr=0.012345)],
        [Job(0, job.scale, "mup", job.recipe, seed=7, rungs=job.rungs) for job in jobs(asked, 1)],
    ):
        trained.clear()
        copy = Checkpoints(tmp_path)
        copy.clear = lambda: None  # type: ignore[method-assign]
        done(VectorizedExecutor(4, checkpoints=copy), asked, other)
        assert sum(trained) == 9
    longer = experiment(steps=10)
    assert refusal(RunContext(longer)) is None  # tries three steps
    trained.clear()
    done(VectorizedExecutor(4, checkpoints=Checkpoints(tmp_path)), longer, jobs(longer, 1))
    assert sum(trained) == 10


def test_a_torn_file_is_passed_over(tmp_path: Path, trained: list[int]) -> None:
    asked = experiment(steps=9)
    interrupted(asked, tmp_path, at=(2, 6))
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    trained.clear()
    done(VectorizedExecutor(4, checkpoints=Checkpoints(tmp_path)), asked, jobs(asked, 4))
    assert trained[0] == 3
    assert sum(trained) == 9


def test_each_write_replaces_the_one_before(tmp_path: Path) -> None:
    asked, seen = experiment(steps=9), []

    def report(reports: Sequence[Report]) -> list[Any]:
        seen.append(len(files(tmp_path)))
        return []

    list(
        run_jobs(
            VectorizedExecutor(3, checkpoints=Checkpoints(tmp_path, share=1)), RunContext(asked), jobs(asked), report
        )
    )
    assert max(seen) == 1


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    asked = experiment(steps=9)
    with pytest.raises(RequestError, match="cannot write"):
        done(VectorizedExecutor(3, checkpoints=Checkpoints(tmp_path / "file")), asked, jobs(asked))


KILLED = """
import sys, torch
from pathlib import Path
from typing import Any
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.vectorized.executor import Checkpoints
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor
from mutransfer.sweeps.tune import tune
torch.set_num_threads(1)
out = Path(sys.argv[1])
executor = VectorizedExecutor(4, checkpoints=Checkpoints(out / "checkpoints", share=1))
tune(Experiment.load(sys.argv[2]), RunFolder(out), executor=executor)
"""


def appeared(folder: Path, process: subprocess.Popen[bytes]) -> Iterator[None]:
    until = time.monotonic() + 60
    while not (folder.exists() and list(folder.glob("*.trials"))):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
        yield


@pytest.mark.extended
def test_a_killed_sweep_goes_on_inside_of_its_trials(tmp_path: Path, trained: list[int]) -> None:
    asked = experiment(steps=2400, rungs=5, trials=4)
    asked.save(tmp_path / "experiment.yaml")
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(tmp_path / "experiment.yaml")])
    try:
        for _ in appeared(out / "checkpoints", process):
            pass
        time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (file,) = files(out / "checkpoints")
    begun = [trial.params for trial in journal(RunFolder(out)).trials]
    found = tune(asked, RunFolder(out), executor=VectorizedExecutor(4, checkpoints=Checkpoints(out / "checkpoints")))
    assert sum(trained) < 2400
    study = journal(RunFolder(out))
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 4 + ["COMPLETE"] * 4
    assert [trial.params for trial in finished] == begun
    assert all(sorted(trial.intermediate_values) == [400, 800, 1200, 1600, 2000] for trial in finished)
    assert not file.exists()
    assert len(found.trials) == 8
