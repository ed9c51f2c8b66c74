"""Time left: counted in runs and what each takes, corrected by the pace of what is done."""

from __future__ import annotations

import pytest

from mutransfer.recipe import Scale
from mutransfer.sweeps import autoselect
from mutransfer.sweeps.autoselect import UNSURE, Forecast, Timed, TimedExecutor, run_seconds, single_step
from mutransfer.sweeps.jobs import Job, RunContext, run_jobs

from ..helpers.small import Planted, experiment

PHASES = {"tuning": 20.0, "basins": 100.0, "control": 30.0, "report": 10.0}


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_line_knows_the_phases_to_come() -> None:
    phases = Forecast(PHASES, clock := Clock())
    phases.begin("tuning")
    assert phases.left() == 160
    clock.now = 7
    assert phases.left() == 153  # of the first run, nothing is known yet


@pytest.mark.parametrize("pace", [0.5, 1.0, 3.0])
def test_time_left_follows_the_pace(pace: float) -> None:
    phases = Forecast(PHASES, clock := Clock())
    for name, seconds in PHASES.items():
        phases.begin(name)
        for _ in range(10):
            clock.now += pace * seconds / 10
            phases.note(seconds / 10)
            rest = sum(PHASES.values()) - clock.now / pace
            assert phases.left() == pytest.approx(rest * (clock.now + UNSURE) / (clock.now / pace + UNSURE))
    assert phases.left() == pytest.approx(0, abs=1e-9)


def test_a_phase_that_needed_less_or_more_is_over_when_the_next_begins() -> None:
    phases = Forecast(PHASES, clock := Clock())
    phases.begin("tuning")
    clock.now = 20
    phases.begin("basins")  # none of the trials was told, as all were there
    assert phases.left() == pytest.approx(140)
    clock.now = 120
    phases.note(1000)
    assert phases.left() == pytest.approx(40)
    phases.begin("report")  # without a control
    assert phases.left() == pytest.approx(10)


def test_runs_are_counted_by_what_they_take_not_by_how_many_they_are() -> None:
    narrow, wide = Scale(8, 2), Scale(64, 2)
    expected = Forecast({"basins": 110.0}, clock := Clock())
    expected.begin("basins")
    given, seconds = experiment(), {narrow: 10.0, wide: 100.0}

    def loss(job: Job) -> float:
        clock.now += seconds[job.scale]
        return 1.0

    watched = TimedExecutor(Planted(loss), expected, seconds)
    assert watched.capacity == 1
    jobs = [Job(k, scale, "mup", given.recipe, 0) for k, scale in enumerate((wide, narrow))]
    left = []
    for _ in run_jobs(watched, RunContext(given), jobs):
        left.append(expected.left())
    assert left == [10, 0]


def test_a_run_takes_its_steps_two_validations_and_what_comes_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def timed(context: RunContext, device: str, threads: int | None, scale: Scale) -> Timed:
        seen.append(single_step(context, device, threads, scale=scale))
        return Timed(step=0.5, first=7.0)

    monkeypatch.setattr(autoselect, "single_step", timed)
    given = experiment(steps=30)
    examples = sum(len(targets) for _, targets in RunContext(given).required_data.validation())
    batches = examples / given.batch_size
    assert run_seconds(RunContext(given), Scale(16, 2)) == pytest.approx(7 + 0.5 * (30 + 2 * batches / 3))
    assert seen[0] is not None
    assert 0 < seen[0].step < seen[0].first + 10
