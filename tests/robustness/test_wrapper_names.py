"""Names under wrappers: whole path components go, letters of real names and a model's own `module` stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mutransfer as mt
from mutransfer.param_names import WRAPPERS, plain_name, planned_names
from mutransfer.planning.audit import audit

from ..helpers import families, trained


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("_orig_mod.module.blocks.0.attention.q.weight", "blocks.0.attention.q.weight"),
        ("module._orig_mod.blocks.0.attention.q.weight", "blocks.0.attention.q.weight"),
        ("blocks.0._orig_mod.attention._checkpoint_wrapped_module.q.weight", "blocks.0.attention.q.weight"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.norm1.weight", "blocks.0.norm1.weight"),
        # letters of "module." at either end: mup's k.strip('module.') makes them "bedding.weight" and "n.out_proj"
        ("module.embedding.weight", "embedding.weight"),
        ("module.mean.out_module", "mean.out_module"),
        ("submodule.modules.weight", "submodule.modules.weight"),
    ],
)
def test_wrappers_go_and_letters_stay(name: str, own: str) -> None:
    assert plain_name(name) == own
    assert planned_names([name], [own]) == {name: own}


def test_the_letters_that_mup_eats() -> None:
    from mup.shape import _dataparallel_hack

    base, _ = _dataparallel_hack({"module.embedding.weight": [1], "module.mlp.weight": [2]}, {"embedding.weight": [1]})
    assert sorted(base) == ["bedding.weight", "p.weight"]


@pytest.mark.parametrize(
    "owners",
    [
        {"module.weight": "module.weight"},
        {"module.module.weight": "module.weight"},
        {"weight": "weight", "module.weight": "module.weight"},
        {"module.weight": "weight", "module.module.weight": "module.weight"},
        {"_orig_mod.module.weight": "weight", "_orig_mod.module.module.weight": "module.weight"},
    ],
)
def test_a_models_own_module_is_told_from_a_wrapper(owners: dict[str, str]) -> None:
    assert planned_names(list(owners), sorted(owners.values())) == owners


components = st.sampled_from(["layer", "module", "m", "weight", "0", "_orig_mod"])
paths = st.lists(components, min_size=1, max_size=4).map(".".join)


@given(st.sets(paths, min_size=1, max_size=6), st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3))
def test_wrapping_the_whole_model_is_always_undone(own: set[str], wrappers: list[str]) -> None:
    """Whatever a model's parameters are called, even "module.module": wrapped as a whole, each finds its own plan."""
    prefix = "".join(f"{wrapper}." for wrapper in wrappers)
    assert planned_names([prefix + name for name in own], own) == {prefix + name: name for name in own}


def checkpointed(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):  # type: ignore[union-attr, arg-type]
        model.blocks[i] = checkpoint_wrapper(block)  # type: ignore[index, operator]
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):  # type: ignore[union-attr, arg-type]
        model.blocks[i] = torch.compile(block, backend="eager")  # type: ignore[index, operator]
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while compiling
@pytest.mark.parametrize("wrap", [checkpointed, compiled_blocks])
def test_wrapped_blocks_train_alike(wrap: Any) -> None:
    case = trained.transformer_case()
    model = wrap(case.model())
    assert any(part in name for name, _ in model.named_parameters() for part in WRAPPERS)
    optimizer = case.plan.make_optimizer(model)
    trained.assert_as_planned(case.plan, optimizer)
    assert trained.relative(trained.train(model, optimizer, case.family.batch), case.undisturbed) < trained.EXACT
    torch.compiler.reset()


class Owner(nn.Module):
    """A model whose only child is called `module`, as a hand-written wrapper's would be."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def test_a_model_that_owns_a_module_is_planned_initialized_and_audited() -> None:
    plain = families.mlp()
    family = mt.Family(lambda s: Owner(plain.build(s)), plain.batch, plain.loss, plain.base)
    plan = mt.plan(family, family.base.with_(width=64))
    assert all(row.name.startswith("module.") for row in plan.rows)
    compiled: Any = torch.compile(family.build(plan.scale), backend="eager")
    plan.initialize(compiled)
    optimizer = torch.optim.AdamW(
        [
            {**group, "params": [(f"_orig_mod.{name}", parameter) for name, parameter in group["params"]]}
            for group in plan.param_groups(compiled)
        ]
    )
    assert audit(plan, {"optimizer": optimizer.state_dict(), "model": compiled.state_dict()}).empty
    optimizer.param_groups[0]["lr"] *= 2
    assert set(audit(plan, optimizer.state_dict())["setting"]) == {"lr"}
