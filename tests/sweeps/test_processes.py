"""Real processes: what they report is heard, pruned, and outlived when one of them dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mutransfer.errors import RequestError
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import (
    Done,
    Events,
    Executor,
    Job,
    Reports,
    RunContext,
    SequentialExecutor,
    Session,
    run_jobs,
)
from mutransfer.sweeps.processes import ProcessExecutor, ending
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.verify import basins

from ..helpers.small import Failing, children, each, experiment, journal, within


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture(scope="module")
def two() -> Iterator[ProcessExecutor]:
    """Started once: torch takes seconds to import."""
    with ProcessExecutor(2) as made:
        yield made


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    with within(90):
        yield


def jobs(count: int, given: Experiment) -> list[Job]:
    return [
        Job(k, given.proxy_scale, "mup", given.recipe.with_(lr=2.0 ** -(k + 3)), 0, rungs=(3, 5)) for k in range(count)
    ]


def test_reports_reach_the_parent_and_agree_with_one_by_one(two: ProcessExecutor) -> None:
    def heard_by(executor: Any) -> tuple[dict[int, list[tuple[int, float]]], dict[int, Outcome]]:
        heard: dict[int, list[tuple[int, float]]] = {}

        def report(job: Job, step: int, loss: float) -> bool:
            assert os.getpid() == parent
            heard.setdefault(job.key, []).append((step, loss))
            return job.key == 2 and step == 5

        given = experiment()
        return heard, {
            job.key: outcome for job, outcome in run_jobs(executor, RunContext(given), jobs(4, given), each(report))
        }

    parent = os.getpid()
    heard, outcomes = heard_by(two)
    expected, one_by_one = heard_by(SequentialExecutor())
    assert {key: [step for step, _ in told] for key, told in heard.items()} == {key: [3, 5] for key in range(4)}
    for key in range(4):
        assert dict(heard[key]) == pytest.approx(dict(expected[key]))
        assert outcomes[key].loss == pytest.approx(one_by_one[key].loss)
        assert outcomes[key].stopped == one_by_one[key].stopped == (key == 2)
        assert outcomes[key].steps == (5 if key == 2 else 8)


def test_trials_in_processes_are_pruned(folder: RunFolder, two: ProcessExecutor) -> None:
    """From 2^2 on, a learning rate cannot keep up with the recipe's own."""
    search = {"lr": {"low": 2**-9, "high": 2.0**6, "log": True}}
    found = tune(experiment(pruner="median", sampler="random", search=search, trials=14), folder, executor=two)
    assert len(found.trials) == 14
    pruned = found.trials[found.trials["state"] == "PRUNED"]
    assert len(pruned) >= 1
    assert (pruned["steps"] < 8).all()


class Killing(Executor):
    """Kills the process of the job ``key`` at its first report, as the system does when memory runs out."""

    def __init__(self, inner: ProcessExecutor, keys: Callable[[int], bool]) -> None:
        self.inner, self.keys = inner, keys

    @property
    def capacity(self) -> int:
        return self.inner.capacity

    def events(self, session: Session) -> Events:
        for event in self.inner.events(session):
            for report in event.reports if isinstance(event, Reports) else ():
                if self.keys(report.job.key):
                    pid = next(w.process.pid for w in self.inner.workers if w.job == report.job)
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
            yield event


def test_a_process_that_dies_takes_one_trial_with_it(folder: RunFolder, two: ProcessExecutor) -> None:
    found = tune(experiment(trials=5), folder, executor=Killing(two, lambda key: key == 2))
    assert sorted(found.trials["state"]) == ["COMPLETE"] * 5 + ["FAIL"]
    lost = journal(folder).trials[2]
    assert lost.state.name == "FAIL"
    assert lost.user_attrs["outcome"]["failed"].startswith("its process was killed by SIGKILL (often")
    assert not found.trials["diverged"].any()
    (warning,) = found.warnings
    assert warning.startswith("one trial failed, and others were run instead; trial 2: its process was killed")


@pytest.mark.extended
def test_processes_that_always_die_stop_the_sweep_in_a_sentence(folder: RunFolder) -> None:
    before = children()
    with ProcessExecutor(1) as one:
        with pytest.raises(RequestError, match=r"^trial 0 failed because its process was killed by SIGKILL .*\.$"):
            tune(experiment(), folder, executor=Killing(one, lambda key: True))
        assert children() == before
        # The recipe to beat, which failed, is still the first to be done.
        found = tune(experiment(trials=2), folder, executor=one)
    assert [trial.state.name for trial in journal(folder).trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert found.default is not None


def test_failures_in_a_row_stop_the_sweep_and_lose_nothing(folder: RunFolder) -> None:
    class Lost(SequentialExecutor):
        def events(self, session: Session) -> Events:
            for event in super().events(session):
                if isinstance(event, Done) and event.job.key not in (0, 2):
                    event = Done(event.job, Outcome(0.1, 0.2, 0, False, 0.0, "it was lost"))
                yield event

    with pytest.raises(
        RequestError, match=r"^3 trials in a row failed, the last, trial 5, because it was lost: fix that"
    ):
        tune(experiment(), folder, executor=Lost())
    names = [trial.state.name for trial in journal(folder).trials]
    assert names.count("COMPLETE") == 2
    assert names.count("FAIL") == 4
    assert names.count("WAITING") == 1  # the last one, whose cause is perhaps mended
    assert tune(experiment(), folder).value > 1  # no failed trial's 0.1 is the best


def test_a_failed_run_leaves_no_hole_in_a_basin(folder: RunFolder, two: ProcessExecutor) -> None:
    tune(experiment(trials=1), folder)

    class Lost(SequentialExecutor):
        def events(self, session: Session) -> Events:
            for event in super().events(session):
                if isinstance(event, Done):
                    event = Done(event.job, Outcome(0.1, 0.2, 0, False, 0.0, "it was lost"))
                yield event

    with pytest.raises(RequestError, match=r"the run of mup at width 16 .* failed because it was lost: fix that"):
        basins(RunContext(experiment()), Recipe(), [8, 16], folder=folder, executor=Lost())
    assert not folder.basins.exists()


@pytest.mark.extended
@pytest.mark.parametrize("error", [RequestError("no."), KeyboardInterrupt()])
def test_whatever_ends_the_sweep_ends_the_processes_at_work(
    error: BaseException, folder: RunFolder, two: ProcessExecutor
) -> None:
    long = {"steps": 100_000, "rungs": 32}
    given = experiment(**long)

    def report(job: Job, step: int, loss: float) -> bool:
        raise error

    with pytest.raises(type(error)):
        list(run_jobs(two, RunContext(given), jobs(2, given), each(report)))
    assert children() == []
    assert [job.key for job, _ in run_jobs(two, RunContext(experiment()), jobs(1, experiment()))] == [
        0
    ]  # and others can follow


def test_a_bug_in_a_process_shows_where_it_is(two: ProcessExecutor) -> None:
    given = experiment()
    job = Job(0, given.proxy_scale, "mup", given.recipe, 0, rungs=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError) as caught:
        list(run_jobs(two, RunContext(given), [job]))
    assert "in _serve" in caught.value.__notes__[0]


@pytest.mark.extended
def test_an_interruption_gives_back_what_processes_had_begun(folder: RunFolder, two: ProcessExecutor) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(experiment(), folder, executor=Failing(1, KeyboardInterrupt(), two))
    assert len(tune(experiment(), folder, executor=two).trials) >= 4
    names = [trial.state.name for trial in journal(folder).trials]
    assert names.count("COMPLETE") == 4
    assert "RUNNING" not in names


@pytest.mark.parametrize(
    ("code", "said"),
    [(-9, "was killed by SIGKILL"), (137, "was killed by SIGKILL"), (-11, "was killed by SIGSEGV"), (1, "code 1")],
)
def test_an_ending_is_named(code: int, said: str) -> None:
    assert said in ending(code)
