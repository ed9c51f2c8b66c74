"""Forward gradients: unbiased, with the variance that theory gives, without anything saved for a backward pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.methods import ForwardGradient
from mutransfer.proxies.methods.forward_gradient import estimate, forward_gradients, tangents
from mutransfer.proxies.training import Training
from mutransfer.recipe import Scale

from ..helpers import families
from ..helpers.blobs import blobs


def net(depth: int = 2, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3)).double()


def batch() -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, 6, generator=generator).double(), torch.randint(3, (10,), generator=generator)


def loss(model: nn.Module, given: Any) -> torch.Tensor:
    return F.cross_entropy(model(given[0]), given[1])


def true_gradient(model: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model, batch()), parameters), strict=True))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.flatten() for each in tensors.values()])


def function_of(model: nn.Module) -> Any:
    return lambda given: F.cross_entropy(functional_call(model, given, (batch()[0],)), batch()[1])


@pytest.mark.parametrize(("derivative", "rel"), [("jvp", 1e-10), ("difference", 1e-4)])
def test_a_directional_derivative_is_the_gradient_along_it(derivative: str, rel: float) -> None:
    model = net()
    at = dict(model.named_parameters())
    along = tangents(at, dict.fromkeys(at, 1.0), 1, seed=0, step=0)
    value, found = estimate(function_of(model), at, along, derivative)
    slope = float(sum((true_gradient(model)[name] * v[0]).sum() for name, v in along.items()))
    assert value.item() == pytest.approx(loss(model, batch()).item(), rel=1e-12)
    for name, each in found.items():
        assert torch.allclose(each, slope * along[name][0], rtol=rel, atol=1e-12)


def test_the_estimate_is_unbiased_with_the_variance_of_theory() -> None:
    """z-scores over tangents have a standard deviation in [0.95, 1.05]; E|g|² = (n + K + 1)/K · |∇f|²."""
    model, draws = net(), 20_000
    at = dict(model.named_parameters())
    gradient = flat(true_gradient(model))
    along = tangents(at, dict.fromkeys(at, 1.0), draws, seed=0, step=0)
    v = torch.cat([each.flatten(1) for each in along.values()], 1)
    each = (v @ gradient).unsqueeze(1) * v  # estimates from one tangent each
    z = (each.mean(0) - gradient) / (each.std(0) / math.sqrt(draws))
    assert 0.9 < z.std().item() < 1.1  # of some 150 numbers; their standard error is 0.06
    n = gradient.numel()
    for count in (1, 4, 16):
        groups = each.unflatten(0, (-1, count)).mean(1)
        ratio = (groups.square().sum(1).mean() / gradient.square().sum()).item()
        assert ratio == pytest.approx((n + count + 1) / count, rel=0.05)
        # The root mean square: the mean of one tangent's is smaller by √(2/π).
        cosine = torch.cosine_similarity(groups, gradient.expand_as(groups)).square().mean().sqrt().item()
        assert cosine == pytest.approx(math.sqrt(count / (count + n + 1)), rel=0.05)


@pytest.mark.parametrize("depth", [2, 8, 32])
def test_nothing_is_saved_for_a_backward_pass(depth: int) -> None:
    model, saved = net(depth), [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, batch())
        backprop = saved[0]
        saved[0] = 0
        scales = dict.fromkeys(dict(model.named_parameters()), 1.0)
        forward_gradients(ForwardGradient(tangents=2), model, loss, batch(), scales, 0, 0)
    assert backprop > 0
    assert saved[0] == 0
    assert all(each.grad is not None for each in model.parameters())


def planned(width: int, covariance: str = "preconditioned", **changes: Any) -> mt.Plan:
    method = {"name": "forward-gradient", "tangents": 4, "covariance": covariance}
    recipe = mt.Recipe(lr=2**-7, momentum=0.0, weight_decay=0.1, alpha_output=2.0, method=method, **changes)
    return mt.plan(families.mlp(16, 3), Scale(width, 3), optimizer="sgd", recipe=recipe)


def test_preconditioned_tangents_have_the_variance_of_the_learning_rates() -> None:
    """The mean update, lr · C ∇f, is that of SGD under µP; and lr · weight decay is the same."""
    plain = mt.plan(
        families.mlp(16, 3), Scale(64, 3), optimizer="sgd",
        recipe=mt.Recipe(lr=2**-7, momentum=0.0, weight_decay=0.1, alpha_output=2.0),
    )  # fmt: skip
    isotropic, preconditioned = planned(64, "isotropic"), planned(64)
    assert [row.lr for row in isotropic.rows] == [row.lr for row in plain.rows]
    assert {row.lr for row in preconditioned.rows} == {2**-7}
    for before, after in zip(plain.rows, preconditioned.rows, strict=True):
        assert after.lr * after.tangent**2 == pytest.approx(before.lr)
        assert after.lr * after.weight_decay == pytest.approx(before.lr * before.weight_decay)
        assert after.init == before.init
    assert mt.Plan.from_dict(preconditioned.as_dict()) == preconditioned


@pytest.mark.parametrize("covariance", ["preconditioned", "isotropic"])
def test_with_many_tangents_training_is_that_by_backpropagation(covariance: str) -> None:
    family, data = families.mlp(16, 3), blobs("images", noise=1, held_out=8)
    plan = planned(32, covariance)
    many = mt.Recipe.read(
        {**plan.recipe.model_dump(), "method": {**plan.recipe.method.model_dump(), "tangents": 4096}}, ""
    )
    plan = mt.plan(family, Scale(32, 3), optimizer="sgd", recipe=many)
    plain = mt.plan(family, Scale(32, 3), optimizer="sgd", recipe=many.with_(method="backprop"))
    ours, theirs = (Training(family, each, data, steps=20, batch_size=8, seed=0) for each in (plan, plain))
    start = [each.detach().clone() for each in ours.model.parameters()]
    ours.advance(1)
    theirs.advance(1)
    moved, expected = (
        torch.cat([(a.detach() - b).flatten() for a, b in zip(each.model.parameters(), start, strict=True)])
        for each in (ours, theirs)
    )
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.6  # √(K / (K + n + 1)) with isotropic tangents
    assert (moved @ expected / (expected @ expected)).item() == pytest.approx(1, abs=0.15)


def test_a_run_resumes_with_the_same_tangents(tmp_path: Path) -> None:
    family, plan, data = families.mlp(16, 3), planned(32), blobs("images", noise=1, held_out=8)
    whole, first, second = (Training(family, plan, data, steps=8, batch_size=8, seed=0) for _ in range(3))
    whole.advance(8)
    first.advance(4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.advance(8)
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet"])
def test_the_built_in_models_have_a_forward_mode(name: str) -> None:
    family = getattr(families, name)(16, 2)
    model = family.built(family.base)
    scales = {key: 1.0 for key, _ in model.named_parameters()}
    value = forward_gradients(ForwardGradient(tangents=2), model, family.loss, family.batch, scales, 0, 0)
    assert value.item() == pytest.approx(family.loss(model, family.batch).item(), rel=1e-4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.readout = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.core(x.unsqueeze(1))[0].squeeze(1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.readout = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.norm(self.first(x)))


@pytest.mark.parametrize(("model", "layer"), [(Recurrent, r"core \(LSTM\)"), (Normed, r"norm \(BatchNorm1d\)")])
def test_a_layer_without_a_forward_mode_is_named(model: type[nn.Module], layer: str) -> None:
    built = model()
    given = tuple(each.float() if each.is_floating_point() else each for each in batch())
    scales = {key: 1.0 for key, _ in built.named_parameters()}
    with pytest.raises(mt.RequestError, match=rf"^{layer} cannot be differentiated in forward mode"):
        forward_gradients(ForwardGradient(tangents=2), built, loss, given, scales, 0, 0)
    value = forward_gradients(ForwardGradient(tangents=2, derivative="difference"), built, loss, given, scales, 0, 0)
    assert math.isfinite(value)


@pytest.mark.parametrize(
    ("optimizer", "method", "message"),
    [
        ("adamw", {"name": "forward-gradient"}, "forward-gradient has a rule for sgd alone"),
        ("sgd", {"name": "forward-gradient", "tangents": "all"}, "tangents is 'all'"),
        ("sgd", {"name": "forward-gradient", "tangents": 0}, "tangents is 0: it should be greater than or equal to 1"),
        ("sgd", {"name": "forward-gradient", "tangent": 3}, "unknown key 'tangent': did you mean 'tangents'"),
    ],
)
def test_wrong_use_is_a_sentence(optimizer: str, method: Any, message: str) -> None:
    with pytest.raises(mt.RequestError, match=message):
        mt.plan(
            families.mlp(16, 3), Scale(32, 3), optimizer=optimizer, recipe=mt.Recipe.read({"method": method}, "recipe")
        )


def test_differences_are_of_one_function() -> None:
    """Both sides see the same dropout masks, and running averages move once."""
    model = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    scales = {key: 1.0 for key, _ in model.named_parameters()}
    method = ForwardGradient(tangents=1, derivative="difference")
    torch.manual_seed(5)
    forward_gradients(method, model, loss, batch(), scales, 0, 0)
    along = tangents(dict(model.named_parameters()), scales, 1, 0, 0)
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    averages = [each.clone() for each in model.buffers()]
    for each in model.modules():
        if isinstance(each, nn.BatchNorm1d):
            each.reset_running_stats()
    torch.manual_seed(5)
    gradients = torch.autograd.grad(loss(model, batch()), list(model.parameters()))
    slope = sum(
        (g * along[name][0]).sum().item() for (name, _), g in zip(model.named_parameters(), gradients, strict=True)
    )
    for name, each in found.items():
        assert torch.allclose(each, slope * along[name][0], rtol=1e-3)
    assert all(torch.allclose(one, other) for one, other in zip(averages, model.buffers(), strict=True))


def test_the_flops_of_a_step() -> None:
    assert ForwardGradient(tangents=1).flops(3.0) == 3.0  # as many products as backpropagation
    assert ForwardGradient(tangents=8).flops(3.0) == 17.0
    assert ForwardGradient(tangents=4, derivative="difference").flops(3.0) == 8.0


def test_a_limit_on_the_norm_is_refused() -> None:
    with pytest.raises(mt.RequestError, match="leave clip out"):
        planned(32, clip=1.0)
