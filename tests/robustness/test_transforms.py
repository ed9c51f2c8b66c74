"""Export, functional calls, compilation and tensor rates change how a step is computed, not its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import mutransfer as mt
from mutransfer.coord_check import record, verdict
from mutransfer.recipe import Scale

from ..helpers import trained


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_exported_program_trains_alike(tied: bool) -> None:
    case = trained.transformer_case(tied=tied)
    program = torch.export.export(case.model(), (case.family.batch[0],))
    model = program.module()
    optimizer = case.plan.make_optimizer(model)
    trained.assert_as_planned(case.plan, optimizer)
    assert trained.relative(trained.train(model, optimizer, case.family.batch), case.undisturbed) < trained.EXACT


def test_functional_gradients_train_alike() -> None:
    case = trained.transformer_case()
    model = case.model()
    optimizer = case.plan.make_optimizer(model)
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
        return trained.cross_entropy(torch.func.functional_call(model, weights, batch[0]), batch[1])

    losses = []
    for _ in range(trained.STEPS):
        grads, value = torch.func.grad_and_value(loss)(
            {name: parameter.detach() for name, parameter in parameters.items()}, case.family.batch
        )
        for name, parameter in parameters.items():
            parameter.grad = grads[name]
        optimizer.step()
        losses.append(value.item())
    trained.assert_as_planned(case.plan, optimizer)
    assert trained.relative(losses, case.undisturbed) < trained.EXACT


@pytest.mark.parametrize(("backend", "in_place"), [("aot_eager", False), ("eager", True)], ids=["module", "in place"])
def test_a_compiled_model_trains_alike(backend: str, in_place: bool) -> None:
    case = trained.transformer_case()
    model = case.model()
    compiled: Any = torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
        compiled = model
    optimizer = case.plan.make_optimizer(compiled)
    trained.assert_as_planned(case.plan, optimizer)
    assert trained.relative(trained.train(compiled, optimizer, case.family.batch), case.undisturbed) < trained.EXACT
    torch.compiler.reset()


@pytest.mark.extended
def test_a_compiled_model_of_transformers_trains_alike() -> None:
    case = trained.llama_case()
    compiled: Any = torch.compile(case.model(), backend="aot_eager")
    optimizer = case.plan.make_optimizer(compiled)
    trained.assert_as_planned(case.plan, optimizer)
    assert trained.relative(trained.train(compiled, optimizer, case.family.batch), case.undisturbed) < trained.EXACT
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on compiling an optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled step"])
def test_tensor_learning_rates_are_one_per_group(compiled: bool) -> None:
    """float32, as torch's fused and captured kernels read them: a rate is rounded by up to 6e-8 of itself."""
    case = trained.transformer_case()
    model = case.model()
    optimizer = case.plan.make_optimizer(model, tensor_lr=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len({id(rate) for rate in rates}) == len(rates)
    assert all(rate.dtype == torch.float32 for rate in rates)
    if compiled:
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    losses = trained.train(model, optimizer, case.family.batch)
    assert trained.relative(losses, case.undisturbed) < 1e-6
    planned = {row.name: row.lr for row in case.plan.rows}
    for group in optimizer.param_groups:
        assert {float(torch.tensor(planned[name])) for name in group["param_names"]} == {float(group["lr"])}
    torch.compiler.reset()


def test_a_tensor_as_the_optimizers_own_default_changes_nothing() -> None:
    """What makes mup divide one shared tensor again and again: here no group takes the default."""
    case = trained.transformer_case()
    model = case.model()
    default = torch.tensor(0.5)
    optimizer = torch.optim.AdamW(case.plan.param_groups(model), lr=default, foreach=False)
    trained.assert_as_planned(case.plan, optimizer)
    assert trained.relative(trained.train(model, optimizer, case.family.batch), case.undisturbed) < trained.EXACT
    assert default.item() == 0.5


def normed(model: torch.nn.Module) -> torch.nn.Module:
    """Every linear layer of the blocks by its direction and its sizes."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            weight_norm(module)
    return model


def test_weight_norm_put_on_later_trains_as_in_the_build() -> None:
    """The plan is that of the family whose build has it; the model got its weights without."""
    plain = trained.transformer_case()
    family = replace(plain.family, build=lambda scale: normed(plain.family.build(scale)))
    case = trained.planned(family)
    model, built = normed(plain.model()), family.build(case.plan.scale).double()
    built.load_state_dict(model.state_dict())
    undisturbed = trained.train(built, case.plan.make_optimizer(built), family.batch)
    optimizer = case.plan.make_optimizer(model)
    trained.assert_as_planned(case.plan, optimizer)
    assert sum("original1" in row.name for row in case.plan.rows) >= 8
    assert trained.relative(trained.train(model, optimizer, family.batch), undisturbed) < trained.EXACT
    assert undisturbed[0] == pytest.approx(plain.undisturbed[0], rel=trained.EXACT)  # only the way to learn is another


def test_weight_norm_taken_off_again_trains_alike() -> None:
    case = trained.transformer_case()
    model = normed(case.model())
    for module in list(model.modules()):
        if is_parametrized(module):
            remove_parametrizations(module, "weight")
    optimizer = case.plan.make_optimizer(model)
    trained.assert_as_planned(case.plan, optimizer)
    assert trained.relative(trained.train(model, optimizer, case.family.batch), case.undisturbed) < trained.EXACT


def test_weight_norm_on_a_planned_model_is_refused_by_name() -> None:
    case = trained.transformer_case()
    model = case.model()
    weight_norm(model.readout)  # type: ignore[arg-type]
    with pytest.raises(mt.RequestError, match=r"readout\.parametrizations\.weight\.original0"):
        case.plan.param_groups(model)


def test_weight_norm_in_the_build_is_planned_as_the_plain_matrix() -> None:
    """Its direction starts and moves as the matrix would, its sizes as a vector; the weight that they make is as large."""

    def build(scale: Scale, wrap: Any = weight_norm) -> torch.nn.Module:
        hidden = wrap(torch.nn.Linear(scale.width, scale.width))
        return torch.nn.Sequential(
            torch.nn.Linear(8, scale.width), torch.nn.Tanh(), hidden, torch.nn.Linear(scale.width, 4)
        )

    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    family = mt.Family(build, batch, lambda model, x: model(x).square().mean(), Scale(16))
    plain = replace(family, build=lambda scale: build(scale, lambda linear: linear))
    plan, plain_plan = (mt.plan(each, Scale(256)) for each in (family, plain))
    settings = {row.name: (row.role, row.lr_factor, row.init.std) for row in plan.rows}
    expected = {row.name: (row.role, row.lr_factor, row.init.std) for row in plain_plan.rows}
    assert settings["2.parametrizations.weight.original1"] == expected["2.weight"]
    assert settings["2.parametrizations.weight.original0"][:2] == ("vector", 1.0)
    model = build(plan.scale)
    plan.initialize(model)
    assert model[2].weight.std().item() == pytest.approx(expected["2.weight"][2], rel=0.02)  # type: ignore[index]
    assert verdict(record(family, [16, 32, 64, 128, 256])).status == "pass"


def test_a_normalized_readout_is_as_small_as_a_plain_one() -> None:
    """A row of n entries is √n entries long: the readout's 1/m is 1/√m of its sizes; the check sees it."""

    def build(scale: Scale, wrap: Any) -> torch.nn.Module:
        n = scale.width
        return torch.nn.Sequential(
            torch.nn.Linear(8, n), torch.nn.Tanh(), torch.nn.Linear(n, n), torch.nn.Tanh(), wrap(torch.nn.Linear(n, 4))
        )

    batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    normal, plain = (
        mt.Family(
            lambda scale, wrap=wrap: build(scale, wrap),
            batch,
            lambda model, x: (model(x) - 1).square().mean(),
            Scale(32),
        )
        for wrap in (weight_norm, lambda linear: linear)
    )
    recipe = mt.Recipe(alpha_output=3.0)
    models = []
    for family in (normal, plain):
        plan = mt.plan(family, Scale(2048), recipe=recipe)
        models.append(family.build(plan.scale))
        plan.initialize(models[-1])
    spreads = [model[4].weight.std().item() for model in models]  # type: ignore[index, union-attr, operator]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)
    assert verdict(record(normal, [64, 128, 256, 512, 1024], seeds=range(8))).status == "pass"


def test_a_normalized_branch_end_shrinks_with_the_depth() -> None:
    family = trained.transformer_case().family
    normal = replace(family, build=lambda scale: normed(family.build(scale)))
    plan = mt.plan(normal, normal.base.with_(depth=4 * normal.base.depth), "completep")
    gauges = {row.name: row.gauge for row in plan.rows}
    assert gauges["blocks.5.ffn.down.parametrizations.weight.original0"] == 0.25
    assert gauges["blocks.5.ffn.down.parametrizations.weight.original1"] == 1.0
