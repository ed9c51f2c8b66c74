"""Exports: the plain-torch JSON means what the plan means, read by the code in its own documentation."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.export import FORMATS, export
from mutransfer.export.pytorch import matches, patterns
from mutransfer.optimizers.rules import OPTIMIZERS
from mutransfer.planning.target import target_config
from mutransfer.proxies.training import multiplier
from mutransfer.recipe import Recipe

from .helpers import families
from .helpers.planned import plan_of

ADAMW = OPTIMIZERS["adamw"]
DOC = Path(__file__).parents[1] / "docs/how-to/export.md"
FAMILIES = {
    "transformer": families.transformer,
    "tied": lambda: families.transformer(tied=True),
    "heads": lambda: families.transformer(head_dim=None, heads=2),
    "mlp": families.mlp,
    "resnet": families.resnet,
}


def target(kind: str = "transformer", optimizer: str = "adamw", **recipe: Any) -> Any:
    family = FAMILIES[kind]()
    base = family.base
    settings = Recipe(lr=2**-7, weight_decay=0.0 if OPTIMIZERS[optimizer].l2 else 0.1, **recipe)
    planned = plan_of(family, base.with_(width=4 * base.width), "mup", optimizer, settings)
    return target_config(
        planned, model=kind, options={}, data="markov", sequence_length=12, proxy=base, proxy_batch_size=4, proxy_steps=30,
        batch_size=4, steps=30, tuned=["lr"], seed=5, provenance={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The functions of the documentation's code blocks, in a namespace without mutransfer."""
    blocks = re.findall(r"```python\n(# read_plan\.py.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        assert "mutransfer" not in block.replace('by mutransfer"', "")
        exec(block, names)
    return names


# The widest model with what shapes can differ in under AdamW and SGD; every other class that can be imported here once.
READ = [
    *((kind, optimizer) for optimizer in ("adamw", "sgd") for kind in FAMILIES),
    *(("transformer", name) for name, rule in OPTIMIZERS.items() if rule.home not in (None, "lion_pytorch")),
]


@pytest.mark.parametrize(("kind", "optimizer"), dict.fromkeys(READ))
def test_the_documented_reader_builds_the_planned_optimizer(
    kind: str, optimizer: str, documented: dict[str, Any], tmp_path: Path
) -> None:
    config = target(kind, optimizer, alpha_output=2.0, alpha_input=3.0)
    name, text = export(config, "pytorch")
    (tmp_path / name).write_text(text, encoding="utf-8")
    model = FAMILIES[kind]().build(config.plan.scale)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    read, _ = documented["load"](tmp_path / name, model)
    planned = config.plan.make_optimizer(model)
    assert type(read) is type(planned)
    assert settings_of(read) == settings_of(planned)
    assert len(read.param_groups) == len(planned.param_groups)
    for row in config.plan.rows:
        weight = model.get_parameter(row.name).detach()
        if row.init.std == 0:
            assert torch.equal(weight, torch.full_like(weight, row.init.a)), row.name
        else:
            # The standard error of a normal sample's std is 1/√(2n); five of them.
            assert weight.std().item() == pytest.approx(row.init.std, rel=5 / math.sqrt(2 * weight.numel())), row.name


class Special(torch.nn.Module):
    """A padding row, a truncated normal, a table, and a random matrix that is no distribution of independent entries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(17, width, padding_idx=3)
        self.up = torch.nn.Linear(width, width, bias=False)
        self.turn = torch.nn.Linear(width, width, bias=False)
        self.rates = torch.nn.Parameter(torch.log(torch.arange(1, 9, dtype=torch.float32)).repeat(width, 1))
        self.readout = torch.nn.Linear(width, 17, bias=False)
        torch.nn.init.trunc_normal_(self.up.weight, std=0.1, a=-0.15, b=0.15)
        torch.nn.init.orthogonal_(self.turn.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.turn(torch.tanh(self.up(self.embedding(x)))) * (self.rates @ torch.full((8,), 0.1)))


def test_the_documented_reader_keeps_parts_bounds_and_what_the_constructor_made(
    documented: dict[str, Any], tmp_path: Path
) -> None:
    family = mt.Family(lambda s: Special(s.width), families.token_batch(), families.loss, mt.Scale(32, 1), "special")
    planned = plan_of(family, mt.Scale(128, 1), recipe=Recipe(lr=2**-7, init_scale=0.5))
    config = replace(target(), plan=planned)
    rows = {row.name: row.init for row in planned.rows}
    assert {init.kind for init in rows.values()} == {"normal", "uniform", "trunc_normal", "recorded"}
    assert "program" not in export(config, "pytorch")[1]
    path = tmp_path / "target.json"
    path.write_text(export(config, "pytorch")[1], encoding="utf-8")
    read, ours = (family.build(planned.scale) for _ in range(2))
    table, turn = read.rates.detach().clone(), read.turn.weight.detach().clone()
    documented["load"](path, read)
    planned.initialize(ours)
    assert torch.equal(read.rates, table)
    torch.testing.assert_close(read.rates, ours.rates)
    for model in (read, ours):
        assert (model.embedding.weight[3] == 0).all()
        assert (model.embedding.weight[[2, 4]] != 0).all()
        bound = rows["up.weight"].high
        assert 0.99 * bound < model.up.weight.abs().max().item() <= bound
        spread = model.turn.weight.std(correction=0).item()
        assert spread == pytest.approx(rows["turn.weight"].std, rel=1e-4)
        square = model.turn.weight @ model.turn.weight.T / (128 * spread**2)
        torch.testing.assert_close(square, torch.eye(128), atol=1e-3, rtol=0)
        for name in ("embedding.weight", "up.weight", "readout.weight"):
            weight = model.get_parameter(name).detach()
            weight = weight[torch.arange(17) != 3] if name.startswith("embedding") else weight
            assert weight.std().item() == pytest.approx(rows[name].std, rel=5 / math.sqrt(2 * weight.numel())), name
    torch.testing.assert_close(read.turn.weight / read.turn.weight.std(), turn / turn.std())


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        name: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in group.items()
            if key not in ("params", "param_names")
        }
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_a_class_of_ones_own_is_passed_in(documented: dict[str, Any], tmp_path: Path) -> None:
    name, text = export(target(optimizer="signum"), "pytorch")
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert json.loads(text)["optimizer"]["module"] is None
    read, _ = documented["load"](tmp_path / name, families.transformer().build(mt.Scale(128, 2)), torch.optim.SGD)
    assert type(read) is torch.optim.SGD


def test_clipping_and_schedule_are_the_plans(documented: dict[str, Any], tmp_path: Path) -> None:
    for schedule in ("constant", "cosine", "linear", "wsd"):
        config = target(schedule=schedule, final=0.1, clip=0.05)
        name, text = export(config, "pytorch")
        (tmp_path / name).write_text(text, encoding="utf-8")
        content = json.loads(text)
        family = families.transformer()
        model = family.build(config.plan.scale)
        optimizer, gauges = documented["load"](tmp_path / name, model)
        assert {gauge for gauge, _ in gauges} == {1.0, 0.25}
        family.loss(model, family.batch).backward()
        ours = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        norm = documented["clip"](gauges, content["clip"])
        theirs = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        for parameter, grad in zip(model.parameters(), ours, strict=True):
            parameter.grad = grad
        assert norm == pytest.approx(config.plan.clip_grad_norm_(model, 0.05).item())
        for parameter, grad in zip(model.parameters(), theirs, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        scheduler = documented["schedule"](optimizer, content)
        for step in range(config.steps):
            expected = multiplier(config.plan.recipe, step, config.steps)
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(group["initial_lr"] * expected)
            optimizer.step()
            scheduler.step()


def test_layers_collapse_only_where_they_agree() -> None:
    rows = target().plan.rows
    found = [entry["pattern"] for entry in patterns(rows, ADAMW)]
    assert "blocks.*.ffn.up.weight" in found
    assert not [pattern for pattern in found if pattern.startswith("blocks.0")]
    odd = tuple(replace(row, lr=7.0) if row.name == "blocks.1.ffn.up.weight" else row for row in rows)
    entries = {entry["pattern"]: entry for entry in patterns(odd, ADAMW)}
    assert "blocks.*.ffn.up.weight" not in entries
    assert entries["blocks.1.ffn.up.weight"]["lr"] == 7.0
    assert entries["blocks.0.ffn.up.weight"]["lr"] != 7.0
    assert "blocks.*.ffn.down.weight" in entries


@pytest.mark.parametrize("field", ["lr", "weight_decay", "eps", "gauge", "init"])
def test_every_setting_can_keep_layers_apart(field: str) -> None:
    rows = target().plan.rows
    other = rows[0].init.scaled(7) if field == "init" else 7.0
    odd = tuple(replace(row, **{field: other}) if row.name == "blocks.1.norm1.weight" else row for row in rows)
    assert "blocks.*.norm1.weight" not in [entry["pattern"] for entry in patterns(odd, ADAMW)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_first_match_is_the_parameters_own(kind: str) -> None:
    rows = target(kind).plan.rows
    for row in rows:
        first = next(entry for entry in patterns(rows, ADAMW) if matches(entry["pattern"], row.name))
        own = {"lr": row.lr, "weight_decay": row.weight_decay, "eps": row.eps, "gauge": row.gauge}
        assert {key: first[key] for key in own} == own
        assert first["init"]["std"] == row.init.std


def test_a_star_is_one_number() -> None:
    assert matches("blocks.*.weight", "blocks.12.weight")
    assert not matches("blocks.*.weight", "blocks.1.ffn.weight")
    assert not matches("blocks.*.weight", "blocksx1.weight")


def test_the_same_text_every_time() -> None:
    assert export(target(), "pytorch") == export(target(), "pytorch")


def test_other_formats_are_refused_with_a_next_move() -> None:
    assert len(FORMATS) == 11
    made = target()
    for name in FORMATS[1:]:
        with pytest.raises(RequestError, match=f"'{name}' is not supported in this version: use --to pytorch"):
            export(made, name)
    with pytest.raises(RequestError, match="did you mean 'megatron'"):
        export(made, "megatrn")
    with pytest.raises(RequestError, match=r"unknown format 'jax': use --to pytorch\."):
        export(made, "jax")
