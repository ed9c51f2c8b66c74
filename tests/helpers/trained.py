"""What every test here asks: are the settings in force the plan's, and are the losses those of the undisturbed run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.planning.audit import audit, live

from . import families
from .planned import plan_of

STEPS = 5
EXACT = 1e-10  # relative, in float64: the order of a few sums may differ, a wrong factor shows as 1e-2 and more
VOCABULARY = families.VOCABULARY


@dataclass(frozen=True)
class Case:
    """A family and its plan at twice the base width, trained in float64."""

    family: mt.Family
    plan: mt.Plan

    @property
    def planned(self) -> set[str]:
        return {row.name for row in self.plan.rows}

    def model(self) -> nn.Module:
        """A fresh model at the plan's scale: equal weights every time."""
        model = self.family.build(self.plan.scale).double()
        self.plan.initialize(model, seed=5)
        return model

    @functools.cached_property
    def undisturbed(self) -> list[float]:
        model = self.model()
        return train(model, self.plan.make_optimizer(model), self.family.batch)


@functools.cache
def transformer_case(optimizer: str = "adamw", **shape: Any) -> Case:
    family = families.transformer(width=32, qk_norm=True, kv_share=2, **shape)
    return planned(family, optimizer)


@functools.cache
def llama_case() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(scale: mt.Scale) -> nn.Module:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=scale.width, intermediate_size=2 * scale.width, attention_bias=False,
            num_hidden_layers=scale.depth, num_attention_heads=scale.width // 8, num_key_value_heads=scale.width // 16,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0]).logits, batch[1])

    return planned(mt.Family(build, families.token_batch(), loss, mt.Scale(16, 2), "llama"), "adamw")


def planned(family: mt.Family, optimizer: str = "adamw") -> Case:
    # clear of mup's default, so that a lost setting shows: decay everywhere, and an eps that is felt
    recipe = mt.Recipe(lr=2**-6, weight_decay=0.1, decay="all", eps=1e-4, alpha_output=3.0, clip=1.0)
    return Case(family, plan_of(family, family.base.with_(width=2 * family.base.width), "mup", optimizer, recipe))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    steps: int = STEPS,
    clip: Callable[[nn.Module], float] | None = None,
) -> list[float]:
    seen = []
    for _ in range(steps):
        out = model(batch[0])
        loss = cross_entropy(getattr(out, "logits", out), batch[1])
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            clip(model)
        optimizer.step()
        seen.append(loss.item())
    return seen


def clipping(plan: mt.Plan, norms: list[float]) -> Callable[[nn.Module], float]:
    """Clip as the plan does, and note the norms before."""

    def clip(model: nn.Module) -> float:
        assert plan.recipe.clip is not None
        norms.append(plan.clip_grad_norm_(model, plan.recipe.clip).item())
        return norms[-1]

    return clip


def assert_as_planned(plan: mt.Plan, optimizer: torch.optim.Optimizer) -> None:
    """Twice: by the auditor, and by looking at each group."""
    assert audit(plan, live(optimizer)).empty
    rows = {row.name: row for row in plan.rows}
    seen = 0
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            row, seen = rows[name], seen + 1
            assert (float(group["lr"]), group["weight_decay"], group["eps"]) == (row.lr, row.weight_decay, row.eps)
    assert seen == len(rows)
    assert len({row.lr for row in plan.rows}) > 2, "with one learning rate for all, nothing is tested"


def relative(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of two runs that both learned something."""
    assert expected[-1] < expected[0] - 0.05
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
