"""Attention is found however it is written, and scaled by what its own scale lacks of 1/d."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt

from .helpers import families

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    above = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return ((q * q.shape[-1] ** -0.5) @ k.mT).masked_fill(above, -1e9).softmax(-1) @ v


def s(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.25


# name → (how it is written, what µP's 1/d asks of the queries when the head dim grows 4 times)
WAYS: dict[str, tuple[Product, float]] = {
    "fused": (F.scaled_dot_product_attention, 1 / 2),
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), 1 / 2),
    "written out": (lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v, 1 / 2),
    "scaled queries and a mask": (masked, 1 / 2),
    "a tensor's root": (
        lambda q, k, v: (q @ k.mT / torch.full([], q.shape[-1] ** 0.5, dtype=q.dtype)).softmax(-1) @ v,
        1 / 2,
    ),
    "keys and queries share the scale": (lambda q, k, v: ((q * s(q)) @ (k * s(q)).mT).softmax(-1) @ v, 1 / 2),
    "no scale": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, 1 / 4),
    "1/d already": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-1]), 1.0),
    "1/d written out": (lambda q, k, v: (q @ k.mT / q.shape[-1]).softmax(-1) @ v, 1.0),
}


class Attending(nn.Module):
    def __init__(self, width: int, heads: int | None, product: Product) -> None:
        super().__init__()
        self.heads = heads or width // 8
        self.product = product
        self.embedding = nn.Embedding(families.VOCABULARY, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.readout = nn.Linear(width, families.VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.readout(self.product(q, k, v).transpose(1, 2).flatten(2))


def family(product: Product, heads: int | None) -> mt.Family:
    return mt.Family(
        lambda s: Attending(s.width, heads, product), families.token_batch(), families.loss, mt.Scale(32, 1)
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_queries_carry_what_the_models_own_scale_lacks(way: str) -> None:
    product, expected = WAYS[way]
    rows = {row.name: row for row in mt.plan(family(product, heads=4), mt.Scale(128, 1)).rows}
    for name in ("q.weight", "q.bias"):
        assert rows[name].gauge == pytest.approx(expected, rel=1e-5)
    assert rows["q.weight"].init_factor == pytest.approx(expected / 2, rel=1e-5)
    assert rows["k.weight"].gauge == rows["v.weight"].gauge == 1


# heads at a width → the head dim's growth at 40, 64 and 256 over that at 32
GROWTH = {
    "one per 64, at least one": (lambda width: max(1, width // 64), (40 / 32, 64 / 32, 64 / 32)),
    "one per 32, at least two": (lambda width: max(2, width // 32), (20 / 16, 32 / 16, 32 / 16)),
    "one per 16": (lambda width: width // 16, (20 / 16, 1, 1)),
}


@pytest.mark.parametrize("heads", GROWTH)
def test_the_head_dim_is_read_at_the_target(heads: str) -> None:
    """Twice the width says nothing of other widths where the number of heads is a rule of its own."""
    count, growth = GROWTH[heads]
    of = mt.Family(
        lambda s: Attending(s.width, count(s.width), F.scaled_dot_product_attention),
        families.token_batch(), families.loss, mt.Scale(32, 1),
    )  # fmt: skip
    for width, ratio in zip((40, 64, 256), growth, strict=True):
        rows = {row.name: row for row in mt.plan(of, mt.Scale(width, 1)).rows}
        assert rows["q.weight"].gauge == pytest.approx(ratio**-0.5)


@pytest.mark.parametrize("way", WAYS)
def test_a_fixed_head_dim_needs_no_factor(way: str) -> None:
    rows = mt.plan(family(WAYS[way][0], None), mt.Scale(128, 1)).rows
    assert all(row.gauge == 1 or row.role == "output" for row in rows)


@pytest.mark.parametrize("shape", [{"tied": True}, {"head_dim": None, "heads": 2}], ids=["tied", "growing head dim"])
def test_a_folded_multiplier_does_not_fail_the_check(shape: dict[str, Any]) -> None:
    frame = mt.record(families.transformer(depth=1, **shape), [32, 64, 128, 256], seeds=range(6))
    verdict = mt.verdict(frame)
    folded = verdict.slopes[verdict.slopes["module"].isin(["norm", "blocks.0.attention.q"])]
    assert verdict.status != "fail", verdict.cause
    assert folded["slope"].abs().max() < 0.15


def test_a_zero_initialized_readout_may_rest_for_one_step() -> None:
    def build(scale: mt.Scale) -> nn.Module:
        model: Any = families.mlp().build(scale)
        nn.init.zeros_(model.readout.weight)
        nn.init.zeros_(model.readout.bias)
        return model

    frame = mt.record(mt.Family(build, families.image_batch(64), families.loss, mt.Scale(32, 2)), [64, 128, 256])
    slopes = mt.verdict(frame).slopes
    first = slopes[(slopes["statistic"] == "change") & (slopes["step"] == 1) & (slopes["role"] != "output")]
    assert first["slope"].isna().all()
    assert first["ok"].all()


class Fused(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(families.VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.readout = nn.Linear(width, families.VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.embedding(tokens)).unflatten(-1, (3, 4, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.readout(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_fused_qkv_is_refused_where_only_the_queries_should_be_scaled() -> None:
    fused = mt.Family(lambda s: Fused(s.width), families.token_batch(), families.loss, mt.Scale(32, 1))
    with pytest.raises(mt.RequestError, match=r"qkv\.(weight|bias) also produces keys, values or something else"):
        mt.plan(fused, mt.Scale(128, 1))
    assert not mt.plan(fused, mt.Scale(32, 1)).notes


class Gated(Fused):
    """Queries and a gate from one matrix, as in gated attention."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        q, k, gate = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for _ in range(2))
        return self.readout((F.scaled_dot_product_attention(q, k, v) * gate.tanh()).transpose(1, 2).flatten(2))


def test_queries_that_also_gate_are_refused() -> None:
    gated = mt.Family(lambda s: Gated(s.width), families.token_batch(), families.loss, mt.Scale(32, 1))
    with pytest.raises(mt.RequestError, match=r"qkv\.(weight|bias) also produces keys, values or something else"):
        mt.plan(gated, mt.Scale(128, 1))


def test_a_final_norm_that_feeds_a_statistic_is_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(families.VOCABULARY, width)
            self.norm = nn.RMSNorm(width)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.embedding(tokens))
            return x @ self.embedding.weight.T + x.mean()

    tied = mt.Family(lambda s: Pooled(s.width), families.token_batch(), families.loss, mt.Scale(32, 1))
    with pytest.raises(mt.RequestError, match=r"passes its factor to norm\.weight, which also feeds something else"):
        mt.plan(tied, mt.Scale(128, 1))


def test_a_final_norm_that_feeds_another_head_is_refused() -> None:
    class TwoHeads(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(families.VOCABULARY, width)
            self.norm = nn.RMSNorm(width)
            self.value = nn.Linear(width, 1)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.embedding(tokens))
            return x @ self.embedding.weight.T + self.value(x)

    tied = mt.Family(lambda s: TwoHeads(s.width), families.token_batch(), families.loss, mt.Scale(32, 1))
    with pytest.raises(mt.RequestError, match=r"also feeds value\.weight"):
        mt.plan(tied, mt.Scale(128, 1))


def test_a_multiplier_without_attention_is_refused() -> None:
    with pytest.raises(mt.RequestError, match="no attention"):
        mt.plan(families.mlp(), mt.Scale(64, 3), recipe=mt.Recipe(alpha_attention=2.0))


def test_a_special_init_of_a_part_is_kept() -> None:
    def build(scale: mt.Scale) -> nn.Module:
        model: Any = families.mlp().build(scale)
        with torch.no_grad():
            model.readout.bias.zero_()
            model.readout.bias[:3].fill_(5.0)
        return model

    family = mt.Family(build, families.image_batch(), families.loss, mt.Scale(32, 2))
    plan = mt.plan(family, mt.Scale(64, 2))
    model: Any = families.mlp().build(plan.scale)
    plan.initialize(model)
    assert model.readout.bias.tolist() == [5.0] * 3 + [0.0] * 7


class Normalized(Attending):
    """Queries and keys go through norms of their own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 4, F.scaled_dot_product_attention)
        self.q, self.k = (nn.Sequential(each, nn.LayerNorm(width)) for each in (self.q, self.k))


def test_norms_of_queries_and_keys_may_fade_with_them() -> None:
    """Under SGD a gradient that passes their product fades while they are uncorrelated, in the norms' gains as well."""
    of = mt.Family(lambda s: Normalized(s.width), families.token_batch(), families.loss, mt.Scale(32, 1))
    rows = mt.verdict(mt.record(of, [32, 64, 128], optimizer="sgd", seeds=range(3), steps=2)).slopes
    norms = rows[rows["module"].str.startswith(("q.1", "k.1")) & rows["statistic"].isin(["change", "update"])]
    assert set(norms["module"]) >= {"q.1", "k.1", "q.1.weight", "k.1.weight"}
    assert set(norms["role"]) == {"attention", "attention vector"}  # of a module, and of its gains
    assert set(norms["expected"]) == {"-1..0"}
    assert not norms["ok"].eq(False).any()
