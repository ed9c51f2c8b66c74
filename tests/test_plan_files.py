"""Recipes and plans on disk: they survive the trip, and a wrong or damaged one is answered in a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mutransfer as mt
from mutransfer.errors import RequestError, SettingsError
from mutransfer.recipe import Scale

from .helpers import families
from .helpers.planned import plan_of


def finite(low: float, high: float, **options: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **options)


@st.composite
def recipes(draw: st.DrawFn) -> mt.Recipe:
    positive, share = finite(1e-30, 1e10), finite(0, 1, exclude_max=True)
    data: dict[str, Any] = {
        "lr": draw(positive),
        "weight_decay": draw(finite(0, 10)),
        "betas": (draw(share), draw(share)),
        "eps": draw(positive),
        "momentum": draw(share),
        "decay": draw(st.sampled_from(["matrices", "all"])),
        "decay_policy": draw(st.sampled_from(["independent", "coupled", "sqrt"])),
        "schedule": draw(st.sampled_from(["constant", "cosine", "linear", "wsd"])),
        "warmup": draw(finite(0, 0.5)),
        "cooldown": draw(finite(1e-6, 0.5)),
        "final": draw(finite(0, 1)),
        "clip": draw(st.none() | positive),
    }
    data |= {name: draw(finite(1e-6, 1e6)) for name in ("init_scale", "alpha_input", "alpha_attention", "alpha_output")}
    return mt.Recipe.read(data, "recipe")


@settings(max_examples=60, deadline=None)
@given(recipes())
def test_a_recipe_survives_save_and_load(tmp_path_factory: pytest.TempPathFactory, recipe: mt.Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    assert mt.Recipe.load(recipe.save(path)) == recipe


@settings(max_examples=25, deadline=None)
@given(recipes(), st.sampled_from(["mup", "sp"]), st.sampled_from(["adamw", "sgd"]))
def test_a_plan_survives_save_and_load(
    tmp_path_factory: pytest.TempPathFactory, recipe: mt.Recipe, parametrization: str, optimizer: str
) -> None:
    family = families.transformer(width=16, depth=1, tied=True)
    plan = plan_of(family, Scale(64, 1), parametrization, optimizer, recipe)
    path = tmp_path_factory.getbasetemp() / "plan.json"
    again = mt.Plan.load(plan.save(path))
    assert again == plan
    assert again.frame().equals(plan.frame())


def test_a_loaded_recipe_plans_the_same(tmp_path: Path) -> None:
    family, recipe = families.mlp(), mt.Recipe(lr=0.1, alpha_output=3.0)
    path, wide = recipe.save(tmp_path / "best.json"), family.base.with_(width=2 * family.base.width)
    assert mt.plan(family, wide, recipe=path) == mt.plan(family, wide, recipe=recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrr": 1}, "unknown key 'lrr': did you mean 'lr'"),
        ({"lr": -1.0}, r"lr is -1\.0: it should be greater than 0"),
        ({"lr": float("nan")}, "lr is nan: it should be a finite number"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"betas": [0.9, 1.0]}, r"betas\.1 is 1\.0: it should be less than 1"),
        ({"schedule": "cosin"}, "schedule is 'cosin': it should be 'constant', 'cosine', 'linear' or 'wsd'"),
        (
            {"schedule": "wsd", "warmup": 0.9, "cooldown": 0.2},
            r"warmup 0\.9 and cooldown 0\.2 are fractions of one run",
        ),
        ({"clip": 0}, "clip is 0: it should be greater than 0"),
    ],
)
def test_a_wrong_recipe_is_answered_in_a_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(mt.Recipe().model_dump() | changes), encoding="utf-8")
    with pytest.raises(RequestError, match=f"Recipe: {message}"):
        mt.Recipe(**changes)
    with pytest.raises(RequestError, match=f"{re.escape(str(path))}: {message}"):
        mt.Recipe.load(path)
    with pytest.raises(RequestError, match=message):
        mt.Recipe().with_(**changes)


def damaged(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(data))
    *path, last = key.split(".")
    inner: Any = data
    for name in path:
        inner = inner[int(name) if name.isdigit() else name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parameters", KeyError),
        ("recipe", KeyError),
        ("recipe.lr", 0),
        ("recipe", 7),
        ("scale", KeyError),
        ("scale", [64]),
        ("scale.width", "wide"),
        ("scale.widht", 3),
        ("optimizer", KeyError),
        ("optimizer", "adamww"),
        ("parametrization", 3),
        ("parameters", 3),
        ("parameters", [1]),
        ("parameters", ["input.weight"]),
        ("parameters.0.lr", KeyError),
        ("parameters.0.lr", None),
        ("parameters.0.lr", "fast"),
        ("parameters.0.weight_decay", "0.1"),
        ("parameters.0.eps", "tiny"),
        ("parameters.0.init", 3),
        ("parameters.0.init", KeyError),
        ("parameters.0.init.kind", "cauchy"),
        ("parameters.0.init.b", "wide"),
        ("parameters.0.shape", None),
        ("parameters.0.unknown", 1),
    ],
)
def test_a_damaged_plan_is_answered_in_a_sentence(key: str, value: Any, tmp_path: Path) -> None:
    family = families.mlp()
    path = tmp_path / "plan.json"
    data = damaged(mt.plan(family, family.base).as_dict(), key, value)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RequestError, match=re.escape(str(path))):
        mt.Plan.load(path)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("scale", KeyError, " is damaged (the key 'scale' is missing): write it again."),
        ("scale", [64], " is damaged (scale: [64] holds no keys and values): write it again."),
        ("base.width", 0, " is damaged (base: width is 0: give a whole number of at least 1): write it again."),
        ("optimizer", "adamww", " is for the optimizer 'adamww': did you mean 'adamw'?"),
        ("parameters.1.lr", None, " is damaged (parameters.1.lr is None: it should be a valid number): write it again."),
        ("parameters.1.lrr", 1, " is damaged (unknown key 'parameters.1.lrr': did you mean 'lr'?): write it again."),
        ("parameters.1.shape", [1.5], " is damaged (parameters.1.shape.0 is 1.5: it should be a valid integer): write it again."),
        ("parameters.1.init.kind", "x", " is damaged (parameters.1.init: unknown initialization 'x'): write it again."),
        ("recipe.lr", 0, ", recipe: lr is 0: it should be greater than 0."),
    ],
)  # fmt: skip
def test_the_sentence_names_what_is_damaged_and_the_next_move(key: str, value: Any, sentence: str) -> None:
    family = families.mlp()
    data = damaged(mt.plan(family, family.base).as_dict(), key, value)
    with pytest.raises(SettingsError) as caught:
        mt.Plan.from_dict(data, "plan.json")
    assert str(caught.value) == "plan.json" + sentence


def test_a_plan_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    family = families.transformer(width=16, depth=1, tied=True)
    plan = mt.plan(family, Scale(64, 2))
    first = plan.save(tmp_path / "plan.json").read_bytes()
    assert mt.Plan.load(tmp_path / "plan.json").save(tmp_path / "again.json").read_bytes() == first


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_plan_is_answered_in_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    for load in (mt.Plan.load, mt.Recipe.load):
        with pytest.raises(RequestError, match=re.escape(str(path))):
            load(path)
    with pytest.raises(RequestError, match="there is no"):
        mt.Plan.load(tmp_path / "nowhere.json")


def test_a_plan_as_a_frame() -> None:
    family = families.mlp()
    frame = mt.plan(family, family.base.with_(width=4 * family.base.width)).frame().set_index("name")
    assert frame.loc["hidden.0.weight", "shape"] == "128x128"
    assert frame.loc["readout.weight", "role"] == "output"
    assert frame.loc["hidden.0.weight", "lr"] == mt.Recipe().lr / 4


def test_a_printed_plan_is_a_table() -> None:
    family = families.mlp()
    plan = mt.plan(family, family.base.with_(width=64, depth=5))
    assert repr(plan) == "<Plan mup adamw: width 32 → 64, depth 3 → 5, 12 parameters>"
    heading, columns, *lines = str(plan).splitlines()
    assert heading == repr(plan)[1:-1]
    assert columns.split() == list(plan.frame().columns)
    assert [line.split()[0] for line in lines[:12]] == [row.name for row in plan.rows]
    assert lines[12:] == [f"note: {note}" for note in plan.notes]
    assert len(lines) > 12


@pytest.mark.parametrize("width", [0, -1, 1.5, True, "64"])
def test_a_scale_is_whole_numbers(width: Any) -> None:
    with pytest.raises(RequestError, match=f"width is {width!r}: give a whole number of at least 1"):
        Scale(width)


def tuned(folder: Path, asked: str) -> Path:
    folder.mkdir()
    (folder / "experiment.yaml").write_text(asked, encoding="utf-8")
    return mt.Recipe(lr=0.01).save(folder / "best.json")


PROXY = "proxy: {width: 16, depth: 2}\n"


@pytest.mark.parametrize(
    ("asked", "base", "parametrization", "fits"),
    [
        (PROXY, mt.Scale(16, 2), "mup", True),
        (PROXY, mt.Scale(32, 2), "mup", False),
        (PROXY + "base: {width: 32, depth: 2}\n", mt.Scale(32, 2), "mup", True),
        (PROXY + "base: {width: 32, depth: 2}\n", mt.Scale(16, 2), "mup", False),
        (PROXY, mt.Scale(16, 3), "mup", True),  # which has no rule for depth
        (PROXY, mt.Scale(16, 3), "completep", False),
        (PROXY, mt.Scale(32, 2), "sp", True),
        ("proxy: {width: 16}\nsearch: {}\n", mt.Scale(32, 2), "mup", False),
        ("proxy: {width: 16}\nseed: 2024-13-45\n", mt.Scale(32, 2), "mup", True),
        ("not an experiment", mt.Scale(32, 2), "mup", True),
        ("proxy: [", mt.Scale(32, 2), "mup", True),
    ],
)
def test_the_recipe_of_a_run_is_for_the_base_it_was_tuned_at(
    asked: str, base: mt.Scale, parametrization: str, fits: bool, tmp_path: Path
) -> None:
    family = families.transformer().with_base(base)
    best = tuned(tmp_path / "run", asked)
    if fits:
        assert mt.plan(family, mt.Scale(64, 4), parametrization, recipe=best).recipe.lr == 0.01
    else:
        with pytest.raises(
            RequestError, match=r"was tuned with the base width \d+ and depth 2, but the base of transformer"
        ):
            mt.plan(family, mt.Scale(64, 4), parametrization, recipe=best)
    assert mt.plan(family, mt.Scale(64, 4), parametrization, recipe=mt.Recipe.load(best)).recipe.lr == 0.01
    elsewhere = mt.Recipe(lr=0.01).save(tmp_path / "best.json")
    assert mt.plan(family, mt.Scale(64, 4), parametrization, recipe=elsewhere).recipe.lr == 0.01
