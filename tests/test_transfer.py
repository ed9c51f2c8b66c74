"""Target configs: what they hold, what they warn about, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.recipe import Recipe
from mutransfer.scale import Scale
from mutransfer.transfer import KEYS, TargetConfig, target_config

from . import families

QUIET = Scale(64, 2)


def plan(scale: Scale = QUIET, **recipe: Any) -> mt.Plan:
    return mt.plan(families.transformer(), scale, recipe=Recipe(lr=2**-7, weight_decay=0.1, clip=1.0, **recipe))


def config(planned: mt.Plan | None = None, **changes: Any) -> TargetConfig:
    settings: dict[str, Any] = {
        "model": "transformer", "options": {"head_dim": 16}, "data": "markov", "sequence_length": 12, "proxy": Scale(32, 2),
        "proxy_batch_size": 8, "proxy_steps": 50, "batch_size": 8, "steps": 50, "tuned": ["lr"], "seed": 3,
        "provenance": {"data_sha256": "ab"},
    }  # fmt: skip
    return target_config(planned or plan(), **{**settings, **changes})


def refusal(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        TargetConfig.load(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence
    return sentence


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    target = config(tuned=["lr", "weight_decay"], batch_size=16)
    assert target.warnings
    assert TargetConfig.load(target.save(tmp_path / "target.json")) == target


def test_the_file_holds_what_a_trainer_needs() -> None:
    data = json.loads(json.dumps(config().as_dict(), allow_nan=False))
    assert tuple(data) == KEYS
    assert data["format"] == "mutransfer-target/1"
    assert data["optimizer"] == {"name": "adamw", "torch_name": "AdamW", "settings": {"betas": [0.9, 0.95]}}
    assert data["schedule"] == {"name": "cosine", "warmup": 0.1, "cooldown": 0.2, "final": 0.0, "steps": 50}
    assert data["clip"] == 1.0
    assert data["tokens"] == 8 * 50 * 12
    assert data["scale"] == {"width": 64, "depth": 2, "batch": 8, "tokens": data["tokens"]}
    assert data["parameters"] == json.loads(json.dumps(plan().as_dict()["parameters"]))
    assert sum(group["count"] for group in data["groups"]) == len(data["parameters"])
    assert data["provenance"]["proxy"] == {"width": 32, "depth": 2, "batch": 8, "tokens": None, "steps": 50}
    assert data["provenance"]["tuned"] == ["lr"]


def test_nothing_is_said_where_everything_transfers() -> None:
    assert config(tuned=["lr", "init_scale", "alpha_output", "schedule", "betas", "warmup"]).warnings == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tuned": ["weight_decay"]}, ["weight_decay (0.1)", "regularisation"]),
        ({"tuned": ["options.attention_dropout"]}, ["attention_dropout", "regularisation"]),
        ({"tuned": ["batch_size"]}, ["batch_size", "tied to batch"]),
        ({"tuned": ["frobnication"]}, ["frobnication", "not known"]),
        ({"tuned": ["betas"], "batch_size": 32, "steps": 50}, ["betas", "m_B = 4", "m_D = 4"]),
        ({"tuned": ["recipe.warmup"], "steps": 500}, ["warmup (0.1)", "m_D = 10"]),
        ({"batch_size": 32}, ["batch grows 4x (8 to 32 examples)", "no batch or duration law applied"]),
        ({"steps": 500}, ["data grows 10x (400 to 4000 examples)", "no batch or duration law applied"]),
        ({"proxy": Scale(32, 1)}, ["depth goes from 1 in the proxy to 2", "no rule for depth"]),
    ],
)
def test_what_does_not_transfer_is_said(changes: dict[str, Any], expected: list[str]) -> None:
    warnings = config(**changes).warnings
    assert any(all(part in warning for part in expected) for warning in warnings), warnings
    assert all(warning.endswith(".") for warning in warnings)


def test_a_value_tied_to_the_length_alone_is_not_blamed_for_the_batch() -> None:
    assert not [text for text in config(tuned=["warmup"], batch_size=16, steps=25).warnings if "warmup" in text]


@pytest.mark.parametrize(("scale", "said"), [(Scale(64, 4), "depth"), (Scale(16, 2), "smaller than the base")])
def test_the_plans_notes_are_warnings_said_once(scale: Scale, said: str) -> None:
    warnings = config(plan(scale)).warnings
    assert [said in warning for warning in warnings] == [True]


def edited(tmp_path: Path, change: Any) -> Path:
    data = json.loads(json.dumps(config().as_dict()))
    change(data)
    path = tmp_path / "target.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data.update(format="mutransfer-target/9"), "mutransfer-target/9"),
        (lambda data: data.pop("seed"), "'seed' is missing"),
        (lambda data: data.update(sead=1), "did you mean 'seed'?"),
        (lambda data: data.update(steps="many"), "steps is 'many'"),
        (lambda data: data.update(options=[]), "options is []"),
        (lambda data: data["recipe"].update(lr=-1), "lr is -1"),
        (lambda data: data["scale"].update(width=0), "width is 0"),
        (lambda data: data["optimizer"].update(name="adamww"), "did you mean 'adamw'?"),
        (lambda data: data.update(parametrization="nup"), "did you mean 'mup'?"),
        (lambda data: data.update(parameters=["x"]), "damaged"),
        (lambda data: data["parameters"][0]["init"].update(kind="cauchy"), "damaged"),
        (lambda data: data.update(optimizer="adamw"), "damaged"),
        (lambda data: data.update(clip=2.0), "clip contradicts"),
        (lambda data: data["schedule"].update(steps=7), "schedule contradicts"),
        (lambda data: data["recipe"].update(lr=1.0), "lr of embedding.weight is"),
    ],
)
def test_a_damaged_or_contradictory_file_is_refused(tmp_path: Path, change: Any, expected: str) -> None:
    assert expected in refusal(edited(tmp_path, change))


def test_a_proxys_result_is_not_a_target(tmp_path: Path) -> None:
    assert "holds a recipe" in refusal(Recipe().save(tmp_path / "best.json"))
    assert "mutransfer-plan/1" in refusal(plan().save(tmp_path / "plan.json"))
    refusal(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"format": "mutr')
    refusal(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"proxy_steps": 0}, "proxy_steps is 0"),
        ({"provenance": {"a": {1}}}, "provenance"),
        ({"model": ""}, "model is ''"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        config(**changes)
