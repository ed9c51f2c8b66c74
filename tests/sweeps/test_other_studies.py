"""Other people's folders and storages are left alone; what cannot be done is said before anything is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mutransfer.errors import RequestError
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Done, Events, Session
from mutransfer.sweeps.storage import own_journal
from mutransfer.sweeps.study import open_queue
from mutransfer.sweeps.tune import tune

from ..helpers.small import Counting, Planted, contents, experiment, octaves, within
from ..helpers.tuned import bowl, refusal, states


def test_a_second_sweep_in_the_folder_is_refused(folder: RunFolder) -> None:
    class Nosy(Planted):
        """Tunes in the folder in which it is itself a trial."""

        said = ""

        def events(self, session: Session) -> Events:
            self.said = refusal(experiment(), folder, executor=Planted(bowl))
            return super().events(session)

    outer = Nosy(bowl)
    tune(experiment(trials=1), folder, executor=outer)
    assert "another process is at work" in outer.said
    assert states(folder) == ["COMPLETE"]


@pytest.mark.parametrize(("best", "end"), [(-9.0, "low"), (-3.0, "high"), (-6.0, None)])
def test_a_best_value_at_the_edge_of_its_range_is_said(best: float, end: str | None, folder: RunFolder) -> None:
    planted = Planted(lambda job: 1 + (octaves(job.recipe) - best) ** 2)
    found = tune(experiment(recipe={"lr": 2**best}), folder, executor=planted)
    assert len(found.warnings) == (end is not None)
    if end is not None:
        assert f"at the {end} end of its range: widen search.lr.{end}." in found.warnings[0]


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"steps": 9}, "steps", "9"),
        ({"seed": 1}, "seed", "1"),
        ({"recipe": {"lr": 0.5}}, "recipe", "0.5"),
        ({"search": {"beta2": {"low": 0.9, "high": 0.99}}}, "search", "beta2"),
        ({"pruner": "median"}, "pruner", "median"),
    ],
)
def test_another_experiment_in_the_folder_is_refused(
    change: dict[str, Any], key: str, value: str, folder: RunFolder
) -> None:
    tune(experiment(), folder, executor=Planted(bowl))
    before = contents(folder.path)
    sentence = refusal(experiment(**change), folder, executor=Planted(bowl))
    assert f"holds a study with {key} = " in sentence
    assert value in sentence
    assert "another --out" in sentence
    assert contents(folder.path) == before


def test_another_data_hash_in_the_folder_is_refused(folder: RunFolder) -> None:
    tune(experiment(), folder, executor=Planted(bowl))
    noted = json.loads(folder.environment.read_text())
    folder.environment.write_text(json.dumps(noted | {"data_sha256": "0123456789abcdef"}))
    before = contents(folder.path)
    sentence = refusal(experiment(trials=5), folder, executor=Planted(bowl))
    assert "0123456789ab…" in sentence
    assert noted["data_sha256"][:12] in sentence
    assert contents(folder.path) == before


def test_a_damaged_experiment_in_the_folder_is_named(folder: RunFolder) -> None:
    folder.make().experiment.write_text("- a list")
    assert str(folder.experiment) in refusal(experiment(), folder, executor=Planted(bowl))
    assert list(contents(folder.path)) == ["experiment.yaml"]


def test_an_experiment_that_leaves_defaults_out_is_the_same_one(folder: RunFolder) -> None:
    """As `mutransfer init RUN` writes it, tuned with --out RUN."""
    folder.make().experiment.write_text("model: mlp\ndata: digits\nproxy: {width: 8}\nsteps: 8\ntrials: 2\n")
    tune(Experiment.load(folder.experiment), folder, executor=Planted(bowl))
    assert len(states(folder)) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "transformer", "data": "markov", "sequence_length": 8, "proxy": {"width": 40}}, "multiple of the head"),
        (
            {"model": "transformer", "data": "markov", "sequence_length": 8, "proxy": {"width": 40}, "base": {"width": 16}},
            "multiple of the head",
        ),
        ({"model": "transformer"}, "reads tokens"),
        ({"model": "mlpp"}, "did you mean 'mlp'?"),
        ({"options": {"colour": "red"}}, "does not take these options"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_before_anything_is_written(
    change: dict[str, Any], said: str, folder: RunFolder
) -> None:
    with pytest.raises(RequestError, match=said):
        tune(experiment(**change), folder)
    assert not folder.path.exists()


def test_other_storages_resume_too(tmp_path: Path) -> None:
    folder, url = RunFolder(tmp_path / "run"), f"sqlite:///{tmp_path / 'study.db'}"
    tune(experiment(trials=2), folder, storage=url, name="mine", executor=Planted(bowl))
    found = tune(experiment(), folder, storage=url, name="mine", executor=(counting := Counting(Planted(bowl))))
    assert len(counting.jobs) == 2
    assert found.trials["state"].tolist() == ["COMPLETE"] * 4
    assert not folder.journal.exists()


def test_a_storage_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'none' / 'study.db'}"
    assert url in refusal(experiment(), RunFolder(tmp_path / "run"), storage=url, executor=Planted(bowl))


def test_a_journal_that_is_none_is_named(folder: RunFolder) -> None:
    tune(experiment(trials=1), folder, executor=Planted(bowl))
    folder.journal.write_text("what is this\nand this\n")
    assert str(folder.journal) in refusal(experiment(), folder, executor=Planted(bowl))


def test_opening_a_study_says_nothing(folder: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    open_queue(experiment(), own_journal(folder.make()), None, "worker")
    assert capfd.readouterr() == ("", "")


def test_one_storage_does_not_mix_experiments(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    tune(experiment(trials=2), RunFolder(tmp_path / "one"), storage=url, executor=Planted(bowl))
    other = experiment(trials=2, steps=9)
    assert "steps = 8" in refusal(other, RunFolder(tmp_path / "two"), storage=url, executor=Planted(bowl))
    assert len(tune(other, RunFolder(tmp_path / "two"), storage=url, name="two", executor=Planted(bowl)).trials) == 2


def test_a_run_folder_holds_one_study(folder: RunFolder) -> None:
    tune(experiment(trials=2), folder, executor=Planted(bowl))
    assert "--study" in refusal(experiment(trials=2), folder, name="second", executor=Planted(bowl))
    assert len(tune(experiment(trials=3), folder, executor=Planted(bowl)).trials) == 3


def test_a_loss_that_is_no_number_before_training_ends_the_sweep_in_words(folder: RunFolder) -> None:
    class Lost(Planted):
        def events(self, session: Session) -> Events:
            for event in super().events(session):
                if isinstance(event, Done):
                    event = Done(event.job, replace(event.outcome, start=math.nan, loss=math.nan))
                yield event

    with within(60):
        assert "diverged" in refusal(experiment(trials=3), folder, executor=Lost(bowl))
    assert states(folder) == ["COMPLETE"] * 3


@pytest.mark.parametrize(
    ("search", "changes"),
    [
        ({"momentum": {"low": 0.1, "high": 0.9}}, {}),
        ({"beta2": {"low": 0.9, "high": 0.99}}, {"optimizer": "sgd"}),
        ({"cooldown": {"low": 0.1, "high": 0.5}}, {}),
    ],
)
def test_a_search_that_changes_nothing_is_refused(search: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="has no effect"):
        experiment(search=search, **changes)
    experiment(search={"cooldown": {"low": 0.1, "high": 0.5}, "schedule": {"choices": ["wsd", "cosine"]}})
