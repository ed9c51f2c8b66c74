"""A copied, saved, reloaded or late-materialized model trains as the original does: the plan knows it by its names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mutransfer as mt

from ..helpers import trained
from ..helpers.trained import Case

CASES = [
    pytest.param(trained.transformer_case, id="transformer"),
    pytest.param(lambda: trained.transformer_case(tied=True), id="tied"),
    pytest.param(trained.llama_case, id="llama"),
]


def deep_copied(case: Case, path: Path) -> nn.Module:
    return copy.deepcopy(case.model())


def saved_and_loaded(case: Case, path: Path) -> nn.Module:
    torch.save(case.model().state_dict(), path)
    model = case.family.build(case.plan.scale).double()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def assigned(case: Case, path: Path) -> nn.Module:
    torch.save(case.model().state_dict(), path)
    with torch.device("meta"):
        model = case.family.build(case.plan.scale)
    model.load_state_dict(torch.load(path, weights_only=True), assign=True)
    _retie(model, case)
    _buffers(model, case)
    return model


def materialized(case: Case, path: Path) -> nn.Module:
    with torch.device("meta"):
        model = case.family.build(case.plan.scale)
    model = model.double().to_empty(device="cpu")
    _retie(model, case)
    _buffers(model, case)
    case.plan.initialize(model, seed=5)
    return model


def _retie(model: nn.Module, case: Case) -> None:
    """assign=True and to_empty untie, in any library: what was tied is tied again, or the plan refuses."""
    if "readout.weight" in dict(model.named_parameters()) and "readout.weight" not in case.planned:
        with pytest.raises(mt.RequestError, match=r"readout\.weight"):
            case.plan.param_groups(model)
        model.readout.weight = model.embedding.weight  # type: ignore[union-attr, assignment]


def _buffers(model: nn.Module, case: Case) -> None:
    """Buffers outside the state dict are the model's business (rotary frequencies), not the plan's."""
    for name, theirs in case.model().named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, theirs)


@pytest.mark.parametrize("disturbed", [deep_copied, saved_and_loaded, assigned, materialized])
@pytest.mark.parametrize("make", CASES)
def test_a_copy_trains_alike(make: Callable[[], Case], disturbed: Any, tmp_path: Path) -> None:
    case = make()
    model = disturbed(case, tmp_path / "model.pt")
    optimizer = case.plan.make_optimizer(model)
    trained.assert_as_planned(case.plan, optimizer)
    losses = trained.train(model, optimizer, case.family.batch)
    assert trained.relative(losses, case.undisturbed) < trained.EXACT
    trained.assert_as_planned(case.plan, optimizer)


def test_a_model_copied_after_its_optimizer_was_made_needs_one_of_its_own() -> None:
    """The deep copy of a pair shares nothing with the original pair, and goes on as it does."""
    case = trained.transformer_case()
    model = case.model()
    optimizer = case.plan.make_optimizer(model)
    first = trained.train(model, optimizer, case.family.batch, steps=2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    trained.assert_as_planned(case.plan, twin_optimizer)
    rest = trained.train(model, optimizer, case.family.batch, steps=3)
    assert trained.train(twin, twin_optimizer, case.family.batch, steps=3) == rest
    assert trained.relative(first + rest, case.undisturbed) < trained.EXACT


def test_a_run_resumes_in_the_middle(tmp_path: Path) -> None:
    """The optimizer of the second half starts from other groups: what was saved is in force, and it is the plan's."""
    case = trained.transformer_case()
    model = case.model()
    first = case.plan.make_optimizer(model)
    losses = trained.train(model, first, case.family.batch, steps=2)
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = case.family.build(case.plan.scale).double()
    model.load_state_dict(saved["model"])
    second = case.plan.make_optimizer(model)
    for group in second.param_groups:
        group["lr"] = 1.0
    second.load_state_dict(saved["optimizer"])
    trained.assert_as_planned(case.plan, second)
    losses += trained.train(model, second, case.family.batch, steps=3)
    assert trained.relative(losses, case.undisturbed) < trained.EXACT


def test_the_tests_would_notice_a_lost_setting() -> None:
    """One learning rate for all, as after mup's failures: far from the undisturbed losses."""
    case = trained.transformer_case()
    model = case.model()
    optimizer = case.plan.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = case.plan.recipe.lr
    losses = trained.train(model, optimizer, case.family.batch)
    assert trained.relative(losses, case.undisturbed) > 1e-3
    with pytest.raises(AssertionError):
        trained.assert_as_planned(case.plan, optimizer)
