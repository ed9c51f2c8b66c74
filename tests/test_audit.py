"""The auditor: silent on an optimizer built from the plan, and naming every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.planning.audit import COLUMNS, audit, live
from mutransfer.recipe import Recipe, Scale

from .helpers import families
from .helpers.planned import plan_of

RECIPE = Recipe(lr=2**-7, weight_decay=0.1, momentum=0.8)


def made(optimizer: str = "adamw", width: int = 64) -> tuple[mt.Plan, torch.nn.Module]:
    family = families.transformer()
    plan = plan_of(family, Scale(width, 2), "mup", optimizer, RECIPE)
    return plan, family.build(plan.scale)


def dumps(plan: mt.Plan, model: torch.nn.Module, tmp_path: Path) -> list[Any]:
    """Every form in which an optimizer may be handed in."""
    optimizer = plan.make_optimizer(model)
    whole = {"optimizer": optimizer.state_dict(), "model": model.state_dict(), "step": 3}
    torch.save(whole, tmp_path / "whole.pt")
    torch.save(optimizer.state_dict(), tmp_path / "bare.pt")
    torch.save(whole, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "live.json").write_text(json.dumps(live(optimizer)))
    (tmp_path / "bare.json").write_text(json.dumps(live(optimizer)["optimizer"]))
    files = [tmp_path / name for name in ("whole.pt", "bare.pt", "old.pt", "live.json", "bare.json")]
    return [whole, optimizer.state_dict(), live(optimizer), *files, str(files[0])]


def differences(frame: Any) -> set[tuple[str, str]]:
    return set(zip(frame["name"], frame["setting"], strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_nothing_to_say_about_the_planned_optimizer(optimizer: str, tmp_path: Path) -> None:
    plan, model = made(optimizer)
    for dump in dumps(plan, model, tmp_path):
        frame = audit(plan, dump)
        assert frame.empty, frame
        assert tuple(frame.columns) == COLUMNS


def test_the_same_answer_in_every_form(tmp_path: Path) -> None:
    plan, model = made()
    other = plan_of(families.transformer(), plan.scale, "sp", recipe=RECIPE)
    found = [differences(audit(plan, dump)) for dump in dumps(other, model, tmp_path)]
    assert ("blocks.0.ffn.up.weight", "lr") in found[0]
    assert all(one == found[0] for one in found)


def set_all(**settings: Any) -> Any:
    return lambda optimizer: [group.update(settings) for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("spoil", "setting"),
    [
        (set_all(lr=2**-7), "lr"),
        (set_all(weight_decay=0.1), "weight_decay"),
        (set_all(eps=1e-8), "eps"),
        (set_all(betas=(0.9, 0.999)), "betas"),
        (set_all(decoupled_weight_decay=False), "decoupled_weight_decay"),
        (lambda o: o.param_groups[0].update(lr=o.param_groups[0]["lr"] * (1 + 1e-5)), "lr"),
    ],
)
def test_a_wrong_setting_is_found(spoil: Any, setting: str) -> None:
    plan, model = made()
    optimizer = plan.make_optimizer(model)
    spoil(optimizer)
    for dump in (live(optimizer), optimizer.state_dict()):
        frame = audit(plan, dump)
        assert len(frame)
        assert set(frame["setting"]) == {setting}
        row = frame.iloc[0]
        assert row["planned"] != row["found"]
    json.dumps(frame.to_dict("records"))


def test_momentum_is_compared_and_a_tensor_lr_is_a_number() -> None:
    plan, model = made("sgd")
    optimizer = plan.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    assert audit(plan, live(optimizer)).empty
    assert audit(plan, optimizer.state_dict()).empty
    optimizer.param_groups[0]["momentum"] = 0.9
    assert set(audit(plan, live(optimizer))["setting"]) == {"momentum"}


def test_another_optimizer_lacks_the_settings() -> None:
    plan, model = made()
    optimizer = torch.optim.SGD([{**group, "betas": None, "eps": None} for group in plan.param_groups(model)])
    assert {"betas", "eps"} <= set(audit(plan, live(optimizer))["setting"])


def test_a_schedules_momentary_factor_is_no_difference() -> None:
    plan, model = made()
    optimizer = plan.make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 3))
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        assert audit(plan, live(optimizer)).empty


def test_a_scheduler_that_overwrites_the_groups_is_found() -> None:
    """Cosine towards one floor for all groups: the ratios drift apart although initial_lr is still the plan's."""
    plan, model = made()
    optimizer = plan.make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-3)
    assert audit(plan, live(optimizer)).empty
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    frame = audit(plan, live(optimizer))
    assert set(frame["setting"]) == {"lr/initial_lr"}
    assert 0 < len(frame) < len(plan.rows)

    # Written by hand into all groups, as gpt-neox does, with and without a scheduler's memory.
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    assert set(audit(plan, live(optimizer))["setting"]) == {"lr/initial_lr"}
    for group in optimizer.param_groups:
        del group["initial_lr"]
    assert set(audit(plan, live(optimizer))["setting"]) == {"lr"}


def test_missing_and_unknown_parameters_are_found() -> None:
    plan, model = made()
    dump = live(plan.make_optimizer(model))
    group = next(group for group in dump["optimizer"]["param_groups"] if "readout.weight" in group["param_names"])
    group["param_names"] = ["adapter.weight" if name == "readout.weight" else name for name in group["param_names"]]
    frame = audit(plan, dump)
    assert frame.to_numpy().tolist() == [
        ["readout.weight", "parameter", "present", "missing"],
        ["adapter.weight", "parameter", "missing", "present"],
    ]


def test_a_model_of_another_width_is_found() -> None:
    plan, _ = made(width=64)
    other, model = made(width=128)
    optimizer = other.make_optimizer(model)
    for dump in ({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, live(optimizer)):
        frame = audit(plan, dump)
        shape = frame[(frame["name"] == "readout.weight") & (frame["setting"] == "shape")]
        assert shape[["planned", "found"]].to_numpy().tolist() == [[[17, 64], [17, 128]]]


def test_wrapped_names_are_the_same_parameters() -> None:
    plan, model = made()
    wrapped = torch.nn.ModuleDict({"module": model})
    optimizer = torch.optim.AdamW(
        [
            {**group, "params": [(f"module.{name}", parameter) for name, parameter in group["params"]]}
            for group in plan.param_groups(model)
        ]
    )
    assert audit(plan, {"optimizer": optimizer.state_dict(), "model": wrapped.state_dict()}).empty


def refusal(plan: mt.Plan, dump: Any) -> str:
    with pytest.raises(RequestError) as caught:
        audit(plan, dump)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


class Custom:
    """Something a checkpoint should not hold."""


def test_a_dump_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    plan, model = made()
    nameless = torch.optim.AdamW(model.parameters()).state_dict()
    assert "torch.optim.AdamW(plan.param_groups(model))" in refusal(plan, nameless)
    assert "keys weights" in refusal(plan, {"weights": {}})
    assert "model is of type list" in refusal(plan, {**live(plan.make_optimizer(model)), "model": [1]})
    damaged = plan.make_optimizer(model).state_dict()
    damaged["param_groups"][0]["param_names"].pop()
    assert "names for" in refusal(plan, damaged)
    assert "there is no" in refusal(plan, tmp_path / "missing.pt")
    assert "is a folder" in refusal(plan, tmp_path)
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "not valid JSON" in refusal(plan, tmp_path / "empty.pt")
    torch.save(plan.make_optimizer(model).state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-200])
    assert "not a readable checkpoint" in refusal(plan, tmp_path / "cut.pt")
    (tmp_path / "cut.old").write_bytes(b"\x80\x02}")
    refusal(plan, tmp_path / "cut.old")
    torch.save({"optimizer": Custom()}, tmp_path / "custom.pt")
    assert "not safe to load" in refusal(plan, tmp_path / "custom.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds list" in refusal(plan, tmp_path / "list.pt")
    (tmp_path / "list.json").write_text("[1]")
    assert "holds list" in refusal(plan, tmp_path / "list.json")
