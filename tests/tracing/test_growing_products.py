"""Dot products of activations that grow with the width: logits of two towers, and attention without a softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.planning.plan import ParameterPlan, Plan
from mutransfer.tracing.observe import observe

from ..helpers.sets import extended_but

WIDE = mt.Scale(64, 2)
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Towers(nn.Module):
    def __init__(self, width: int, score: Score, last: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.q, self.p = (nn.Sequential(nn.Linear(5, width), nn.GELU(), last(width)) for _ in range(2))
        self.score = score

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.q(x[:, 0]), self.p(x[:, 1]))


def towers(score: Score, last: Callable[[int], nn.Module] = lambda n: nn.Linear(n, n), **roles: Any) -> mt.Family:
    torch.manual_seed(0)

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        return F.cross_entropy(logits, torch.arange(6)) if logits.dim() > 1 else F.mse_loss(logits, torch.ones(6))

    return mt.Family(lambda s: Towers(s.width, score, last), torch.randn(6, 2, 5), loss, mt.Scale(16, 2), **roles)


def rows(planned: Plan) -> dict[str, ParameterPlan]:
    return {row.name: row for row in planned.rows}


SCORES: dict[str, tuple[Score, float]] = {
    "matmul": (lambda q, p: q @ p.T, 0.25),
    "bmm": (lambda q, p: (q[:, None] @ p[:, :, None])[:, 0, 0], 0.25),
    "einsum": (lambda q, p: torch.einsum("id,jd->ij", q, p), 0.25),
    "by entries": (lambda q, p: (q * p).sum(-1), 0.25),
    "by entries, in float, all pairs": (lambda q, p: (q[:, None] * p).float().sum(2), 0.25),
    "over √d": (lambda q, p: q @ p.T / q.shape[-1] ** 0.5, 0.5),
    "by entries over √d": (lambda q, p: (q * p).sum(-1) * q.shape[-1] ** -0.5, 0.5),
    "one side over √d": (lambda q, p: (q * q.shape[-1] ** -0.5) @ p.T, 0.5),
    "over d": (lambda q, p: q @ p.T / q.shape[-1], 1.0),
    "mean": (lambda q, p: (q * p).mean(-1), 1.0),
    "cosine": (lambda q, p: 10 * F.normalize(q, dim=-1) @ F.normalize(p, dim=-1).T, 1.0),
    "cosine_similarity": (lambda q, p: F.cosine_similarity(q[:, None], p[None], dim=-1), 1.0),
    "normalized on one side, over √d": (lambda q, p: F.normalize(q, dim=-1) @ p.T / q.shape[-1] ** 0.5, 1.0),
}


@pytest.mark.parametrize("way", SCORES)
def test_logits_of_two_towers(way: str) -> None:
    """The product ends up with 1/d in all, whatever of it the model has itself."""
    score, c = SCORES[way]
    planned = mt.plan(towers(score), WIDE)
    found = rows(planned)
    for name in ("q.2.weight", "q.2.bias"):
        assert found[name].gauge == pytest.approx(c)
    assert found["q.2.weight"].lr_factor == pytest.approx(c / 4)
    assert found["p.2.weight"].gauge == 1
    assert not any("acts on no parameter's result" in note for note in planned.notes)
    assert (c == 1) == (not planned.notes)
    assert all(row.lr_factor == 1 for row in mt.plan(towers(score), WIDE, "sp").rows)


@pytest.mark.parametrize("last", [lambda n: nn.Sequential(nn.Linear(n, n), nn.ReLU())])
def test_what_no_parameter_carries_is_refused_and_an_override_says_it(last: Any) -> None:
    score = SCORES["matmul"][0]
    with pytest.raises(
        mt.RequestError, match=r"multiplied and summed over 16 entries at the base and 4 times"
    ) as refused:
        mt.plan(towers(score, last), WIDE)
    assert "roles={'p.2.0.*': 'output'}" in str(refused.value)
    row = rows(mt.plan(towers(score, last, roles={"p.2.0.*": "output"}), WIDE))["p.2.0.weight"]
    folded = rows(mt.plan(towers(score), WIDE))["q.2.weight"]
    assert (row.lr_factor, row.wd_factor, row.eps_factor) == (folded.lr_factor, folded.wd_factor, folded.eps_factor)


def test_distances_between_two_towers_are_refused_and_of_one_are_folded_on_both_sides() -> None:
    with pytest.raises(mt.RequestError, match="multiply the sum by base width / width"):
        mt.plan(towers(lambda q, p: -(torch.cdist(q, p) ** 2)), WIDE)
    assert not mt.plan(towers(lambda q, p: -(torch.cdist(q, p) ** 2) / q.shape[-1]), WIDE).notes

    class One(Towers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(self.q(x[:, 0]), self.q(x[:, 1]))

    def build(scale: mt.Scale) -> nn.Module:
        model = One(scale.width, lambda a, b: a @ b.T, lambda n: nn.Linear(n, n))
        del model.p
        return model

    of = mt.Family(build, torch.randn(6, 2, 5), lambda m, x: F.cross_entropy(m(x), torch.arange(6)), mt.Scale(16, 2))
    found = rows(mt.plan(of, WIDE))
    assert found["q.2.weight"].gauge == found["q.2.bias"].gauge == 0.5


def test_a_shared_side_is_refused() -> None:
    """The table of items is read by the encoder too, and so is the user's state by another head."""

    class Net(nn.Module):
        def __init__(self, scale: mt.Scale) -> None:
            super().__init__()
            self.items, self.mix = nn.Embedding(7, scale.width), nn.Linear(scale.width, scale.width)
            self.other = nn.Linear(scale.width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = self.mix(self.items(x))
            return self.other(state).square().mean() + F.cross_entropy(state @ self.items.weight[:7].T, x)

    of = mt.Family(Net, torch.arange(7), lambda m, x: m(x), mt.Scale(16, 2))
    with pytest.raises(mt.RequestError):
        mt.plan(of, WIDE)


class Attending(nn.Module):
    def __init__(self, width: int, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.attend = attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each(self.norm(x)).unflatten(-1, (4, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, scale: mt.Scale, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.first, self.readout = nn.Linear(5, scale.width), nn.Linear(scale.width, 3)
        self.blocks = nn.ModuleList(Attending(scale.width, attend) for _ in range(scale.depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.mT / q.shape[-1] ** 0.5


def normalized(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    e = (scores(q, k) - scores(q, k).amax(-1, keepdim=True)).exp()
    return e / (1 + e.sum(-1, keepdim=True))


ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "sigmoid": lambda q, k, v: (scores(q, k) - 2).sigmoid() @ v,
    "relu": lambda q, k, v: scores(q, k).relu() / 7 @ v,
    "retention": lambda q, k, v: scores(q, k).tril() @ v,
    "by entries": lambda q, k, v: ((q[..., None, :] * k[..., None, :, :]).sum(-1) / q.shape[-1] ** 0.5).softmax(-1) @ v,
    "by hand": lambda q, k, v: normalized(q, k) @ v,
    "capped": lambda q, k, v: (5 * (scores(q, k) / 5).tanh()).softmax(-1) @ v,
}


@pytest.mark.parametrize("way", ATTENTIONS)
def test_attention_however_it_weights(way: str) -> None:
    of = mt.Family(
        lambda s: Net(s, ATTENTIONS[way]), torch.randn(3, 7, 5), lambda m, x: m(x).square().mean(), mt.Scale(16, 2)
    )
    planned = mt.plan(of, WIDE)
    found = rows(planned)
    for i in range(2):
        gauges = [found[f"blocks.{i}.{name}.weight"].gauge for name in "qkvo"]
        assert gauges == [0.5, 1, 1, 1]
        assert [found[f"blocks.{i}.{name}.weight"].role for name in "qkvo"] == ["hidden"] * 4
    assert not any("acts on no parameter's result" in note for note in planned.notes)


@pytest.mark.parametrize("way", extended_but(ATTENTIONS, "softmax", "retention"))
def test_attention_of_a_fixed_head_dim_needs_nothing(way: str) -> None:
    class Heads(Attending):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (each(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
            return x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def build(scale: mt.Scale) -> nn.Module:
        model = Net(scale, ATTENTIONS[way])
        model.blocks = nn.ModuleList(Heads(scale.width, ATTENTIONS[way]) for _ in range(scale.depth))
        return model

    of = mt.Family(build, torch.randn(3, 7, 5), lambda m, x: m(x).square().mean(), mt.Scale(16, 6))
    planned = mt.plan(of, mt.Scale(64, 6), observation=observe(of))
    assert {row.gauge for row in planned.rows} == {1.0, 0.25}  # the readout's
    assert not planned.notes
