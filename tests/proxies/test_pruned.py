"""Pruning at initialization: scores by finite differences and conservation, exact masks, training under them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.methods import Pruned, erdos_renyi
from mutransfer.planning.multipliers import drawn_mask, masks_of
from mutransfer.planning.plan import matched
from mutransfer.proxies.methods import pruned_densities
from mutransfer.proxies.methods.pruned import SCORES, kept, layer_densities, prune, score, shuffled
from mutransfer.proxies.training import Training
from mutransfer.recipe import Scale

from ..helpers import families
from ..helpers.blobs import blobs

WEIGHTS = ["0.weight", "2.weight", "4.weight"]


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net(activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias), activation(), nn.Linear(8, 7, bias=bias), activation(), nn.Linear(7, 3, bias=bias)
    ).double()


def batch() -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, 6, generator=generator), torch.randint(3, (10,), generator=generator)


def loss(model: nn.Module, given: Any) -> torch.Tensor:
    return F.cross_entropy(model(given[0]), given[1])


def changed(model: nn.Module, name: str, index: tuple[int, int], by: float) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name)[index] += by
    return model


def gradient_norm(model: nn.Module) -> float:
    x, y = batch()
    gradients = torch.autograd.grad(loss(model, (x.double(), y)), [model.get_parameter(name) for name in WEIGHTS])
    return float(sum(g.square().sum() for g in gradients))


@pytest.mark.parametrize("index", [(0, 0), (3, 5), (6, 2)])
def test_snip_and_grasp_are_what_removal_changes(index: tuple[int, int]) -> None:
    """Against finite differences: of the loss along θ, and of the squared norm of its gradient."""
    x, y = batch()
    weight, step = net().get_parameter("2.weight")[index].item(), 1e-5

    def slope(of: Any) -> float:
        up, down = (of(changed(net(), "2.weight", index, sign * step)) for sign in (1, -1))
        return float((up - down) / (2 * step))

    snip = float(score(net(), loss, (x, y), WEIGHTS, "snip")["2.weight"][index])
    assert snip == pytest.approx(abs(weight * slope(lambda model: loss(model, (x.double(), y)).item())), rel=1e-6)
    # d|g|²/dθ = 2 Hg.
    grasp = float(score(net(), loss, (x, y), WEIGHTS, "grasp")["2.weight"][index])
    assert grasp == pytest.approx(weight * slope(gradient_norm) / 2, rel=1e-5)


def test_synflow_is_conserved() -> None:
    """In a network without biases, the scores of every layer add up to R (2006.05467, Theorem 2 for whole layers)."""
    model = net(nn.ReLU, bias=False)
    sums = [each.sum().item() for each in score(model, loss, batch(), WEIGHTS, "synflow").values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)
    ones = torch.ones(10, 6).double()
    for name in WEIGHTS:
        ones = ones @ model.get_parameter(name).detach().abs().T
    assert sums[0] == pytest.approx(float(ones.sum()), rel=1e-12)


def test_synflow_does_not_read_the_data() -> None:
    x, y = batch()
    one, other = (score(net(), loss, (each, y), WEIGHTS, "synflow") for each in (x, 7 * x + 1))
    assert all(torch.equal(one[name], other[name]) for name in WEIGHTS)


@pytest.mark.parametrize("by", sorted(SCORES))
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.03])
def test_the_density_is_exact(by: str, density: float) -> None:
    model = net()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    masks = prune(model, loss, batch(), WEIGHTS, by, density)
    size = sum(model.get_parameter(name).numel() for name in WEIGHTS)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(density * size)
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks.values())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_the_highest_scores_are_kept() -> None:
    scores = {"a": torch.tensor([[3.0, -1.0], [0.0, 9.0]]), "b": torch.tensor([5.0, 2.0])}
    masks = kept(scores, 0.5)
    assert masks["a"].tolist() == [[1, 0], [0, 1]]
    assert masks["b"].tolist() == [1, 0]


@pytest.mark.parametrize("by", sorted(SCORES))
def test_a_readout_of_zeros_does_not_make_all_scores_zero(by: str) -> None:
    model = net()
    nn.init.zeros_(model[4].weight)  # type: ignore[arg-type]
    scores = score(model, loss, batch(), WEIGHTS[:2], by)
    assert all(float(each.abs().max()) > 0 for each in scores.values())


def test_a_shuffled_mask_has_the_same_density_and_other_places() -> None:
    masks = prune(net(), loss, batch(), WEIGHTS, "snip", 0.3)
    other = shuffled(masks, seed=3)
    assert [int(each.sum()) for each in masks.values()] == [int(each.sum()) for each in other.values()]
    assert any(not torch.equal(masks[name], other[name]) for name in WEIGHTS)


@pytest.mark.parametrize("by", sorted(SCORES))
@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet"])
def test_every_model_has_layer_densities(name: str, by: str) -> None:
    family = getattr(families, name)(16, 2)
    densities = layer_densities(family, by, 0.5)  # SynFlow removes whole residual branches at 0.2
    hidden = {row.name: math.prod(row.shape) for row in mt.plan(family, family.base).rows if row.role == "hidden"}
    assert densities.keys() == hidden.keys()
    assert sum(densities[key] * size for key, size in hidden.items()) == pytest.approx(
        0.5 * sum(hidden.values()), abs=0.5
    )


def test_erdos_renyi_gives_the_density_and_leaves_small_layers_dense() -> None:
    shapes = {"small": (4, 4), "wide": (64, 256), "kernel": (32, 16, 3, 3)}
    found = erdos_renyi(shapes, 0.1)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(found[name] * size for name, size in sizes.items()) == pytest.approx(0.1 * sum(sizes.values()))
    assert found["small"] == 1.0
    assert found["kernel"] / found["wide"] == pytest.approx(((32 + 16 + 3 + 3) / 4608) / ((64 + 256) / 16384))


def planned(density: float = 0.1, width: int = 64, **changes: Any) -> mt.Plan:
    method = {"name": "pruned", "density": density, "score": "random", **changes.pop("method", {})}
    recipe = mt.Recipe(lr=2**-7, weight_decay=0.1, method=method, **changes)
    return mt.plan(families.mlp(32, 3), Scale(width, 3), recipe=recipe)


def test_supar_scales_what_remains() -> None:
    """2405.15743, Table 1: init std ∝ (m_in m_ρ)^-½, Adam's lr ∝ 1/(m_in m_ρ); nothing else changes."""
    dense, pruned = planned(1.0), planned(1 / 16)
    for before, after in zip(dense.rows, pruned.rows, strict=True):
        if before.role == "hidden" and len(before.shape) > 1:
            assert after.init.std == pytest.approx(4 * before.init.std)
            assert after.lr == pytest.approx(16 * before.lr)
            assert after.density == 1 / 16
        else:
            assert after == before
    without = planned(1 / 16, method={"rule": "none"})
    assert [row.lr for row in without.rows] == [row.lr for row in dense.rows]
    assert [row.density for row in without.rows] == [row.density for row in pruned.rows]


def test_under_sp_only_the_masks_are_there() -> None:
    method = {"name": "pruned", "density": 0.25, "score": "random"}
    family = families.mlp(32, 3)
    plans = [mt.plan(family, Scale(64, 3), "sp", recipe=mt.Recipe(method=each)) for each in ("backprop", method)]
    assert [row.lr for row in plans[0].rows] == [row.lr for row in plans[1].rows]
    assert {row.density for row in plans[1].rows} == {1.0, 0.25}


def pruned_weights(plan: mt.Plan, model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = matched(plan, model)
    return {row.name: parameters[row.name] for row in plan.rows if row.density != 1}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nadam", "adagrad"])
def test_pruned_weights_stay_zero(optimizer: str) -> None:
    family = families.mlp(32, 3)
    recipe = mt.Recipe(
        lr=2**-7, weight_decay=0.0 if optimizer == "adagrad" else 0.1,
        method={"name": "pruned", "density": 0.1, "score": "random"}, clip=0.5,
    )  # fmt: skip
    plan = mt.plan(family, Scale(64, 3), optimizer=optimizer, recipe=recipe)
    data = blobs("images", noise=1, held_out=8)
    training = Training(family, plan, data, steps=10, batch_size=8, seed=3)
    before = {name: each.detach().clone() for name, each in pruned_weights(plan, training.model).items()}
    assert len(before) == 2
    training.advance(10)
    for name, each in pruned_weights(plan, training.model).items():
        removed = before[name] == 0
        assert int((~removed).sum()) == round(0.1 * removed.numel())
        assert not each[removed].any()
        assert (
            each[~removed] != before[name][~removed]
        ).double().mean() > 0.8  # a unit that never fires has no gradient


def test_masks_depend_on_seed_and_name_alone() -> None:
    one = drawn_mask((40, 30), 0.1, 0, "a")
    assert torch.equal(one, drawn_mask((40, 30), 0.1, 0, "a"))
    assert not torch.equal(one, drawn_mask((40, 30), 0.1, 1, "a"))
    assert not torch.equal(one, drawn_mask((40, 30), 0.1, 0, "b"))
    assert int(one.sum()) == 120


def test_masks_are_saved_and_a_run_resumes(tmp_path: Path) -> None:
    family, plan, data = families.mlp(32, 3), planned(), blobs("images", noise=1, held_out=8)
    whole, first, second = (Training(family, plan, data, steps=8, batch_size=8, seed=seed) for seed in (0, 0, 7))
    whole.advance(8)
    first.advance(4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.advance(8)
    # The data of seed 7 differ, the weights and masks do not: continue with the first run's own data.
    third = Training(family, plan, data, steps=8, batch_size=8, seed=0)
    third.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    third.advance(8)
    assert any(name.endswith(".mask") for name in whole.model.state_dict())
    for one, other in zip(whole.model.state_dict().values(), third.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(masks_of(whole.model).values(), masks_of(second.model).values(), strict=True):
        assert torch.equal(one[0].mask, other[0].mask)


def test_a_plan_is_read_back(tmp_path: Path) -> None:
    plan = planned()
    assert mt.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert "pruned: 2 hidden matrices keep 10.000% of their weights" in str(plan)


def test_a_model_without_masks_is_refused() -> None:
    family, plan = families.mlp(32, 3), planned()
    model = family.built(plan.scale)
    with pytest.raises(
        mt.RequestError, match=r"hidden\.0\.weight has density 0\.1 in the plan, and no mask .* plan\.attach"
    ):
        plan.initialize(model)
    plan.attach(model)
    plan.initialize(model)
    with pytest.raises(mt.RequestError, match=r"density 1 in the plan, and a mask in the model"):
        planned(1.0).initialize(model)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "pruned", "density": 0}, "method: density is 0: it should be greater than 0"),
        ({"name": "pruned", "density": 1.5}, "method: density is 1.5: it should be less than or equal to 1"),
        ({"name": "pruned", "densty": 0.5}, "unknown key 'densty': did you mean 'density'"),
        ("prund", "unknown method 'prund': did you mean 'pruned'"),
        ({"density": 0.5}, "does not name a method"),
    ],
)
def test_wrong_settings_are_refused(method: Any, message: str) -> None:
    with pytest.raises(mt.RequestError, match=message):
        mt.Recipe.read({"method": method}, "recipe")


def test_what_cannot_be_planned_is_refused() -> None:
    family = families.mlp(32, 3)
    with pytest.raises(mt.RequestError, match="have to be measured: pass"):
        mt.plan(family, Scale(64, 3), recipe=mt.Recipe(method={"name": "pruned", "score": "synflow"}))
    with pytest.raises(mt.RequestError, match="muon does not update every weight by itself"):
        mt.plan(family, Scale(64, 3), optimizer="muon", recipe=mt.Recipe(method=Pruned(score="random")))
    with pytest.raises(mt.RequestError, match=r"leaves no weight in hidden\.\d\.weight: raise the density"):
        layer_densities(family, "magnitude", 1e-3)
    with pytest.raises(
        mt.RequestError, match=r"leaves none of the 4096 weights of hidden\.0\.weight: raise method\.density"
    ):
        planned(1e-4)
    with pytest.raises(mt.RequestError, match="no hidden matrix to prune"):
        layer_densities(families.mlp(32, 1), "snip", 0.5)


def test_scored_densities_are_carried_to_any_size() -> None:
    family = families.transformer(32, 2)
    recipe = mt.Recipe(method={"name": "pruned", "density": 0.2, "score": "snip"})
    densities = pruned_densities(recipe, family)
    assert densities is not None
    deep = mt.plan(family, Scale(64, 4), "completep", recipe=recipe, pruned=densities)
    found = {row.name: row.density for row in deep.rows if row.role == "hidden"}
    assert {*found.values()} == {*densities.values()}
    assert pruned_densities(mt.Recipe(), family) is None
