"""mup's files and models, in both directions: same base shapes, same settings, same losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mup
import pytest
import torch
from mup.shape import make_base_shapes
from torch import nn

import mutransfer as mt
from mutransfer.interop.mup import based_on, plan_annotated, read_bsh, write_bsh
from mutransfer.parametrizations.spec import Factors
from mutransfer.tracing.observe import observe

from ..helpers import families
from ..helpers.planned import plan_of
from ..helpers.sets import extended_but
from ..test_oracle_mup import losses


class Uneven(nn.Module):
    """Its second layer grows with the square of the width, so that fan-in and fan-out have ratios of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle = nn.Linear(width, width**2 // 32)  # first, and not proportional
        self.input = nn.Linear(64, width)
        self.readout = nn.Linear(width**2 // 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.relu(self.middle(torch.relu(self.input(x.flatten(1))))))


def uneven() -> mt.Family:
    return mt.Family(lambda s: Uneven(s.width), families.image_batch(), families.loss, mt.Scale(32), "uneven")


FAMILIES: dict[str, Callable[[], mt.Family]] = {
    "mlp": families.mlp,
    "uneven": uneven,
    "resnet": families.resnet,
    "transformer": lambda: families.transformer(kv_share=2, ffn_ratio=3.0),
    "tied": lambda: families.transformer(tied=True),
    "fixed kv heads": lambda: families.transformer(width=32, kv_heads=1),
}
TRAINED = ["mlp", "uneven", "resnet", "transformer", "tied"]
RECIPES = {
    "adamw": mt.Recipe(lr=2**-7, weight_decay=0.1, decay="all", eps=1e-30),
    "adam": mt.Recipe(lr=2**-7, eps=1e-30),
    "sgd": mt.Recipe(lr=2**-3, weight_decay=1e-3, decay="all", momentum=0.9),
}


def wide(family: mt.Family, times: int) -> mt.Scale:
    return family.base.with_(width=times * family.base.width)


# Base shape files


@pytest.mark.parametrize("kind", FAMILIES)
def test_mup_reads_what_we_write_as_its_own_base_and_delta(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]()
    path = str(write_bsh(family, tmp_path / "model.bsh"))
    base, delta = family.build(family.base), family.build(wide(family, 2))
    ours, theirs = (family.build(wide(family, 4)) for _ in range(2))
    # do_assert: mup refuses bottlenecks, and a plain readout is one to it
    mup.set_base_shapes(ours, path, do_assert=False, rescale_params=False)
    mup.set_base_shapes(theirs, base, delta=delta, do_assert=False, rescale_params=False)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.infshape == b.infshape, name
        assert [dim.base_dim for dim in a.infshape] == [dim.base_dim for dim in b.infshape], name
    assert any(parameter.infshape.ninf() == 2 for parameter in ours.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_we_read_what_mup_writes(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]()
    base, delta = family.build(family.base), family.build(wide(family, 2))
    make_base_shapes(base, delta, savefile=str(tmp_path / "theirs.bsh"))
    assert read_bsh(tmp_path / "theirs.bsh") == read_bsh(write_bsh(family, tmp_path / "ours.bsh"))


def test_an_observation_writes_its_own_depth(tmp_path: Path) -> None:
    family = families.transformer()
    deep = read_bsh(write_bsh(observe(family.with_base(family.base.with_(depth=5))), tmp_path / "deep.bsh"))
    assert deep.keys() > read_bsh(write_bsh(family, tmp_path / "base.bsh")).keys()
    assert deep["blocks.4.ffn.up.weight"] == (64, 32)
    assert deep["embedding.weight"] == (None, 32)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", FAMILIES)
def test_base_shapes_give_the_family_its_base(kind: str, prefix: str, tmp_path: Path) -> None:
    """Also saved from a model under DDP, where mup itself eats letters."""
    family = FAMILIES[kind]()
    shapes = {prefix + name: axes for name, axes in read_bsh(write_bsh(family, tmp_path / "model.bsh")).items()}
    elsewhere = family.with_base(wide(family, 4))
    assert based_on(elsewhere, shapes).base == family.base
    assert mt.plan(based_on(elsewhere, shapes), wide(family, 8)).rows == plan_of(family, wide(family, 8)).rows


def test_base_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    family = families.mlp()
    shapes = read_bsh(write_bsh(family, tmp_path / "model.bsh"))
    cases: dict[str, dict[str, Any]] = {
        r"the base shapes have a parameter 'more'": {**shapes, "more": (3,)},
        r"the model has a parameter 'input\.bias'": {k: v for k, v in shapes.items() if k != "input.bias"},
        r"input\.weight has the base shape \[32, 64\], but \[32, fixed\] in the model": {
            **shapes,
            "input.weight": (32, 64),
        },
        r"hidden\.1\.bias has the base shape \[48\], but \[32\] in mlp at width 32": {**shapes, "hidden.1.bias": (48,)},
    }
    for sentence, wrong in cases.items():
        with pytest.raises(mt.RequestError, match=sentence):
            based_on(family, wrong)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read"),
        ("a: [", "is not YAML"),
        ("[1, 2]", "does not map parameter names"),
        ("w: [64, wide]", r"gives w the shape \[64, 'wide'\]"),
        ("w: [0, null]", r"gives w the shape"),
    ],
)
def test_a_file_that_is_none_is_refused(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.bsh").write_text(content)
    with pytest.raises(mt.RequestError, match=sentence):
        read_bsh(tmp_path / "x.bsh")


# Annotated models


def written_for_mup(family: mt.Family, tied: bool, output_mult: float = 1.0) -> Callable[[mt.Scale], nn.Module]:
    """The same family as a user of mup writes it."""

    def build(scale: mt.Scale) -> nn.Module:
        model: Any = family.build(scale)
        old = model.readout
        if tied:
            model.readout = mup.MuSharedReadout(model.embedding.weight, bias=False, output_mult=output_mult)
        else:
            bias = old.bias is not None
            model.readout = mup.MuReadout(old.in_features, old.out_features, bias=bias, output_mult=output_mult)
        return model.double()

    return build


def annotated(kind: str, times: int, output_mult: float = 1.0) -> tuple[mt.Family, nn.Module]:
    family = FAMILIES[kind]()
    build = written_for_mup(family, kind == "tied", output_mult)
    model = build(wide(family, times))
    return family, mup.set_base_shapes(model, build(family.base), delta=build(wide(family, 2)))


@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("kind", TRAINED)
def test_settings_are_those_of_the_plain_familys_plan(kind: str, optimizer: str) -> None:
    """Roles and ratios too; the readout's after folding mup's forward multiplier back in."""
    recipe = RECIPES[optimizer].with_(eps=1e-8)
    family, model = annotated(kind, 4)
    found = {row.name: row for row in plan_annotated(model, optimizer, recipe).rows}
    plain = plan_of(family, wide(family, 4), "mup", optimizer, recipe)
    assert found.keys() == {row.name for row in plain.rows}
    for row in plain.rows:
        ours = found[row.name]
        assert (ours.shape, ours.role, ours.m_in, ours.m_out) == (row.shape, row.role, row.m_in, row.m_out)
        fold = Factors()
        if row.name == "readout.weight" or (kind == "tied" and row.name == "norm.weight"):
            fold = Factors().folded(
                1 / row.m_in if row.role == "output" else 1 / 4, "sgd" if optimizer == "sgd" else "adam"
            )
        assert ours.lr * fold.lr == pytest.approx(row.lr), row.name
        assert ours.weight_decay * fold.weight_decay == pytest.approx(row.weight_decay), row.name
        assert ours.gauge * fold.gauge == pytest.approx(row.gauge), row.name
        if row.eps is not None and ours.eps is not None:
            assert ours.eps * fold.eps == pytest.approx(row.eps), row.name


def mup_optimizer(name: str, model: nn.Module, recipe: mt.Recipe) -> torch.optim.Optimizer:
    adam = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    match name:
        case "adamw":
            return mup.MuAdamW(model.parameters(), **adam, weight_decay=recipe.weight_decay)
        case "adam":
            return mup.MuAdam(model.parameters(), **adam)
        case _:
            sgd = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
            return mup.MuSGD(model.parameters(), **sgd)


@pytest.mark.parametrize("optimizer", extended_but(RECIPES, "adamw", "sgd"))
@pytest.mark.parametrize("kind", TRAINED)
def test_losses_equal_those_of_mups_own_optimizer(kind: str, optimizer: str) -> None:
    recipe = RECIPES[optimizer]
    family, model = annotated(kind, 4, output_mult=2.0)
    plan = plan_annotated(model, optimizer, recipe)
    assert kind == "tied" or any("MuReadout" in note for note in plan.notes)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    theirs = losses(model, mup_optimizer(optimizer, model, recipe), family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    ours = losses(model, plan.make_optimizer(model), family)
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_readout_may_be_folded_into_a_plain_model() -> None:
    """What the docstring says: output_mult / width_mult into the weight, nn.Linear in place, and the plain plan."""
    recipe = RECIPES["adamw"]
    family, model = annotated("transformer", 4)
    plain = copy.deepcopy(family.build(wide(family, 4)).double())
    with torch.no_grad():
        for (name, to), (_, parameter) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            to.copy_(parameter / 4 if name == "readout.weight" else parameter)
    here = plan_annotated(model, recipe=recipe).make_optimizer(model)
    there = plan_of(family, wide(family, 4), recipe=recipe).make_optimizer(plain)
    assert losses(plain, there, family) == pytest.approx(losses(model, here, family), rel=1e-9)


def test_measured_weights_are_described() -> None:
    _, model = annotated("mlp", 4)
    rows = {row.name: row for row in plan_annotated(model).rows}
    weight = dict(model.named_parameters())["hidden.0.weight"]
    assert rows["hidden.0.weight"].init.std == pytest.approx(weight.std(correction=0).item())


class Low(nn.Module):
    """A fixed-rank bottleneck and a stack with three growing axes, which mup's own check lets pass only if told to."""

    def __init__(self, width: int, stack: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width, 4)
        if stack:
            self.stack = nn.Parameter(torch.zeros(width, width, width))


def test_what_mup_would_mistake() -> None:
    low = mup.set_base_shapes(
        Low(64, False), Low(32, False), delta=Low(16, False), do_assert=False, rescale_params=False
    )
    rows = {row.name: row for row in plan_annotated(low).rows}
    assert (rows["down.weight"].role, rows["down.weight"].lr_factor) == ("bottleneck", 0.5)
    high = mup.set_base_shapes(Low(8, True), Low(4, True), delta=Low(2, True), do_assert=False, rescale_params=False)
    with pytest.raises(mt.RequestError, match=r"stack \[8, 8, 8\] has 3 growing axes"):
        plan_annotated(high)


def deconvolutions(width: int, fixed: int = 3) -> nn.Module:
    """Transposed convolutions hold [in, out / groups, ...]; a recurrence's projection is no `nn.Linear`."""
    return nn.ModuleDict({
        "first": nn.ConvTranspose2d(fixed, width, 2),
        "middle": nn.ConvTranspose1d(width, width**2 // 8, 2),
        "last": nn.ConvTranspose3d(width, fixed, 2),
        "depthwise": nn.ConvTranspose2d(width, width, 2, groups=width, bias=False),
        "grouped": nn.ConvTranspose2d(width, width, 2, groups=width // 8),
        "few groups": nn.ConvTranspose2d(width, 4, 2, groups=2),
        "recurrence": nn.LSTM(fixed, width, proj_size=2),
    })  # fmt: skip


def test_fan_in_is_what_the_operation_sums_over() -> None:
    model = mup.set_base_shapes(
        deconvolutions(64), deconvolutions(16), delta=deconvolutions(32), do_assert=False, rescale_params=False
    )
    rows = {row.name: (row.role, row.m_in, row.m_out) for row in plan_annotated(model).rows}
    assert rows["first.weight"] == ("input", 1, 4)
    assert rows["middle.weight"] == ("hidden", 4, 16)
    assert rows["last.weight"] == rows["few groups.weight"] == rows["recurrence.weight_hr_l0"] == ("bottleneck", 4, 1)
    assert rows["depthwise.weight"] == rows["grouped.weight"] == rows["recurrence.weight_hh_l0"] == ("input", 1, 4)


def test_groups_that_may_or_may_not_grow_are_refused() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(width, width // 4, 2, groups=width // 8, bias=False))

    model = mup.set_base_shapes(build(64), build(16), delta=build(32), do_assert=False, rescale_params=False)
    with pytest.raises(
        mt.RequestError, match=r"groups of 0\.weight \[64, 2, 2, 2\] grow with the width: give it a bias"
    ):
        plan_annotated(model)


def test_models_without_fitting_base_shapes_are_refused() -> None:
    family, model = annotated("mlp", 4)
    with pytest.raises(mt.RequestError, match=r"input\.weight \[128, 64\] has no base shapes: call"):
        plan_annotated(copy.deepcopy(model))
    with pytest.raises(mt.RequestError, match="no axis of the annotated model grows"):
        plan_annotated(mup.set_base_shapes(family.build(family.base), None))
    with pytest.raises(mt.RequestError, match=r"alpha_output 2: .*output_mult"):
        plan_annotated(model, recipe=mt.Recipe(alpha_output=2))
    other: Any = model
    other.input.weight.data = torch.zeros(16, 64, dtype=torch.float64)
    with pytest.raises(mt.RequestError, match=r"input\.weight has shape \[16, 64\] and base shapes for \[128, 64\]"):
        plan_annotated(model)
