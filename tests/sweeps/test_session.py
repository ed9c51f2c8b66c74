"""The ask–tell loop: events in any order, jobs that are stopped, and a loop that is left in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from mutransfer.proxies.training import Outcome
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import (
    Done,
    Events,
    Executor,
    Job,
    Ready,
    Report,
    Reports,
    RunContext,
    SequentialExecutor,
    Session,
    run_jobs,
)
from mutransfer.sweeps.tune import tune

from ..helpers.scripts import MODEL
from ..helpers.small import each, experiment, journal
from ..helpers.tuned import bowl, states


class Scripted(Executor):
    """Starts what it has room for; all report together at their first rung, and end in the reverse order."""

    def __init__(self, capacity: int, loss: Callable[[Job], float] = bowl) -> None:
        self._capacity, self.loss = capacity, loss
        self.batches: list[int] = []
        self.closed = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    def events(self, session: Session) -> Events:
        try:
            while jobs := (yield from session.take(self.capacity)):
                self.batches.append(len(jobs))
                yield Reports(tuple(Report(job, job.rungs[0], self.loss(job)) for job in jobs))
                for job in reversed(jobs):
                    stopped = session.is_stopped(job.key)
                    steps = job.rungs[0] if stopped else session.experiment.steps
                    yield Done(job, Outcome(self.loss(job), 10.0, steps, stopped, 0.01))
        finally:
            self.closed += 1


def jobs(given: Experiment, count: int) -> Iterator[Job]:
    for k in range(count):
        yield Job(k, given.proxy_scale, "mup", given.recipe.with_(lr=2.0**-k), 0, (3, 5))


def test_jobs_are_drawn_when_there_is_room_and_end_in_any_order() -> None:
    given, scripted, drawn = experiment(), Scripted(3), []

    def watched() -> Iterator[Job]:
        for job in jobs(given, 5):
            drawn.append(job.key)
            yield job

    ended = []
    for job, _ in run_jobs(scripted, RunContext(given), watched()):
        ended.append(job.key)
        assert len(drawn) == (3 if len(ended) <= 3 else 5)
    assert ended == [2, 1, 0, 4, 3]
    assert scripted.batches == [3, 2]
    assert scripted.closed == 1


def test_only_what_is_stopped_is_stopped() -> None:
    given = experiment()
    outcomes = dict(
        run_jobs(Scripted(3), RunContext(given), jobs(given, 6), each(lambda job, step, loss: job.key in (1, 5)))
    )
    assert [job.key for job, outcome in outcomes.items() if outcome.stopped] == [1, 5]


def test_a_key_that_was_stopped_may_come_again() -> None:
    given = experiment()
    (job,) = jobs(given, 1)
    asked: list[int] = []

    def once(reports: Sequence[Report]) -> list[Any]:
        asked.append(len(reports))
        return [job.key] if len(asked) == 1 else []

    assert [outcome.stopped for _, outcome in run_jobs(Scripted(1), RunContext(given), [job, job], once)] == [
        True,
        False,
    ]


def test_a_session_without_jobs_ends_at_once() -> None:
    with Session(Scripted(4), RunContext(experiment())) as session:
        assert list(session) == [Ready(4)]


def test_all_reports_of_a_batch_are_recorded_before_any_trial_is_pruned(folder: RunFolder) -> None:
    found = tune(experiment(pruner="half", sampler="random", trials=8), folder, executor=Scripted(8))
    assert sorted(found.trials["state"]) == ["COMPLETE"] * 4 + ["PRUNED"] * 4
    worst_kept = found.trials.loc[found.trials["state"] == "COMPLETE", "value"].max()
    assert (found.trials.loc[found.trials["state"] == "PRUNED", "value"] > worst_kept).all()


@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_abandoned_loop_ends_its_executor_and_requeues(after: int, folder: RunFolder) -> None:
    scripted = Scripted(4)

    def leave(done: int, total: int, text: str) -> None:
        if done == after:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tune(experiment(trials=6), folder, executor=scripted, progress=leave)
    assert scripted.closed == 1
    left = states(folder)
    assert left.count("COMPLETE") == after
    assert left.count("FAIL") == left.count("WAITING") == (4 - after if after < 4 else 1)
    assert "RUNNING" not in left
    begun = [trial.params for trial in journal(folder).trials if trial.state is TrialState.FAIL]
    tune(experiment(trials=6), folder, executor=Scripted(4))
    assert states(folder).count("COMPLETE") == 6
    finished = [trial.params for trial in journal(folder).trials if trial.state is TrialState.COMPLETE]
    assert all(params in finished for params in begun)


def test_an_error_of_the_storage_is_not_the_trainers(
    folder: RunFolder, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised while the trainer waits in its ``report``, and its trial is requeued rather than failed."""

    def broken(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(optuna.trial.Trial, "report", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        tune(own("tidy", pruner="median"), folder)
    assert (shop / "ended").read_text() == "x"
    assert states(folder) == ["FAIL", "WAITING"]


TRAINERS = """
import warnings
from pathlib import Path

import numpy as np


def tidy(recipe, plan, seed, report):
    try:
        for step in range(1, 9):
            report(step, 1.0)
    finally:
        Path("ended").write_text("x")
    return 1.0


def deaf(recipe, plan, seed, report):
    for step in range(1, 9):
        try:
            report(step, 1.0)
        except BaseException:
            pass
    Path("ended").write_text("x")
    return 1.0


def sulks(recipe, plan, seed, report):
    try:
        report(3, 1.0)
    finally:
        raise RuntimeError("could not clean up")


def interrupted(recipe, plan, seed, report):
    report(3, 1.0)
    raise KeyboardInterrupt


def warns(recipe, plan, seed, report):
    report(3, 1.0)
    warnings.warn("mind the step")
    return 1.0


def context(recipe, plan, seed, report):
    return 1.0 if np.geterr()["over"] == "raise" else 2.0
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODEL)
    (tmp_path / "own.py").write_text(TRAINERS)
    return tmp_path


def own(name: str, **changes: Any) -> Experiment:
    return experiment(**{"model": "models.py:build", "data": "none", "trainer": f"own.py:{name}", **changes})


def outcomes(given: Experiment) -> list[Outcome]:
    return [outcome for _, outcome in run_jobs(SequentialExecutor(), RunContext(given), jobs(given, 1))]


@pytest.mark.parametrize("name", ["tidy", "deaf", "sulks"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_trainer_that_waits_for_an_answer_is_ended_with_the_loop(
    name: str, error: type[BaseException], shop: Path
) -> None:
    given = own(name)

    def report(reports: Sequence[Report]) -> list[Any]:
        assert reports[0].step == 3
        raise error

    with pytest.raises(error):
        list(run_jobs(SequentialExecutor(), RunContext(given), jobs(given, 1), report))
    if name != "sulks":
        assert (shop / "ended").read_text() == "x"


@pytest.mark.usefixtures("shop")
def test_what_happens_in_a_trainer_arrives_as_if_it_were_called() -> None:
    with pytest.raises(KeyboardInterrupt):
        outcomes(own("interrupted"))
    with pytest.warns(UserWarning, match="mind the step"):
        assert outcomes(own("warns"))[0].loss == 1.0
    with np.errstate(over="raise"):
        assert outcomes(own("context"))[0].loss == 1.0
    assert "RuntimeError: could not clean up" in str(outcomes(own("sulks"))[0].failed)
