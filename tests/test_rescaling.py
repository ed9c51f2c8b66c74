"""A forward multiplier and its fold train alike: the same losses in float64, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mutransfer.parametrizations.spec import Factors

from .helpers.folds import CASES, RECIPES, both, explicit_optimizer, losses, trained_alike
from .helpers.sets import extended_but


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "sgd"], "adamw"))
@pytest.mark.parametrize("name", CASES)
def test_folded_and_explicit_multipliers_train_alike(name: str, optimizer: str) -> None:
    folded, explicit = trained_alike(name, optimizer)
    assert folded == pytest.approx(explicit, rel=1e-10)


@pytest.mark.parametrize("optimizer", [name for name in RECIPES if name not in ("adamw", "sgd")])
@pytest.mark.parametrize(
    "name", extended_but(["readout, before its bias", "attention alpha", "residual branch"], "readout, before its bias")
)
def test_every_other_optimizer_folds(name: str, optimizer: str) -> None:
    folded, explicit = trained_alike(name, optimizer)
    assert folded == pytest.approx(explicit, rel=1e-10)


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "sgd"], "adamw"))
@pytest.mark.parametrize(
    "name", ["readout alpha", "embedding alpha", "head dim, normed queries", "tied, all alphas", "residual branch"]
)
def test_clipping_is_that_of_the_explicit_model(name: str, optimizer: str) -> None:
    """The norm before clipping too, and clipping does change the run."""
    family, plan, model, twin = both(CASES[name], optimizer)
    norms: dict[str, list[float]] = {"folded": [], "explicit": []}

    def ours(folded: nn.Module) -> None:
        norms["folded"].append(plan.clip_grad_norm_(folded, 0.1).item())

    def torchs(explicit: nn.Module) -> None:
        norms["explicit"].append(nn.utils.clip_grad_norm_(explicit.parameters(), 0.1).item())

    folded = losses(model, plan.make_optimizer(model), family, ours)
    explicit = losses(twin, explicit_optimizer(optimizer, CASES[name], plan, twin), family, torchs)
    assert folded == pytest.approx(explicit, rel=1e-10)
    assert norms["folded"] == pytest.approx(norms["explicit"], rel=1e-9)
    assert max(norms["folded"]) > 0.1
    _, _, again, _ = both(CASES[name], optimizer)
    unclipped = losses(again, plan.make_optimizer(again), family)
    assert unclipped != pytest.approx(folded, rel=1e-4)


def test_a_small_gradient_is_not_clipped() -> None:
    _, plan, model, _ = both(CASES["readout alpha"], "sgd")
    assert plan.clip_grad_norm_(model, 1.0) == 0  # no gradient yet
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-9)
    plan.clip_grad_norm_(model, 1.0)
    assert all((parameter.grad == 1e-9).all() for parameter in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [Factors(lr=1.01), Factors(weight_decay=1.01), Factors(eps=1.01), Factors(init=1.01)])
def test_the_twin_would_notice_a_wrong_fold(wrong: Factors, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Factors.folded
    monkeypatch.setattr(Factors, "folded", lambda self, c, column: right(self, c, column) * wrong)
    family, plan, model, twin = both(CASES["tied"], "adamw")
    folded = losses(model, plan.make_optimizer(model), family)
    explicit = losses(twin, explicit_optimizer("adamw", CASES["tied"], plan, twin), family)
    # a constant's start follows the gauge, which `init` is not: only random weights feel it
    assert (folded == pytest.approx(explicit, rel=1e-10)) == (wrong.init != 1)


def test_factors_multiply() -> None:
    factors = Factors(2, 3, 5, 7, 11) * Factors(1 / 2, 1 / 3, 1 / 5, 1 / 7, 1 / 11)
    assert factors == Factors()
    twice, once = (Factors(3, 3, 3, 3, 3) for _ in range(2))
    assert twice.folded(2, "sgd").folded(0.5, "sgd") == once
    assert twice.folded(2, "adam").folded(3, "adam") == once.folded(6, "adam")
