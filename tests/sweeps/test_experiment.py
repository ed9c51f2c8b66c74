"""The experiment file: read back as it was resolved, changed on the command line, and refused in one sentence."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from mutransfer.errors import RequestError
from mutransfer.recipe import Recipe, Scale
from mutransfer.sweeps.experiment import Experiment, Range, with_values

from ..helpers.small import SMALL, experiment

LR = {"low": 2**-9, "high": 2**-3, "log": True}


def written(path: Path, data: Any) -> Path:
    file = path / "experiment.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return file


def refusal(path: Path, changes: list[str] | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        Experiment.load(path, changes)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?")), sentence
    return sentence


def test_the_resolved_experiment_survives_its_file(tmp_path: Path) -> None:
    given = experiment(
        options={"bias": True},
        base={"width": 4, "depth": 1},
        search={
            "lr": {"low": 2**-9, "high": 2**-3, "log": True},
            "beta2": {"low": 0.9, "high": 0.999},
            "schedule": {"choices": ["cosine", "wsd"]},
        },
        recipe={"betas": [0.8, 0.99], "clip": 1.5},
    )
    path = given.save(tmp_path / "experiment.yaml")
    assert Experiment.load(path) == given
    spelled = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(spelled) == set(Experiment.model_fields)
    assert set(spelled["recipe"]) == set(Recipe.model_fields) - {"method"}  # left out where it is backprop


def test_the_file_that_init_writes_is_an_experiment() -> None:
    text = resources.files("mutransfer.cli").joinpath("experiment.yaml").read_text(encoding="utf-8")
    given = Experiment.read(yaml.safe_load(text), "init")
    assert given.trials == 24
    assert set(given.search) == {"lr", "init_scale", "alpha_output"}
    # What it offers in comments must be right as well.
    offered = [line.partition("# ")[2].partition("   #")[0] for line in text.splitlines() if line.startswith("  # ")]
    assert len(offered) == 6
    for line in offered:
        Experiment.read({"search": yaml.safe_load(line)}, line)


def test_the_proxy_is_the_base_unless_another_is_given() -> None:
    assert experiment().base_scale == experiment().proxy_scale == Scale(8, 2)
    assert experiment(base={"width": 4}).base_scale == Scale(4, 2)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("recipe.lr=1e-3", lambda e: e.recipe.lr == 1e-3),
        ("recipe.lr=.5", lambda e: e.recipe.lr == 0.5),
        ("search.lr.low=1e-4", lambda e: e.search["lr"].low == 1e-4),
        ("trials=7", lambda e: e.trials == 7),
        ("proxy={width: 16, depth: 1}", lambda e: e.proxy_scale == Scale(16, 1)),
        ("recipe.betas=[0.8, 0.99]", lambda e: e.recipe.betas == (0.8, 0.99)),
        ("recipe.clip=null", lambda e: e.recipe.clip is None),
        ("recipe.clip=", lambda e: e.recipe.clip is None),
        ("model=resnet", lambda e: e.model == "resnet"),
        ("data=text:a=b.txt", lambda e: e.data == "text:a=b.txt"),
        ("options.bias=true", lambda e: e.options == {"bias": True}),
        ("search.schedule.choices=[cosine, linear]", lambda e: e.search["schedule"].choices == ("cosine", "linear")),
        ("search={beta1: {low: 0.8, high: 0.9}}", lambda e: list(e.search) == ["beta1"]),
        ("base.width=4", lambda e: e.base_scale == Scale(4, 2)),
    ],
)
def test_a_value_is_changed_on_the_command_line(change: str, read: Any, tmp_path: Path) -> None:
    path = written(tmp_path, {**SMALL, "recipe": {"clip": 1.0}, "search": {"schedule": {"choices": ["wsd"]}, "lr": LR}})
    before = path.read_bytes()
    assert read(Experiment.load(path, [change]))
    assert not read(Experiment.load(path))
    assert path.read_bytes() == before


def test_later_changes_win_and_empty_sections_can_be_filled(tmp_path: Path) -> None:
    path = written(tmp_path, {**SMALL, "options": None})
    given = Experiment.load(path, ["trials=7", "options.bias=true", "trials=8"])
    assert (given.trials, given.options) == (8, {"bias": True})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trials", ["'trials'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("trials.more=3", ["trials holds a value"]),
        ("options=[1", ["'options=[1'", "not valid YAML"]),
        ("trials=many", ["trials is 'many'", "integer"]),
        ("recipe.lr=nan", ["recipe.lr is nan", "finite"]),
        ("recipe.lrr=0.1", ["'recipe.lrr'", "did you mean 'lr'?"]),
    ],
)
def test_a_wrong_change_is_refused(change: str, said: list[str], tmp_path: Path) -> None:
    sentence = refusal(written(tmp_path, SMALL), [change])
    assert all(part in sentence for part in said), sentence


# change of SMALL → what the sentence must name: the key, and the next move
WRONG = [
    ({"trialss": 3}, ["unknown key 'trialss'", "did you mean 'trials'?"]),
    ({"recipe": {"weigth_decay": 0.1}}, ["'recipe.weigth_decay'", "did you mean 'weight_decay'?"]),
    ({"search": {"lr": {"lo": 1}}}, ["search.lr", "'search.lr.lo'", "did you mean 'low'?"]),
    ({"proxy": {"widht": 8}}, ["'proxy.widht'", "did you mean 'width'?"]),
    ({"proxy": {"depth": 2}}, ["'proxy.width' is missing"]),
    ({"proxy": {"width": 0}}, ["proxy.width is 0", "greater than or equal to 1"]),
    ({"proxy": 64}, ["proxy is 64"]),
    ({"steps": 0}, ["steps is 0", "greater than or equal to 1"]),
    ({"steps": 2.5}, ["steps is 2.5", "integer"]),
    ({"rungs": 99}, ["rungs is 99", "less than or equal to 32"]),
    ({"seed": -1}, ["seed is -1"]),
    ({"sampler": "tpee"}, ["sampler is 'tpee'", "'tpe'"]),
    ({"pruner": "hyper"}, ["pruner is 'hyper'", "'median'"]),
    ({"recipe": {"lr": 0}}, ["recipe.lr is 0", "greater than 0"]),
    ({"recipe": {"lr": -0.1}}, ["recipe.lr is -0.1", "greater than 0"]),
    ({"recipe": {"betas": [0.9, 1.0]}}, ["recipe.betas.1 is 1.0", "less than 1"]),
    ({"recipe": {"betas": [1.5, 0.9]}}, ["recipe.betas.0 is 1.5", "less than 1"]),
    ({"recipe": {"schedule": "cosin"}}, ["recipe.schedule is 'cosin'", "'cosine'"]),
    ({"recipe": {"schedule": "wsd", "warmup": 0.9, "cooldown": 0.5}}, ["warmup 0.9", "cooldown 0.5", "at most 1"]),
    ({"search": {"lr": {"low": 0.1, "high": 0.01}}}, ["search.lr", "low 0.1 is not below high 0.01", "swap"]),
    ({"search": {"lr": {"low": 0.1, "high": 0.1}}}, ["search.lr", "low 0.1 is not below high 0.1"]),
    ({"search": {"warmup": {"low": 0.0, "high": 0.5, "log": True}}}, ["search.warmup", "low 0 has no logarithm"]),
    ({"search": {"lr": {"low": 0.1}}}, ["search.lr", "either low and high, or choices"]),
    ({"search": {"lr": {"low": 0.1, "choices": [1]}}}, ["search.lr", "either low and high, or choices"]),
    ({"search": {"lr": {"choices": []}}}, ["search.lr.choices", "at least 1 item"]),
    ({"search": {"lr": {"low": -1.0, "high": 0.1}}}, ["lr is -1.0", "greater than 0"]),
    ({"search": {"beta2": {"low": 0.9, "high": 1.0}}}, ["betas.1 is 1.0", "less than 1"]),
    ({"search": {"schedule": {"choices": ["cosine", "sine"]}}}, ["schedule is 'sine'", "'cosine'"]),
    ({"search": {"width": {"low": 8, "high": 64}}}, ["search.width is not a hyperparameter", "known names are"]),
    ({"search": {"lrr": {"low": 0.1, "high": 1}}}, ["search.lrr is not a hyperparameter", "did you mean 'lr'?"]),
    ({"search": {"learning_rate": 3}}, ["search.learning_rate is not a hyperparameter", "did you mean 'lr'?"]),
    ({"search": {"lr": 3}}, ["search.lr is 3, but a range has low and high", "fix the value as recipe.lr"]),
    ({"search": {"lr": [1, 2]}}, ["search.lr is [1, 2], but a range has low and high"]),
    ({"search": {"betas": {"low": 0.1, "high": 0.9}}}, ["search.betas is not a hyperparameter", "did you mean 'beta"]),
    ({"optimizer": "adamm"}, ["optimizer 'adamm'", "did you mean 'adam'?"]),
    ({"optimizer": "lbfgs"}, ["lbfgs has no rule", "use adamw, or one of adam"]),
    ({"optimizer": "adam", "recipe": {"weight_decay": 0.1}}, ["weight_decay 0.1", "L2", "use adamw"]),
    (
        {"optimizer": "adam", "search": {"weight_decay": {"low": 0.0, "high": 0.1}}},
        ["Adam with weight_decay 0.1", "use adamw"],
    ),
    ({"parametrization": "mupp"}, ["parametrization 'mupp'", "did you mean 'mup'?"]),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=lambda part: str(part)[:60])
def test_a_wrong_value_is_refused(change: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, {**SMALL, **change})
    sentence = refusal(path)
    assert sentence.startswith(str(path))
    assert all(part in sentence for part in said), sentence


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "recipe: {lr: 1e-3}\nsearch: {lr: {low: 1e-4, high: 1e-1, log: true}}\n")
    assert Experiment.load(path).recipe.lr == 1e-3
    assert Experiment.load(path).search["lr"] == Range(low=1e-4, high=1e-1, log=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [("model: [mlp", "not valid YAML"), ("- model", "holds list"), ("just words", "holds str"), ("1: 2", "str")],
)
def test_what_is_no_experiment_is_refused(text: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    assert "mutransfer init" in refusal(tmp_path / "none.yaml")
    assert "is a folder" in refusal(tmp_path)
    assert str(path / "below.yaml") in refusal(path / "below.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    assert "not valid YAML" in refusal(tmp_path / "latin.yaml")


def test_searched_betas_go_into_the_pair() -> None:
    recipe = with_values(Recipe(), {"beta2": 0.99, "lr": 0.5})
    assert (recipe.betas, recipe.lr) == ((0.9, 0.99), 0.5)
    assert with_values(Recipe(), {"beta1": 0.5}).betas == (0.5, 0.95)
