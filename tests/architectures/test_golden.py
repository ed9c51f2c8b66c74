"""Roles of transformers' models, against tables written by hand from the papers' definitions."""

from __future__ import annotations

import functools
from fractions import Fraction

import pytest

import mutransfer as mt
from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import Observation

from ..helpers.configs import family
from ..helpers.golden import CARRIERS, CONSTANTS, GOLDEN, read
from ..helpers.sets import extended_but

# TP-V 2203.03466, Table 3, at four times the width on every axis that grows: lr, init, eps, wd for AdamW, then lr for SGD.
FACTORS = {
    "input": (1, 1, "1/4", 1, 4),
    "vector": (1, 1, "1/4", 1, 4),
    "hidden": ("1/4", "1/2", "1/4", 4, 1),
    "output": ("1/4", "1/4", 1, 4, "1/4"),
    "bottleneck": ("1/4", "1/2", 1, 4, "1/4"),
    "finite": (1, 1, 1, 1, 1),
}
# A final norm before a tied readout takes the readout's factor c as well: lr·c, eps/c, wd/c; SGD lr·c². T5's own d^-½ is
# already half of the way: c = ½ there, and ¼ elsewhere.
FINAL_NORM = {"t5": ("1/2", None, "1/2", 2, 1)}
FINAL_NORM |= dict.fromkeys(("gpt2", "bert", "mamba"), ("1/4", None, 1, 4, "1/4"))


QUICK = ("gpt2", "llama", "bert", "t5", "resnet")


@functools.cache
def seen(kind: str) -> tuple[Family, Observation]:
    options = (
        {"width_fields": ["hidden_size", "intermediate_size", "num_attention_heads"]} if "fixed kv" in kind else {}
    )
    found = family(kind.partition("+")[0], **options)
    return found, observe(found)


@pytest.mark.parametrize("kind", extended_but(GOLDEN, *QUICK))
def test_roles_places_and_ties(kind: str) -> None:
    expected, (_, observation) = read(GOLDEN[kind]), seen(kind)
    found = {
        name: (spec.role, "end" if spec.ends_branch else "in" if spec.inside else "-", spec.tied)
        for name, spec in observation.specs.items()
    }
    assert found == {name: (row.role, row.place, row.tied) for name, row in expected.items()}
    carriers = [spec.carriers for spec in observation.specs.values() if spec.tied]
    assert carriers == ([CARRIERS[kind]] if kind in CARRIERS else [])
    constants = {name: spec.constant for name, spec in observation.specs.items() if spec.constant}
    assert constants == CONSTANTS.get(kind, {})


@pytest.mark.parametrize("kind", extended_but(GOLDEN, *QUICK))
def test_ratios_of_every_axis(kind: str) -> None:
    expected, (of, observation) = read(GOLDEN[kind]), seen(kind)
    plan = mt.plan(of, Scale(4 * of.base.width, of.base.depth), observation=observation)
    assert {row.name: (row.m_in, row.m_out) for row in plan.rows} == {n: (r.m_in, r.m_out) for n, r in expected.items()}


@pytest.mark.parametrize("kind", extended_but(GOLDEN, *QUICK))
def test_factors_of_every_parameter(kind: str) -> None:
    expected, (of, observation) = read(GOLDEN[kind]), seen(kind)
    scale = Scale(4 * of.base.width, of.base.depth)
    adamw, sgd = (mt.plan(of, scale, optimizer=name, observation=observation) for name in ("adamw", "sgd"))
    for row, other in zip(adamw.rows, sgd.rows, strict=True):
        carries = row.name in CARRIERS.get(kind, ())
        factors = FINAL_NORM[kind] if carries else FACTORS[expected[row.name].role]
        lr, init, eps, wd, sgd_lr = (float(Fraction(each)) if each is not None else None for each in factors)
        assert (row.lr_factor, row.eps_factor, row.wd_factor) == pytest.approx((lr, eps, wd)), row.name
        assert row.init_factor in (None, pytest.approx(init)), row.name  # None: a constant stays
        assert other.lr_factor == pytest.approx(sgd_lr), row.name


def test_attention_keeps_its_head_dim() -> None:
    """And what carries a factor into the queries is their own projection, but for GPT-2's fused one."""
    for kind in ("llama", "bert", "vit", "t5"):
        _, observation = seen(kind)
        assert observation.heads.dim == 16
        assert observation.heads.ratio == 1
        assert not observation.shared_queries
    assert seen("gpt2")[1].shared_queries == {
        f"transformer.h.{i}.attn.c_attn.{x}" for i in (0, 1) for x in ("weight", "bias")
    }
    assert seen("llama")[1].queries == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


@pytest.mark.extended
def test_a_last_state_that_nobody_reads_is_no_branch() -> None:
    """RWKV's recurrence makes a state for a next token that does not come; CompleteP would refuse a branch without an end."""
    of, observation = seen("rwkv")
    assert not observation.open_branches
    mt.plan(of, Scale(of.base.width, 2 * of.base.depth), "completep", observation=observation)


def test_a_table_that_every_layer_projects_is_no_layers_own() -> None:
    spec = seen("deberta-v2")[1].specs["deberta.encoder.rel_embeddings.weight"]
    assert (spec.role, spec.inside) == ("input", False)


def test_branches_added_one_after_the_other_to_one_stream() -> None:
    """Cohere's x + attention + mlp."""
    ends = {name for name, spec in seen("cohere")[1].specs.items() if spec.ends_branch}
    assert ends == {f"model.layers.{i}.{end}.weight" for i in (0, 1) for end in ("self_attn.o_proj", "mlp.down_proj")}
