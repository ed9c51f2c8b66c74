"""A run that was interrupted: its report says how much is done, and concludes nothing from a part or from an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mutransfer.cli.check import begin
from mutransfer.io import read_json, write_json
from mutransfer.recipe import Recipe
from mutransfer.reports import write_report
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS, COORDINATES, TRIALS
from mutransfer.sweeps.jobs import Done, Events, Job, RunContext, Session
from mutransfer.sweeps.results import target_of_run
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.verify import verify_run

from ..helpers.small import Planted, experiment, octaves
from .conftest import MODULES, coordinate_frame
from .test_page import Page

RECIPE = Recipe(lr=2**-6, warmup=0.0)


class Stopped(Planted):
    """Ctrl-C after so many runs."""

    def __init__(self, after: int, loss: Any) -> None:
        super().__init__(loss)
        self.left = after

    def events(self, session: Session) -> Events:
        for event in super().events(session):
            if isinstance(event, Done):
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
            yield event


def basin(job: Job) -> float:
    """One optimum at all widths under µP, and one that moves under SP."""
    moved = job.scale.width // 16 if job.parametrization == "sp" else 0
    return 1 + (octaves(job.recipe) + 6 + moved) ** 2 / 100 + job.seed / 1000


def searched(job: Job) -> float:
    return 1 + (octaves(job.recipe) + 6) ** 2 / 100 + job.seed / 10


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run").make()
    experiment().save(made.experiment)
    RECIPE.save(made.best)
    return made


def verify(folder: RunFolder, after: int = 10**6, seeds: int = 3) -> None:
    try:
        verify_run(RunContext(experiment()), RECIPE, folder, (8, 16), Stopped(after, basin), seeds=seeds, control="sp")
    except KeyboardInterrupt:
        assert after < 10**6


def page(folder: RunFolder) -> str:
    return Page(write_report(folder.path)).text.replace("\u00a0", " ")


CONCLUSIONS = (
    "drift of the best lr",
    "regret of the transferred lr",
    "optimum of width",
    "own best lr",
    "diverged",
    "Pass",
)


def test_thirteen_of_sixty_runs(folder: RunFolder) -> None:
    verify(folder, 13)
    assert len(BASINS.read(folder.basins)) == 13
    text = page(folder)
    command = f"mutransfer verify {folder.path} --widths 8,16 --seeds 3 --step 1.0 --control sp"
    assert "Learning-rate transfer: unfinished. 13 of 60 runs are done: continue with " + command in text
    assert "No verdict yet" in text
    assert [words for words in CONCLUSIONS if words in text] == []
    assert "Learning-rate basins across widths" in text  # what is there is drawn
    assert not (folder.path / "optima.csv").exists()
    assert not (folder.path / "plots" / "wider.png").exists()


@pytest.mark.extended
def test_when_all_runs_are_done_nothing_is_called_unfinished(folder: RunFolder) -> None:
    verify(folder, 13)
    page(folder)
    verify(folder)
    text = page(folder)
    assert "Learning-rate transfer: unfinished" not in text
    assert "drift of the best lr" in text
    assert folder.progress("verify")["planned"] == len(BASINS.read(folder.basins))


@pytest.mark.extended
def test_an_earlier_verdict_does_not_stand_beside_an_unfinished_one(folder: RunFolder) -> None:
    verify(folder, seeds=2)
    assert "drift of the best lr" in page(folder)
    verify(folder, 5)
    assert not folder.verify.exists()
    planned = folder.progress("verify")["planned"]
    text = page(folder)
    assert f"unfinished. {len(BASINS.read(folder.basins))} of {planned} runs are done" in text
    assert "drift of the best lr" not in text
    assert "fewer than 3 losses" in text
    # Nor do what it drew and the tables that it made.
    assert not (folder.path / "plots" / "wider.png").exists()
    assert not (folder.path / "optima.csv").exists()


@pytest.mark.extended
def test_a_verdict_on_another_recipe_is_not_shown(folder: RunFolder) -> None:
    verify(folder)
    target = target_of_run(folder, 32)
    target.save(folder.target)
    assert "Expected loss of one run at width 32" in page(folder)
    RECIPE.with_(lr=2**-5).save(folder.best)
    text = page(folder)
    assert f"The verified recipe is not the one in best.json: run mutransfer verify {folder.path} ." in text
    for words in (
        "drift of the best lr",
        "Expected loss",
        "Learning-rate transfer: pass",
        "At the widest width Comparison",
    ):
        assert words not in text
    assert "target.json was made from another recipe" in text


@pytest.mark.extended
def test_a_verification_later_than_the_target_takes_its_warning_back(folder: RunFolder) -> None:
    target_of_run(folder, 32).save(folder.target)
    assert any("never verified" in text for text in read_json(folder.target, "a target")["warnings"])
    verify(folder)
    assert "never verified" not in page(folder)


def test_an_interrupted_search(folder: RunFolder) -> None:
    folder.best.unlink()
    folder.experiment.unlink()
    asked = experiment(repeats={"top": 2, "seeds": 3})
    with pytest.raises(KeyboardInterrupt):
        tune(asked, folder, executor=Stopped(3, searched))
    text = page(folder)
    assert "Search: unfinished. 3 of 4 trials are done" in text
    assert f"continue with mutransfer tune {folder.experiment} --out {folder.path} ." in text
    assert "of the 3 trials so far" in text
    with pytest.raises(KeyboardInterrupt):
        tune(asked, folder, executor=Stopped(2, searched))
    assert "Search: unfinished. 1 of 4 repeats of the best trials with other seeds are done" in page(folder)
    found = tune(asked, folder, executor=Planted(searched))
    text = page(folder)
    assert "Search: unfinished" not in text
    assert f"proxy loss of the recipe {found.value:.4g} mean over 3 seeds" in text
    # More trials, interrupted: what the shorter search found is not shown beside them.
    verify_run(RunContext(asked), found.best, folder, (8, 16), Planted(basin), seeds=3, control=None)
    with pytest.raises(KeyboardInterrupt):
        tune(experiment(repeats={"top": 2, "seeds": 3}, trials=8), folder, executor=Stopped(2, searched))
    text = page(folder)
    assert "Search: unfinished. 6 of 8 trials are done" in text
    assert "differences from the defaults" not in text
    assert "drift of the best lr" not in text


def test_an_interrupted_trial_is_neither_lost_nor_drawn(folder: RunFolder, trials: Any) -> None:
    trials.loc[trials["number"] == 9, ["state", "value", "diverged", "steps", "flops", "seconds"]] = [
        "FAIL", float("nan"), False, float("nan"), float("nan"), float("nan"),
    ]  # fmt: skip
    TRIALS.write(trials, folder.trials)
    assert "Not drawn: 1 not finished yet and 1 interrupted and retried." in page(folder)


def test_an_interrupted_check(folder: RunFolder) -> None:
    COORDINATES.write(coordinate_frame(MODULES), folder.coordinates)
    write_json(folder.check, {"verdict": "pass", "cause": None, "parametrization": "mup"})
    assert "Coordinate check: pass" in page(folder)
    begin(folder, experiment().subject(), {"--widths": "64,128", "--lr": None})
    text = page(folder)
    assert "Coordinate check: unfinished. It did not finish: continue with " in text
    assert f"mutransfer check {folder.experiment} --out {folder.path} --widths 64,128 ." in text
    assert "Coordinate check: pass" not in text
    assert "Slopes" not in text


@pytest.mark.extended
def test_a_check_of_something_else_is_not_this_runs(folder: RunFolder) -> None:
    COORDINATES.write(coordinate_frame(MODULES), folder.coordinates)
    begin(folder, {**experiment().subject(), "optimizer": "lion"}, {})
    folder.note_progress("check", **{**folder.progress("check"), "ended": True})
    write_json(folder.check, {"verdict": "pass", "cause": None, "parametrization": "mup"})
    text = page(folder)
    assert "Coordinate check: pass" not in text
    assert "had another optimizer than this run" in text
