"""Fused jobs end as the same jobs one by one: outcomes, reports, stops, divergence, scales, in any number at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe, Scale
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment, with_values
from mutransfer.sweeps.jobs import Executor, Job, RunContext, SequentialExecutor, run_jobs
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.vectorized.batch_training import refusal
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

from ...helpers.small import each, experiment

ParsedReport = list[tuple[Any, int, float]]


def jobs(asked: Experiment, count: int = 9, **more: Any) -> Iterator[Job]:
    """Some that are far too fast, one that is lost at once, and no two alike."""
    for k in range(count):
        lr = 1e30 if k == 4 else 2.0 ** (k - 9)
        values = {"lr": lr, "weight_decay": 0.1 * k, "clip": None if k % 2 else 1.0, "warmup": 0.1 * (k % 3), **more}
        recipe = with_values(asked.recipe, values)
        yield Job(k, asked.proxy_scale, "mup", recipe, seed=k % 3, rungs=(3, 6))


def done(
    executor: Executor, asked: Experiment, todo: Any, worst: float = math.inf
) -> tuple[dict[Any, Outcome], ParsedReport]:
    told: ParsedReport = []

    def report(job: Job, step: int, loss: float) -> bool:
        told.append((job.key, step, loss))
        return loss > worst

    return {job.key: outcome for job, outcome in run_jobs(executor, RunContext(asked), todo, each(report))}, told


def same(ours: dict[Any, Outcome], theirs: dict[Any, Outcome], rel: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for key, outcome in theirs.items():
        assert (ours[key].steps, ours[key].stopped, ours[key].diverged) == (
            outcome.steps,
            outcome.stopped,
            outcome.diverged,
        )
        assert ours[key].start == pytest.approx(outcome.start, rel=rel)
        assert ours[key].loss == pytest.approx(outcome.loss, rel=rel, nan_ok=True)


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_as_one_by_one(count: int) -> None:
    asked = experiment(steps=25)
    ours, told = done(VectorizedExecutor(count), asked, jobs(asked))
    theirs, told_apart = done(SequentialExecutor(), asked, jobs(asked))
    same(ours, theirs)
    assert sorted(each[:2] for each in told) == [each[:2] for each in told_apart]
    assert any(math.isnan(each.loss) for each in theirs.values())
    assert {each.steps for each in theirs.values()} == {3, 25}  # one is lost before its first rung


def test_stopped_jobs_make_room_for_the_next() -> None:
    asked = experiment(steps=8)
    _, told = done(SequentialExecutor(), asked, jobs(asked))
    worst = sorted(loss for _, _, loss in told)[len(told) // 2]
    theirs, _ = done(SequentialExecutor(), asked, jobs(asked), worst)
    assert 2 <= sum(each.stopped for each in theirs.values()) < len(theirs)
    drawn: list[int] = []

    def watched() -> Iterator[Job]:
        for job in jobs(asked):
            drawn.append(job.key)
            yield job

    ended: list[int] = []
    ours = {}
    for job, outcome in run_jobs(
        VectorizedExecutor(3), RunContext(asked), watched(), each(lambda job, step, loss: loss > worst)
    ):
        # One look ahead, to see which scale is next.
        assert len(drawn) - len(ended) <= 4
        ended.append(job.key)
        ours[job.key] = outcome
    same(ours, theirs)
    assert ended != sorted(ended)


def test_reports_come_in_the_order_of_the_jobs() -> None:
    asked = experiment()
    _, told = done(VectorizedExecutor(16), asked, jobs(asked))
    assert [key for key, step, _ in told if step == 3] == [k for k in range(9) if (k, 3) in {each[:2] for each in told}]


def test_widths_one_after_the_other_and_parametrizations_together() -> None:
    asked = experiment(base={"width": 8})
    todo = [
        Job((name, width, lr), Scale(width, 2), name, asked.recipe.with_(lr=lr), seed=0)
        for width in (16, 8)
        for name in ("mup", "sp")
        for lr in (2**-6, 2**-4)
    ]
    same(done(VectorizedExecutor(3), asked, todo)[0], done(SequentialExecutor(), asked, todo)[0])


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_other_optimizers(optimizer: str) -> None:
    asked = experiment(optimizer=optimizer)
    same(
        done(VectorizedExecutor(4), asked, jobs(asked, 4))[0],
        done(SequentialExecutor(), asked, jobs(asked, 4))[0],
        rel=2e-2,
    )


def test_a_whole_study(tmp_path: Path) -> None:
    asked = experiment(pruner="median", trials=14, rungs=3)
    found = tune(asked, RunFolder(tmp_path), executor=VectorizedExecutor(4))
    assert (found.trials["state"].isin(["COMPLETE", "PRUNED"])).sum() == 14
    best = found.trials.loc[found.trials["value"].idxmin()]
    again = done(SequentialExecutor(), asked, [Job(0, asked.proxy_scale, "mup", found.best, asked.seed)])[0][0]
    assert best["value"] == pytest.approx(again.loss, rel=1e-4)


def test_time_is_shared() -> None:
    asked = experiment()
    begun = time.perf_counter()
    outcomes, _ = done(VectorizedExecutor(16), asked, jobs(asked))
    spent = time.perf_counter() - begun
    assert 0 < sum(each.seconds for each in outcomes.values()) < spent


def test_what_cannot_be_fused_runs_one_by_one_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(BRANCHING, encoding="utf-8")
    asked = experiment(model=f"{tmp_path}/own.py:build")
    assert "torch.vmap" in str(refusal(RunContext(asked)))
    same(done(VectorizedExecutor(3), asked, jobs(asked, 3))[0], done(SequentialExecutor(), asked, jobs(asked, 3))[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trials at width 8 run one by one: the model does not run under torch.vmap (")


BRANCHING = """
import torch
from torch import nn


class Branching(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.input, self.readout = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x):
        h = torch.relu(self.input(x.flatten(1)))
        if type(h.detach()) is torch.Tensor and float(h.detach().sum()) < 0:
            h = -h
        return self.readout(h)


def build(width, depth):
    return Branching(width)
"""

COUNTING = '''
import torch
from torch import nn


class Counting(nn.Module):
    """Its output depends on how often it was called, in numbers that are no tensors."""

    def __init__(self, width):
        super().__init__()
        self.input, self.readout, self.calls = nn.Linear(64, width), nn.Linear(width, 10), 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.readout(torch.relu(self.input(x.flatten(1)))) * (1 + self.calls)


def build(width, depth):
    return Counting(width)
'''


def test_a_model_that_changes_beside_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(COUNTING, encoding="utf-8")
    reason = refusal(RunContext(experiment(model=f"{tmp_path}/own.py:build")))
    assert reason is not None
    assert "next to another trial, the model's loss after 3 steps is" in reason


def test_what_an_own_trainer_trains_is_not_fused() -> None:
    assert "own.py:train trains them" in str(refusal(RunContext(experiment(trainer="own.py:train"))))


def test_an_optimizer_without_an_update_is_refused_by_name() -> None:
    reason = refusal(RunContext(experiment(optimizer="adagrad")))
    assert reason == "adagrad has no update of many trials at once (adamw, adam, sgd, muon, muon-match-rms-adamw have)"


def test_dropout_is_fused_though_it_cannot_be_compared(tmp_path: Path) -> None:
    text = BRANCHING.replace("if type(h.detach()) is torch.Tensor and float(h.detach().sum()) < 0:", "if True:")
    text = text.replace("h = -h", "h = torch.nn.functional.dropout(h, 0.5, self.training)")
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    asked = experiment(model=f"{tmp_path}/own.py:build")
    assert refusal(RunContext(asked)) is None
    outcomes, _ = done(VectorizedExecutor(3), asked, jobs(asked, 3))
    assert all(math.isfinite(each.loss) for each in outcomes.values())


def test_bfloat16_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    asked = experiment()
    ours, theirs = (
        done(VectorizedExecutor(4, precision="bfloat16"), asked, jobs(asked, 4))[0],
        done(SequentialExecutor(), asked, jobs(asked, 4))[0],
    )
    same(ours, theirs, rel=3e-2)
    assert any(ours[key].loss != theirs[key].loss for key in ours)


def test_trials_at_one_rung_are_reported_together() -> None:
    """So that halving keeps the best third of a batch, and not whoever reported first."""
    heard: list[list[int]] = []

    def halved(reported: Any) -> list[int]:
        heard.append([one.step for one in reported])
        best = sorted(one.loss for one in reported)[1]
        return [one.job.key for one in reported if one.loss > best]

    asked = experiment(steps=6)
    todo = [Job(k, asked.proxy_scale, "mup", Recipe(lr=2.0 ** -(4 + k), warmup=0.0), 0, (3,)) for k in range(6)]
    outcomes = {job.key: outcome for job, outcome in run_jobs(VectorizedExecutor(6), RunContext(asked), todo, halved)}
    assert heard == [[3] * 6]
    assert sum(outcome.stopped for outcome in outcomes.values()) == 4
    assert max(o.loss for o in outcomes.values() if not o.stopped) < min(o.loss for o in outcomes.values() if o.stopped)


@pytest.mark.slow
def test_compiled_once_for_all_batches_and_studies() -> None:
    asked = experiment(steps=12)
    fused = VectorizedExecutor(3, compile=True)
    theirs = done(SequentialExecutor(), asked, jobs(asked))[0]
    same(done(fused, asked, jobs(asked))[0], theirs)
    (programs,) = fused.programs.values()
    before = dict(programs)
    assert sorted(before) == ["step, clips: True", "validation"]
    assert all(before.values())
    same(done(fused, asked, jobs(asked))[0], theirs)
    assert before == programs
