"""Batch and duration laws: each one's algebra, that it reaches the optimizer, and that none is used without its name."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.planning.audit import audit, live
from mutransfer.planning.build import apply_law
from mutransfer.planning.laws import LAWS, Change, Ratios, law
from mutransfer.planning.target import TargetConfig

from .helpers import families
from .helpers.planned import plan_of
from .test_transfer import config

RATIOS = st.floats(1 / 64, 64)
BASE = mt.Scale(32, 2, batch=8, tokens=8000)
RECIPE = {"lr": 2**-7, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


@functools.cache
def family() -> mt.Family:
    plain = families.transformer()
    return mt.Family(plain.build, plain.batch, plain.loss, BASE)


def planned(name: str, scale: mt.Scale = BASE, optimizer: str = "adamw", **recipe: Any) -> mt.Plan:
    return plan_of(family(), scale, "mup", optimizer, mt.Recipe.read({**RECIPE, "law": name, **recipe}, "recipe"))


@given(st.sampled_from(sorted(LAWS)), RATIOS, RATIOS, RATIOS, RATIOS, RATIOS, RATIOS)
def test_laws_compose(name: str, b1: float, d1: float, n1: float, b2: float, d2: float, n2: float) -> None:
    """Going to a size by way of another is going there directly; going nowhere changes nothing."""
    change = LAWS[name].change
    first, then = change(Ratios(b1, d1, n1)), change(Ratios(b2, d2, n2))
    whole = change(Ratios(b1 * b2, d1 * d2, n1 * n2))
    for key in ("lr", "weight_decay", "averaging", "eps"):
        assert getattr(first, key) * getattr(then, key) == pytest.approx(getattr(whole, key))
    assert change(Ratios(1, 1, 1)) == Change()


def test_each_law_at_four_times_the_batch_and_two_times_the_tokens() -> None:
    """By hand, from the formulas that each note prints; eight times the parameters."""
    expected = {
        "sqrt": Change(lr=2**0.5, weight_decay=2**0.5, averaging=2, eps=2**-0.5),
        "bjorck": Change(lr=2**-0.32),
        "power-lines": Change(weight_decay=2 * 0.25**0.527),
        "ema": Change(weight_decay=2),
    }
    assert {name: each.change(Ratios(4, 2, 8)) for name, each in LAWS.items()} == {
        name: Change(*(pytest.approx(value) for value in vars(change).values())) for name, change in expected.items()
    }


@given(RATIOS, RATIOS, RATIOS)
def test_what_each_law_holds(batch: float, tokens: float, parameters: float) -> None:
    m, steps = Ratios(batch, tokens, parameters), tokens / batch
    ema, lines = LAWS["ema"].change(m), LAWS["power-lines"].change(m)
    assert ema.lr * ema.weight_decay * steps == pytest.approx(1)
    tau = batch / (lines.lr * lines.weight_decay * tokens)
    assert tau == pytest.approx((tokens / parameters) ** -0.527)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_reaches_every_row_and_the_optimizer(name: str) -> None:
    bigger = BASE.with_(batch=16, tokens=32000)
    plain, changed = planned("none"), planned(name, bigger)
    change = LAWS[name].change(Ratios(2, 4, 1))
    for before, after in zip(plain.rows, changed.rows, strict=True):
        assert after.lr == pytest.approx(before.lr * change.lr)
        assert after.weight_decay == pytest.approx(before.weight_decay * change.weight_decay)
        assert after.eps == pytest.approx(before.eps * change.eps)  # type: ignore[operator]
        assert after.lr_factor == pytest.approx(change.lr)
    family = families.transformer()
    model = family.build(changed.scale)
    optimizer = changed.make_optimizer(model)
    betas = tuple(1 - (1 - beta) * change.averaging for beta in RECIPE["betas"])  # type: ignore[attr-defined]
    assert all(group["betas"] == pytest.approx(betas) for group in optimizer.param_groups)
    assert len(audit(changed, live(optimizer))) == 0
    assert any(LAWS[name].source in note and "m_B = 2, m_D = 4" in note for note in changed.notes)
    assert mt.Plan.from_dict(changed.as_dict()) == changed


def test_no_law_changes_nothing_and_says_so() -> None:
    plain, bigger = planned("none"), planned("none", BASE.with_(batch=16))
    assert bigger.rows == plain.rows
    assert any("no batch or duration law is named" in note for note in bigger.notes)
    assert not any("law" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("base", "scale", "said"),
    [
        ({"batch": 16}, {"batch": 64}, "batch 16 → 64"),
        ({"tokens": 10**5}, {"tokens": 10**6}, "tokens 100000 → 1000000"),
        ({}, {"batch": 64, "tokens": 10**6}, "batch not stated → 64, tokens not stated → 1000000"),
        ({"batch": 16, "tokens": 10**5}, {}, "batch 16 → not stated, tokens 100000 → not stated"),
    ],
)
def test_a_size_that_is_left_open_is_never_passed_over(base: dict[str, int], scale: dict[str, int], said: str) -> None:
    """Without a law it is noted, and a law that needs what is not stated is refused."""
    family = families.mlp().with_base(mt.Scale(32, 3, **base))
    plain = plan_of(families.mlp(), mt.Scale(64, 3))
    noted = mt.plan(family, mt.Scale(64, 3, **scale))
    assert noted.rows == plain.rows
    assert set(noted.notes) - set(plain.notes) == {
        f"{said}: no batch or duration law is named, so lr, weight decay, betas and eps are carried over unchanged."
    }
    for name, each in LAWS.items():
        if name == "bjorck" and "tokens" in base and "tokens" in scale:  # which reads nothing else
            changed = mt.plan(family, mt.Scale(64, 3, **scale), recipe=mt.Recipe(law="bjorck"))
            assert changed.rows[0].lr == pytest.approx(plain.rows[0].lr * 10**-0.32)
            assert changed.notes[-1].endswith("; m_D = 10.")
            continue
        with pytest.raises(
            RequestError, match=f"the law {name} needs {' and '.join(each.needs)} .*{said}.*on both Scales"
        ):
            mt.plan(family, mt.Scale(64, 3, **scale), recipe=mt.Recipe.read({"law": name}, "recipe"))


def test_the_same_run_needs_no_law() -> None:
    for name in LAWS:
        assert planned(name).rows == planned("none").rows


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sqrt", {"optimizer": "sgd"}, r"sqrt was found with adamw and adam and nadam .* optimizer is sgd"),
        ("ema", {"optimizer": "lion"}, "ema was found with adamw"),
        ("sqrt", {"scale": BASE.with_(batch=800)}, "increase the batch less"),
        ("squareroot", {}, "law"),
    ],
)
def test_a_law_where_it_does_not_hold_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        planned(name, **({"scale": BASE.with_(batch=16)} | arguments))


def test_power_lines_needs_the_parameter_counts() -> None:
    plan = planned("power-lines")
    with pytest.raises(RequestError, match="power-lines needs the ratio of parameter counts"):
        apply_law(plan, BASE.with_(batch=16), BASE)
    with pytest.raises(RequestError, match="unknown law 'bjork': did you mean 'bjorck'"):
        law("bjork")


@pytest.mark.parametrize("name", LAWS)
def test_a_target_config_carries_its_law(name: str, tmp_path: Any) -> None:
    recipe = mt.Recipe.read({**RECIPE, "law": name}, "recipe")
    plan = plan_of(families.transformer(), mt.Scale(64, 2), recipe=recipe)
    target = config(plan, batch_size=16, steps=100, proxy_parameters=1000)
    assert any(note.startswith(f"law {name}") for note in target.plan.notes)
    assert not any(warning.startswith("law ") for warning in target.warnings)
    assert not any("no batch or duration law" in warning for warning in target.warnings)
    m_N = sum(math.prod(row.shape) for row in plan.rows) / 1000
    change = LAWS[name].change(Ratios(2, 4, m_N))
    assert target.plan.rows[0].lr == pytest.approx(plan.rows[0].lr * change.lr)
    assert target.plan.rows[0].weight_decay == pytest.approx(plan.rows[0].weight_decay * change.weight_decay)
    beta = 1 - 0.1 * change.averaging
    assert target.as_dict()["optimizer"]["settings"]["betas"][0] == pytest.approx(beta)
    assert TargetConfig.load(target.save(tmp_path / "target.json")) == target
