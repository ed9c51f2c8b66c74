"""Every fault's signature is what its planting is measured to do, and a verdict names it."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

import mutransfer as mt
from mutransfer.coord_check import record, verdict
from mutransfer.coord_check.diagnosis import FAULTS, Fault, local_slopes, plant, plant_in
from mutransfer.optimizers.rules import OPTIMIZERS
from mutransfer.tracing.observe import observe

from ..helpers import families
from ..helpers.sets import extended_but

WIDTHS = (64, 128, 256, 512)
PLANTED = [
    name for name, fault in FAULTS.items() if not fault.forward
]  # a number in the model itself: test_planted_faults


@functools.cache
def family() -> tuple[mt.Family, Any]:
    made = families.mlp(width=64, depth=4)
    return made, observe(made)


@functools.cache
def recorded(name: str, optimizer: str) -> Any:
    made, seen = family()
    options: dict[str, Any] = {"seeds": range(10), "observation": seen}
    if name:
        options["planner"] = plant(FAULTS[name], mt.plan, OPTIMIZERS[optimizer].column)
    return record(made, WIDTHS, "mup", optimizer, **options)


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "sgd"], "adamw"))
def test_a_healthy_model_has_no_signature(optimizer: str) -> None:
    found = local_slopes(recorded("", optimizer))
    roles = ("input", "hidden", "output")
    stepped = (
        roles if optimizer == "sgd" else ("hidden", "output")
    )  # Adam's step of an input layer is its update itself
    assert set(found) == {(what, role) for what in ("weight", "gain", "update", "decay") for role in roles} | {
        ("step", role) for role in stepped
    }
    # Biases stand beside logits at the start.
    assert all(abs(value) < 0.15 for value in found.values()), found
    assert verdict(recorded("", optimizer)).fault is None


@pytest.fixture(
    scope="module",  # pytest then runs both tests of one fault one after the other, and it is recorded once
    params=[
        pytest.param((name, optimizer), id=f"{name}-{optimizer}", marks=[pytest.mark.extended] * (optimizer == "sgd"))
        for name in PLANTED
        for optimizer in ("adamw", "sgd")
    ],
)
def planted(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def test_a_faults_signature_is_what_is_measured(planted: tuple[str, str]) -> None:
    name, optimizer = planted
    found = local_slopes(recorded(name, optimizer))
    for key, expected in FAULTS[name].signature(OPTIMIZERS[optimizer].column).items():
        if not math.isnan(expected) and (key != ("step", "input") or optimizer == "sgd"):
            # A weight's size is known to a percent; what SGD makes of a layer without norms bends by a third of a power.
            exact = key[0] in ("weight", "step", "decay")
            assert found[key] == pytest.approx(expected, abs=0.02 if exact else 0.35), key


def test_a_verdict_names_the_fault(planted: tuple[str, str]) -> None:
    name, optimizer = planted
    found = verdict(recorded(name, optimizer))
    assert (found.status, found.fault) == ("fail", name), found.cause
    assert str(found.cause).startswith(FAULTS[name].says[OPTIMIZERS[optimizer].column].partition(",")[0])


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_a_readout_that_learns_too_slowly_is_no_other_fault(power: float) -> None:
    """Under SGD it was called wrong hidden weights, though these start as they should."""
    made, seen = family()
    planner = plant_in("readout.weight", power, mt.plan)
    found = verdict(record(made, WIDTHS, "mup", "sgd", seeds=range(5), observation=seen, planner=planner))
    assert str(found.cause).startswith("the learning rate of readout.weight is too small by width^")


def test_signatures_are_told_apart() -> None:
    for column in ("adam", "sgd"):
        known: dict[str, dict[Any, float]] = {name: fault.signature(column) for name, fault in FAULTS.items()}
        for one in known:
            for other in known:
                gaps = [
                    abs(a - b)
                    for a, b in zip(known[one].values(), known[other].values(), strict=True)
                    if a == a and b == b
                ]
                assert one == other or max(gaps) >= 0.5, (column, one, other)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_coupled_decay_is_seen_in_lr_times_decay(optimizer: str) -> None:
    made, seen = family()

    def planner(*args: Any, **options: Any) -> mt.Plan:
        return mt.plan(*args[:4], args[4].with_(decay_policy="coupled"), **options)

    frame = record(made, WIDTHS, "mup", optimizer, planner=planner, observation=seen)
    found = verdict(frame)
    assert (found.status, found.fault) == ("fail", "decay")
    assert "lr · weight decay is not constant" in str(found.cause)
    assert set(found.slopes[found.slopes["ok"] == False]["statistic"]) == {"decay"}  # noqa: E712
    assert verdict(frame, decay_policy="coupled").status != "fail"  # where it was chosen
    with pytest.raises(mt.RequestError, match="unknown decay policy"):
        verdict(frame, decay_policy="couple")


def test_a_fault_multiplies_matrices_only() -> None:
    made, _ = family()
    fault = Fault("", {}, init={"hidden": 1}, adam={"hidden": 1})
    right = mt.plan(made, mt.Scale(256, 4))
    wrong = plant(fault, mt.plan, "adam")(made, mt.Scale(256, 4))
    for a, b in zip(right.rows, wrong.rows, strict=True):
        times = 4 if a.role == "hidden" else 1
        assert (b.lr, b.init.std) == (pytest.approx(a.lr * times), pytest.approx(a.init.std * times))
