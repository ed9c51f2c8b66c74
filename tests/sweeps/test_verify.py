"""Basins: extended until bracketed, never measured twice, and the same whatever does the runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mutransfer.basins import judge, optima
from mutransfer.errors import RequestError
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS
from mutransfer.sweeps.executors import executor_for
from mutransfer.sweeps.jobs import Job, RunContext, SequentialExecutor, run_jobs
from mutransfer.sweeps.processes import ProcessExecutor
from mutransfer.sweeps.vectorized.batch_training import VectorizedTraining
from mutransfer.sweeps.vectorized.executor import Checkpoints, SlotBatch, VectorizedExecutor
from mutransfer.sweeps.verify import LIMIT, REACH, basins

from ..helpers.small import Counting, Failing, Planted, children, contents, experiment, octaves

RECIPE = Recipe(lr=2**-6, warmup=0.0)
PER_WIDTH = 2 * REACH + 1


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run").make()


def parabola(offsets: dict[int, float]) -> Planted:
    """Per width, a loss with its optimum at the recipe's learning rate plus so many octaves."""
    return Planted(lambda job: 1 + (octaves(job.recipe) + 6 - offsets[job.scale.width]) ** 2 / 100 + job.seed / 1000)


def measure(folder: RunFolder, executor: Any, widths: tuple[int, ...] = (8, 16), **options: Any) -> pd.DataFrame:
    options = {"recipe": RECIPE, "seeds": 2, **options}
    return basins(RunContext(experiment()), options.pop("recipe"), widths, folder=folder, executor=executor, **options)


def points(frame: pd.DataFrame, width: int) -> list[float]:
    return sorted(set(frame.loc[frame["width"] == width, "log2_lr"]))


def test_a_bracketed_optimum_needs_no_more_than_its_neighbours(folder: RunFolder) -> None:
    counting = Counting(parabola({8: 0, 16: 0.2}))
    frame = measure(folder, counting)
    assert points(frame, 8) == points(frame, 16) == [-8, -7, -6, -5, -4]
    assert len(counting.jobs) == len(frame) == 2 * 2 * PER_WIDTH
    assert {job.seed for job in counting.jobs} == {0, 1}
    assert all(job.recipe.with_(lr=RECIPE.lr) == RECIPE for job in counting.jobs)
    assert {(job.scale.width, job.scale.depth) for job in counting.jobs} == {(8, 2), (16, 2)}
    pd.testing.assert_frame_equal(BASINS.read(folder.basins), frame)


def test_another_parametrizations_grid_is_laid_where_its_best_is_likely(folder: RunFolder) -> None:
    planted = Planted(
        lambda job: (
            1 + (octaves(job.recipe) + 6 + (job.parametrization == "sp") * math.log2(job.scale.width / 8)) ** 2 / 100
        )
    )
    frame = measure(folder, planted, widths=(8, 16, 128), parametrizations=("mup", "sp"))
    found = {(name, width): points(rows, width) for (name, width), rows in frame.groupby(["parametrization", "width"])}
    around = [-8.0, -7.0, -6.0, -5.0, -4.0]
    assert found["mup", 8] == found["mup", 16] == found["mup", 128] == found["sp", 8] == around
    assert found["sp", 16] == [-9, -8, -7, -6, -5]
    assert found["sp", 128] == [-12, -11, -10, -9, -8, -6]  # with the transferred learning rate, whose price is asked


def test_runs_of_equal_plans_are_done_once(folder: RunFolder) -> None:
    """At the base's width no parametrization scales anything: what is trained there is the same model."""
    counting = Counting(SequentialExecutor())
    frame = measure(folder, counting, parametrizations=("mup", "sp"))
    done = {(job.parametrization, job.scale.width) for job in counting.jobs}
    assert done == {("mup", 8), ("mup", 16), ("sp", 16)}
    mup, sp = (frame[frame["parametrization"].eq(name) & frame["width"].eq(8)] for name in ("mup", "sp"))
    key = ["log2_lr", "seed"]
    assert mup.set_index(key)["loss"].sort_index().equals(sp.set_index(key)["loss"].sort_index())
    assert (mup["flops"] > 0).all()
    assert (sp["flops"] == 0).all()
    alone = measure(RunFolder(folder.path.with_name("alone")).make(), SequentialExecutor(), parametrizations=("sp",))
    by_itself = alone[alone["width"].eq(8)].set_index(key)["loss"]
    assert sp.set_index(key)["loss"].sort_index().equals(by_itself.sort_index())
    again = Counting()
    pd.testing.assert_frame_equal(measure(folder, again, parametrizations=("mup", "sp")), frame)
    assert again.jobs == []


@pytest.mark.parametrize("shift", [4.1, -4.1])
def test_a_grid_follows_its_optimum_until_it_is_bracketed(shift: float, folder: RunFolder) -> None:
    frame = measure(folder, parabola({8: 0, 16: shift}))
    assert points(frame, 8) == [-8, -7, -6, -5, -4]
    best = -6 + round(shift)
    assert {best - 2, best - 1, best, best + 1, best + 2} <= set(points(frame, 16))
    assert len(points(frame, 16)) == PER_WIDTH + 4
    found = optima(frame).set_index("width")
    assert found.loc[16, "drift"] == pytest.approx(shift)
    assert not found["at_edge"].any()


def test_a_loss_without_an_optimum_is_given_up(folder: RunFolder) -> None:
    frame = measure(folder, Planted(lambda job: 5 + octaves(job.recipe) / 100), seeds=1)
    assert LIMIT <= len(points(frame, 8)) <= LIMIT + REACH
    assert optima(frame)["at_edge"].all()


def test_finer_steps(folder: RunFolder) -> None:
    frame = measure(folder, parabola({8: 0, 16: 0}), step=0.5)
    assert points(frame, 8) == [-7, -6.5, -6, -5.5, -5]
    again = measure(folder, counting := Counting(parabola({8: 0, 16: 0})), step=1.0)
    assert points(again, 8) == [-8, -7, -6, -5, -4]
    assert len(counting.jobs) == len(again)  # another grid answers another question


def test_diverged_runs_are_kept_and_avoided(folder: RunFolder) -> None:
    frame = measure(folder, Planted(lambda job: math.inf if octaves(job.recipe) > -6.5 else 2.0 - job.key[3] / 10))
    lost = frame[frame["log2_lr"] > -6.5]
    assert lost["diverged"].all()
    assert lost["loss"].isna().all()
    # The cell between the best rate and the one that diverges is halved until it is an eighth of an octave.
    assert set(frame.loc[~frame["diverged"], "log2_lr"]) == {-9, -8, -7, -6.5}
    assert set(lost["log2_lr"]) == {-6.375, -6.25, -6, -5, -4}


def test_a_cliff_is_resolved_until_it_decides_and_goes_on_where_it_stopped(folder: RunFolder) -> None:
    """The optimum is right beside divergence at both widths, 0.9 octaves apart: neither seen on the grid nor a parabola."""
    edges = {8: -5.95, 16: -5.05}
    planted = Planted(
        lambda job: math.inf if octaves(job.recipe) > edges[job.scale.width]
        else 2.5 - 0.1 * (octaves(job.recipe) + 6) + 0.001 * math.sin(1e4 * octaves(job.recipe) + 7 * job.seed)
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        measure(folder, Failing(34, ZeroDivisionError(), planted), seeds=3)
    frame = measure(folder, rest := Counting(planted), seeds=3)
    assert len(rest.jobs) == len(frame) - 34
    assert measure(folder, idle := Counting(planted), seeds=3).equals(frame)
    assert idle.jobs == []
    found = optima(frame, -6.0).set_index("width")
    assert (found["cell"] == 1 / 8).all()
    assert found.loc[16, "drift_low"] <= 0.9 <= found.loc[16, "drift_high"]
    assert found.loc[16, "drift_high"] - found.loc[16, "drift_low"] < 0.5
    assert judge(found.reset_index())[0] == "fail"


def test_a_jump_of_the_loss_is_refined_like_divergence(folder: RunFolder) -> None:
    frame = measure(
        folder, Planted(lambda job: 8.0 if octaves(job.recipe) > -5.7 else 2.5 - 0.1 * (octaves(job.recipe) + 6))
    )
    assert points(frame, 8) == [-8, -7, -6, -5.75, -5.625, -5.5, -5, -4]


def test_what_is_measured_is_not_measured_again(folder: RunFolder) -> None:
    planted = parabola({8: 0, 16: 0, 32: 0})
    first = measure(folder, planted)
    again = measure(folder, idle := Counting(planted))
    assert idle.jobs == []
    pd.testing.assert_frame_equal(again, first)

    measure(folder, wider := Counting(planted), widths=(8, 16, 32))
    assert {job.scale.width for job in wider.jobs} == {32}
    more = measure(folder, seeded := Counting(planted), widths=(8, 16, 32), seeds=3)
    assert {job.seed for job in seeded.jobs} == {2}
    assert len(more) == 3 * 3 * PER_WIDTH
    measure(folder, control := Counting(planted), parametrizations=("mup", "sp"))
    assert {job.parametrization for job in control.jobs} == {"sp"}
    # Asked for less, only that is returned, and nothing is forgotten.
    pd.testing.assert_frame_equal(measure(folder, idle, seeds=2).reset_index(drop=True), first)
    assert len(BASINS.read(folder.basins)) == len(more) + 2 * (2 * PER_WIDTH + 1)  # SP's is first laid an octave lower
    assert idle.jobs == []


def test_another_recipe_starts_again(folder: RunFolder) -> None:
    planted = parabola({8: 0, 16: 0})
    measure(folder, planted)
    other = RECIPE.with_(alpha_output=2.0)
    frame = measure(folder, counting := Counting(planted), recipe=other)
    assert len(counting.jobs) == len(frame) == len(BASINS.read(folder.basins))
    assert all(job.recipe.alpha_output == 2 for job in counting.jobs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_keeps_what_is_done(error: type[BaseException], folder: RunFolder) -> None:
    planted = parabola({8: 0, 16: 0})
    whole = measure(RunFolder(folder.path / "other").make(), planted)
    with pytest.raises(error):
        measure(folder, Failing(7, error(), planted))
    assert len(BASINS.read(folder.basins)) == 7
    frame = measure(folder, rest := Counting(planted))
    assert len(rest.jobs) == len(whole) - 7
    pd.testing.assert_frame_equal(frame, whole)


@pytest.fixture
def advanced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], int, int]]:
    """Parametrizations, width and number of steps of each call of a vectorized training's `advance`."""
    found: list[tuple[set[str], int, int]] = []
    advance = VectorizedTraining.advance

    def recorded(self: VectorizedTraining, count: int) -> None:
        advance(self, count)
        plans = [slot.plan for slot in self.slots]
        found.append(({plan.parametrization for plan in plans}, plans[0].scale.width, count))

    monkeypatch.setattr(VectorizedTraining, "advance", recorded)
    return found


def test_each_width_is_one_batch_of_both_parametrizations(
    tmp_path: Path, advanced: list[tuple[set[str], int, int]]
) -> None:
    apart = measure(RunFolder(tmp_path / "apart").make(), SequentialExecutor(), parametrizations=("mup", "sp"))
    with executor_for(experiment(), "fused", 40, per_scale=True) as executor:
        advanced.clear()
        fused = measure(RunFolder(tmp_path / "fused").make(), executor, parametrizations=("mup", "sp"))
    batches = [(names, width) for names, width, _ in advanced if names == {"mup", "sp"} or width == 8]
    assert batches[0] == ({"mup", "sp"}, 16)
    assert batches[-1] == ({"mup"}, 8)  # both plans are the same at the base
    key = ["parametrization", "width", "seed", "log2_lr"]
    ours, theirs = (frame.set_index(key)["loss"].sort_index() for frame in (fused, apart))
    pd.testing.assert_series_equal(ours, theirs, rtol=1e-4)


@pytest.mark.extended
def test_an_interrupted_batch_of_runs_goes_on_inside_of_them(
    folder: RunFolder, advanced: list[tuple[set[str], int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, steps = RunContext(experiment(steps=60)), 60
    executor = VectorizedExecutor(40, checkpoints=Checkpoints(folder.path / "checkpoints", share=1))
    go = SlotBatch.go

    def ended(self: SlotBatch) -> dict[int, float]:
        if self.live[0].slot.step == 50:
            raise KeyboardInterrupt
        return go(self)

    monkeypatch.setattr(SlotBatch, "go", ended)
    with pytest.raises(KeyboardInterrupt):
        basins(context, RECIPE, (8, 16), folder=folder, executor=executor, seeds=2)
    monkeypatch.setattr(SlotBatch, "go", go)
    advanced.clear()
    again = VectorizedExecutor(40, checkpoints=Checkpoints(folder.path / "checkpoints", share=1))
    basins(context, RECIPE, (8, 16), folder=folder, executor=again, seeds=2)
    assert next(count for _, width, count in advanced if count > 3) == steps - 50


@pytest.mark.extended
def test_processes_and_one_by_one_train_the_same(tmp_path: Path) -> None:
    given = experiment(steps=5)
    jobs = [
        Job((name, width, seed), given.proxy_scale.with_(width=width), name, RECIPE, seed)
        for name in ("mup", "sp")
        for width in (8, 16)
        for seed in (0, 1)
    ]
    alone = {job.key: outcome for job, outcome in run_jobs(SequentialExecutor(), RunContext(given), jobs)}
    before = children()
    with ProcessExecutor(2) as executor:
        beside = {job.key: outcome for job, outcome in run_jobs(executor, RunContext(given), jobs)}
        with pytest.raises(RequestError, match="unknown parametrization"):
            list(run_jobs(executor, RunContext(given), [Job("wrong", given.proxy_scale, "nup", RECIPE, 0)]))
    assert beside.keys() == alone.keys()
    for key, outcome in alone.items():
        assert beside[key].loss == pytest.approx(outcome.loss, rel=1e-6)
        assert beside[key].start == pytest.approx(outcome.start, rel=1e-6)
    assert len({outcome.loss for outcome in alone.values()}) >= 6  # else nothing is compared
    assert children() == before


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {"widths": (8,)}, "at least two widths"),
        ({}, {"widths": (8, 8)}, "at least two widths"),
        ({}, {"widths": ()}, "at least two widths"),
        ({}, {"parametrizations": ("mup", "spp")}, "did you mean 'sp'?"),
        (
            {"model": "transformer", "data": "markov", "sequence_length": 8, "proxy": {"width": 16, "depth": 1}},
            {"widths": (16, 40)},
            "width 40 is not a multiple",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(
    change: dict[str, Any], options: dict[str, Any], said: str, folder: RunFolder
) -> None:
    measure(folder, parabola({8: 0, 16: 0}))
    before = contents(folder.path)
    settings = {"widths": (8, 16), **options}
    with pytest.raises(RequestError, match=said):
        basins(
            RunContext(experiment(**change)),
            RECIPE.with_(lr=0.5),
            folder=folder,
            executor=SequentialExecutor(),
            **settings,
        )
    assert contents(folder.path) == before


def test_another_data_hash_in_the_folder_is_refused(folder: RunFolder) -> None:
    measure(folder, parabola({8: 0, 16: 0}))
    noted = json.loads(folder.environment.read_text())
    folder.environment.write_text(json.dumps(noted | {"data_sha256": "0123456789abcdef"}))
    before = contents(folder.path)
    with pytest.raises(RequestError, match="0123456789ab…"):
        measure(folder, parabola({8: 0, 16: 0}), recipe=RECIPE.with_(lr=0.5))
    assert contents(folder.path) == before
