"""Tuning: exact totals, whatever interrupts them; divergence that is told and kept; other people's folders left alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from mutransfer.errors import RequestError
from mutransfer.frames import TRIALS
from mutransfer.recipe import Recipe
from mutransfer.runs import RunFolder
from mutransfer.scale import Scale
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, OneByOne
from mutransfer.sweeps.storages import own_journal
from mutransfer.sweeps.study import open_study
from mutransfer.sweeps.tuning import Tuned, tune

from .small import Counting, Failing, Planted, contents, each, experiment, journal, octaves, within

# From lr 4 on everything overflows or ends above its start; at the recipe's own 2^-6 it learns.
WILD = {"lr": {"low": 2**-9, "high": 2.0**40, "log": True}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def bowl(job: Job) -> float:
    """A loss with its optimum at log2 lr = −5."""
    return 1 + (octaves(job.recipe) + 5) ** 2 / 10


def states(folder: RunFolder) -> list[str]:
    return [trial.state.name for trial in journal(folder).trials]


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(RequestError) as caught:
        tune(*args, **kwargs)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def assert_agrees(found: Tuned, folder: RunFolder) -> None:
    """What is returned, what the journal holds and what the folder's files say are the same."""
    trials = TRIALS.read(folder.trials)
    assert trials["state"].tolist() == states(folder) == found.trials["state"].tolist()
    assert trials["number"].tolist() == list(range(len(trials)))
    assert Recipe.load(folder.best) == found.best
    chosen = trials[(trials["state"] == "COMPLETE") & ~trials["diverged"]]
    assert found.value == chosen["value"].min()


def test_a_total_is_a_total(folder: RunFolder) -> None:
    counting, seen = Counting(), []
    found = tune(experiment(), folder, executor=counting, progress=lambda *at: seen.append(at[:2]))
    assert [job.key for job in counting.jobs] == [0, 1, 2, 3]
    assert states(folder) == ["COMPLETE"] * 4
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert_agrees(found, folder)

    before = folder.trials.read_bytes()
    again = tune(experiment(), folder, executor=(idle := Counting()))
    assert idle.jobs == []
    assert folder.trials.read_bytes() == before
    assert (again.best, again.value, again.default) == (found.best, found.value, found.default)

    more = tune(experiment(trials=6), folder, executor=(adding := Counting()))
    assert [job.key for job in adding.jobs] == [4, 5]
    assert more.trials["value"].tolist()[:4] == found.trials["value"].tolist()
    assert more.value <= found.value
    assert_agrees(more, folder)


def test_fewer_than_there_are_adds_nothing_and_ends(folder: RunFolder) -> None:
    tune(experiment(), folder, executor=Planted(bowl))
    with within(20):
        found = tune(experiment(trials=2), folder, executor=(idle := Counting(Planted(bowl))))
    assert idle.jobs == []
    assert len(found.trials) == 4


def test_the_first_trial_is_the_recipe_to_beat(folder: RunFolder) -> None:
    given = experiment(
        recipe={"lr": 2**-6, "warmup": 0.0, "betas": [0.8, 0.99], "schedule": "linear"},
        search={
            "lr": {"low": 2**-9, "high": 2**-3, "log": True},
            "beta2": {"low": 0.9, "high": 0.999},
            "schedule": {"choices": ["cosine", "linear"]},
        },
    )
    found = tune(given, folder, executor=(counting := Counting(Planted(bowl))))
    assert counting.jobs[0].recipe == given.recipe
    assert counting.jobs[0].scale == Scale(8, 2)
    assert found.default == pytest.approx(1.1)
    assert set(found.params) == {"lr", "beta2", "schedule"}
    assert found.best.betas == (0.8, found.params["beta2"])


def test_a_recipe_outside_the_ranges_is_not_tried(folder: RunFolder) -> None:
    given = experiment(recipe={"lr": 2**-12})
    found = tune(given, folder, executor=(counting := Counting(Planted(bowl))))
    assert found.default is None
    assert all(job.recipe.lr >= 2**-9 for job in counting.jobs)


def test_divergence_is_told_kept_and_never_chosen(folder: RunFolder) -> None:
    found = tune(experiment(search=WILD, sampler="random", trials=8), folder)
    diverged = found.trials[found.trials["diverged"]]
    assert 1 <= len(diverged) < 8
    assert (diverged["state"] == "COMPLETE").all()
    assert (diverged["lr"] > 2**-6).all()
    told = {trial.number: trial.value for trial in journal(folder).trials}
    outcomes = {trial.number: trial.user_attrs["outcome"] for trial in journal(folder).trials}
    for number in diverged["number"]:
        assert told[number] == 2 * outcomes[number]["start"]
        assert told[number] > max(value for other, value in told.items() if not outcomes[other]["diverged"])
    assert found.best.lr < 4
    assert found.value < 2.4
    # A loss that is not finite stays missing, rather than being told as the penalty.
    overflowed = found.trials[found.trials["lr"] > 2**30]
    assert len(overflowed)
    assert (overflowed["value"].isna() | (overflowed["value"] > 100)).all()
    assert_agrees(found, folder)


def test_a_loss_that_is_no_number_is_missing_in_the_table(folder: RunFolder) -> None:
    found = tune(experiment(), folder, executor=Planted(lambda job: math.nan if job.key == 1 else bowl(job)))
    assert found.trials["value"].isna().tolist() == [False, True, False, False]
    assert found.trials["diverged"].tolist() == [False, True, False, False]
    assert journal(folder).trials[1].value == 20  # twice the start


def test_a_recipe_below_its_start_only_by_diverging_is_no_best(folder: RunFolder) -> None:
    """Above its start, though finite: told as the penalty, not as its own loss."""
    found = tune(experiment(), folder, executor=Planted(lambda job: 11.0 if job.key == 0 else 9.0))
    assert found.trials["diverged"].tolist() == [True, False, False, False]
    assert found.value == 9.0
    assert found.default == 11.0


def test_all_diverged_is_said(folder: RunFolder) -> None:
    sentence = refusal(experiment(), folder, executor=Planted(lambda job: math.inf))
    assert "all 4 trials diverged" in sentence
    assert "lower search.lr" in sentence
    assert TRIALS.read(folder.trials)["diverged"].all()
    assert not folder.best.exists()


@pytest.mark.parametrize("tail", [b'{"op_code":4,"worker_id":"0', b"{", b'{"op_code":4}'])
def test_a_torn_journal_heals(tail: bytes, folder: RunFolder) -> None:
    tune(experiment(trials=2), folder, executor=Planted(bowl))
    whole = folder.journal.read_bytes()
    folder.journal.write_bytes(whole + tail)
    found = tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder) == ["COMPLETE"] * 4
    assert folder.journal.read_bytes().startswith(whole + b"{")
    assert_agrees(found, folder)


def test_a_lock_that_a_killed_process_left_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, as on the command line: Optuna's link then points nowhere, and it would wait for ever."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("run"))
    tune(experiment(trials=2), folder, executor=Planted(bowl))
    (tmp_path / "run" / "study.journal.lock").symlink_to("run/study.journal")
    with within(20):
        tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder) == ["COMPLETE"] * 4


def test_what_a_killed_process_had_begun_is_done_again(folder: RunFolder) -> None:
    tune(experiment(trials=2), folder, executor=Planted(bowl))
    space = {"lr": optuna.distributions.FloatDistribution(2**-9, 2**-3, log=True)}
    zombie = journal(folder).ask(fixed_distributions=space)
    assert states(folder) == ["COMPLETE", "COMPLETE", "RUNNING"]
    found = tune(experiment(), folder, executor=(counting := Counting(Planted(bowl))))
    assert states(folder) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert counting.jobs[0].recipe.lr == zombie.params["lr"]
    assert_agrees(found, folder)


def test_an_exception_gives_the_trial_back(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError):
        tune(experiment(), folder, executor=Failing(2, ZeroDivisionError(), Planted(bowl)))
    assert states(folder) == ["COMPLETE", "COMPLETE", "WAITING", "FAIL"] or states(folder) == [
        "COMPLETE", "COMPLETE", "FAIL", "WAITING",
    ]  # fmt: skip
    lost = next(trial.params for trial in journal(folder).trials if trial.state is TrialState.FAIL)
    found = tune(experiment(), folder, executor=(counting := Counting(Planted(bowl))))
    assert sorted(states(folder)) == ["COMPLETE"] * 4 + ["FAIL"]
    assert counting.jobs[0].recipe.lr == lost["lr"]
    assert len(counting.jobs) == 2
    assert_agrees(found, folder)


def test_an_interrupted_default_is_still_the_default(folder: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(experiment(), folder, executor=Failing(0, KeyboardInterrupt(), Planted(bowl)))
    found = tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder).count("COMPLETE") == 4
    assert found.default == pytest.approx(1.1)


def test_an_interruption_right_after_a_trial_was_told(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = optuna.Study.tell

    def interrupted(study: optuna.Study, trial: Any, *args: Any, **kwargs: Any) -> Any:
        told = tell(study, trial, *args, **kwargs)
        if kwargs.get("state") is None and told.number == 1:
            raise KeyboardInterrupt
        return told

    monkeypatch.setattr(optuna.Study, "tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(experiment(), folder, executor=Planted(bowl))
    monkeypatch.undo()
    assert states(folder) == ["COMPLETE", "COMPLETE"]
    tune(experiment(), folder, executor=Planted(bowl))
    assert states(folder) == ["COMPLETE"] * 4


def test_a_second_sweep_in_the_folder_is_refused(folder: RunFolder) -> None:
    class Nosy(Planted):
        """Tunes in the folder in which it is itself a trial."""

        said = ""

        def run(self, *args: Any, **kwargs: Any) -> Any:
            self.said = refusal(experiment(), folder, executor=Planted(bowl))
            return super().run(*args, **kwargs)

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
    assert states(folder) == ["COMPLETE"] * 2


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


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "qmc"])
def test_resuming_does_not_repeat_the_first_draws(sampler: str, folder: RunFolder) -> None:
    values = []
    for total in (3, 6, 10):
        found = tune(experiment(sampler=sampler, trials=total), folder, executor=Planted(bowl))
        values = found.trials["lr"].tolist()
    assert len({round(math.log2(value), 6) for value in values}) == 10


def test_the_same_seed_gives_the_same_trials(tmp_path: Path) -> None:
    def draws(name: str, seed: int) -> list[float]:
        found = tune(experiment(sampler="random", seed=seed), RunFolder(tmp_path / name), executor=Planted(bowl))
        return found.trials["lr"].tolist()

    assert draws("one", 0) == draws("two", 0)
    assert draws("one", 0) != draws("three", 1)


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_hopeless_trials_are_pruned_and_count_as_finished(pruner: str, folder: RunFolder) -> None:
    """Each trial is worse than all before it."""
    planted = Planted(lambda job: 1 + job.key / 10)
    found = tune(experiment(pruner=pruner, trials=9), folder, executor=planted)
    pruned = found.trials[found.trials["state"] == "PRUNED"]
    assert len(found.trials) == 9
    assert len(pruned) >= 3
    assert (pruned["steps"] < 8).all()
    assert (pruned["flops"] < found.trials["flops"].max()).all()
    assert found.value == 1.0
    again = tune(experiment(pruner=pruner, trials=9), folder, executor=(idle := Counting(planted)))
    assert idle.jobs == []
    assert len(again.trials) == 9


def test_without_a_pruner_every_trial_runs_to_its_end(folder: RunFolder) -> None:
    found = tune(experiment(trials=9), folder, executor=Planted(lambda job: 1 + job.key / 10))
    assert found.trials["state"].tolist() == ["COMPLETE"] * 9


def test_a_real_run_stops_at_the_rung_where_it_is_told_to() -> None:
    heard: list[tuple[int, float]] = []

    def stop_at_the_second(job: Job, step: int, loss: float) -> bool:
        heard.append((step, loss))
        return len(heard) == 2

    given = experiment()
    job = Job(0, given.proxy_scale, "mup", given.recipe, 0, rungs=(3, 5, 7))
    ((_, outcome),) = OneByOne().run(given, [job], each(stop_at_the_second))
    assert [step for step, _ in heard] == [3, 5]
    assert outcome.stopped
    assert (outcome.steps, outcome.loss) == heard[1]
    assert not outcome.diverged


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
    open_study(experiment(), own_journal(folder.make()), None, "worker")
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
        def run(self, *args: Any, **kwargs: Any) -> Any:
            for job, outcome in super().run(*args, **kwargs):
                yield job, replace(outcome, start=math.nan, loss=math.nan)

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
    with pytest.raises(RequestError, match="changes nothing"):
        experiment(search=search, **changes)
    experiment(search={"cooldown": {"low": 0.1, "high": 0.5}, "schedule": {"choices": ["wsd", "cosine"]}})
