"""A model with explicit forward multipliers beside the plain model under its plan.

The explicit model is written here: its multipliers stand in the forward pass, its optimizer has the settings of TP-V
2203.03466, Table 8, by hand. The folded one is the plain model under its plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.optimizers.muon import MuonWithAdamW

from . import families
from .planned import plan_of

STEPS = 50
M = 4  # target width / base width: a power of two, so that Muon's bfloat16 rounds both sides alike
DEEPER = 2  # target depth / base depth, where there is one
# an epsilon as large as the gradients, so that a wrong one shows
ADAM = {"lr": 2**-8, "eps": 1e-3, "betas": (0.8, 0.9), "decay": "all"}
DECAY = {"weight_decay": 0.5}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {**ADAM, **DECAY},
    "adam": ADAM,
    "nadam": {**ADAM, **DECAY},
    "adamax": ADAM,
    "rmsprop": {**ADAM, "momentum": 0.5},
    "adagrad": {**ADAM, "lr": 2**-6},
    "lion": {**ADAM, **DECAY, "lr": 2**-10},
    "signum": {**ADAM, **DECAY, "lr": 2**-10},
    "adafactor": {**ADAM, **DECAY, "lr": 2**-5, "eps2": 0.1},
    "adafactor-hf": {**ADAM, **DECAY, "lr": 2**-5, "eps2": 0.1},
    "adafactor-unscaled": {**ADAM, **DECAY},
    "muon": {**ADAM, **DECAY, "momentum": 0.9, "adamw_lr_ratio": 0.5},
    "muon-match-rms-adamw": {**ADAM, **DECAY, "momentum": 0.9},
    "sgd": {"lr": 2**-4, "weight_decay": 0.02, "decay": "all", "momentum": 0.9},
    "asgd": {"lr": 2**-2, "weight_decay": 0.02, "decay": "all"},
}
# (lr, weight decay, eps) with the readout's 1/m in the forward pass
TABLE_8_ADAM: dict[str, tuple[float, float, float]] = {
    "input": (1, 1, 1 / M),
    "vector": (1, 1, 1 / M),
    "hidden": (1 / M, M, 1 / M),
    "output": (1, 1, 1 / M),
    "finite": (1, 1, 1),
}
TABLE_8_SGD: dict[str, tuple[float, float, float]] = {
    "input": (M, 1 / M, 1),
    "vector": (M, 1 / M, 1),
    "hidden": (1, 1, 1),
    "output": (M, 1 / M, 1),
    "finite": (1, 1, 1),
}
SAME = dict.fromkeys(TABLE_8_ADAM, (1.0, 1.0, 1.0))
TABLE_8 = {
    **dict.fromkeys(RECIPES, TABLE_8_ADAM),
    "sgd": TABLE_8_SGD,
    "asgd": TABLE_8_SGD,
    # relative to weights that shrink as 1/√m; the epsilon is a size of weights
    "adafactor": SAME | {"hidden": (M**-0.5, M**0.5, M**-0.5)},
    "adafactor-hf": SAME | {"hidden": (M**-0.5, M, M**-0.5)},
    # the norm of the whole gradient stays, as does the aspect ratio
    "muon": TABLE_8_ADAM | {"hidden": (1, 1, 1)},
    "muon-match-rms-adamw": TABLE_8_ADAM | {"hidden": (M**-0.5, M**0.5, 1)},
}


class Sign(torch.optim.Optimizer):
    """The sign of the momentum, with decoupled decay: Lion with one beta, Signum."""

    def __init__(self, groups: Any, beta: float = 0.8) -> None:
        self.beta = beta
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.beta)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum.sign() * group["lr"])


CLASSES = {"lion": Sign, "signum": Sign}


@dataclass(frozen=True)
class Case:
    """A family with the multipliers that its explicit twin has in the forward pass."""

    family: Callable[[], mt.Family]
    readout: float = 1 / M
    first: float = 1.0
    attention: float = 1.0
    carries_readout: str = "readout.weight"
    carries_attention: str = "q.weight"
    recipe: dict[str, float] = field(default_factory=dict)
    branch: float = 1.0
    alpha: float | None = None  # of depth: None leaves it alone


def attention(**shape: Any) -> Callable[[], mt.Family]:
    return lambda: families.transformer(width=16, head_dim=None, **shape)


def small(**shape: Any) -> Callable[[], mt.Family]:
    return lambda: families.transformer(width=16, head_dim=8, **shape)


class Residual(nn.Module):
    """Blocks whose branches end in a linear layer with a bias."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.input, self.readout, self.norm = nn.Linear(64, width), nn.Linear(width, 10), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Branch(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.input(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return self.readout(self.norm(h))


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(h))))


def residual() -> mt.Family:
    return mt.Family(lambda s: Residual(s.width, s.depth), families.image_batch(), families.loss, mt.Scale(16, 2))


CASES = {
    "residual branch": Case(residual, branch=1 / DEEPER, alpha=1),
    "residual branch, depth-mup, alpha": Case(
        residual, branch=3 * DEEPER**-0.5, alpha=0.5, recipe={"alpha_residual": 3}
    ),
    "readout, before its bias": Case(lambda: families.mlp(width=16)),
    "readout alpha": Case(lambda: families.mlp(width=16), readout=3 / M, recipe={"alpha_output": 3}),
    "input alpha, before its bias": Case(lambda: families.mlp(width=16), first=0.5, recipe={"alpha_input": 0.5}),
    "embedding alpha": Case(small(), first=5, recipe={"alpha_input": 5}),
    "attention alpha": Case(small(), attention=2, recipe={"alpha_attention": 2}),
    "head dim": Case(attention(heads=2), attention=M**-0.5),
    "head dim, grouped queries": Case(attention(heads=4, kv_heads=2), attention=M**-0.5),
    "head dim, normed queries": Case(
        attention(heads=2, qk_norm=True), attention=M**-0.5, carries_attention="q_norm.weight"
    ),
    "head dim and attention alpha": Case(
        attention(heads=2, qk_norm=True), attention=3 * M**-0.5, carries_attention="q_norm.weight",
        recipe={"alpha_attention": 3},
    ),
    "tied": Case(small(tied=True), carries_readout="norm.weight"),
    "tied, all alphas": Case(
        small(tied=True), readout=3 / M, first=0.5, attention=2, carries_readout="norm.weight",
        recipe={"alpha_output": 3, "alpha_input": 0.5, "alpha_attention": 2},
    ),
}  # fmt: skip


def multiplied(attention: Any, c: float) -> None:
    """Let the attention take c/√d for its softmax scale."""
    plain, original = type(attention).forward, F.scaled_dot_product_attention

    def scaled(q: torch.Tensor, *rest: torch.Tensor, **options: Any) -> torch.Tensor:
        return original(q, *rest, scale=c / math.sqrt(q.shape[-1]), **options)

    def forward(*given: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(F, "scaled_dot_product_attention", scaled):
            return plain(attention, *given)

    attention.forward = forward


def explicit_twin(case: Case, plan: mt.Plan, model: nn.Module) -> nn.Module:
    """The same function as ``model`` with every multiplier in the forward pass and none in the weights."""
    twin: Any = case.family().build(plan.scale).double()
    twin.readout.register_forward_pre_hook(lambda _, x: x[0] * case.readout)
    if isinstance(twin, Residual):
        for block in twin.blocks:
            block.down.register_forward_hook(lambda _, __, out: out * case.branch)
    elif hasattr(twin, "embedding"):
        # a hook would also meet nothing else: the tied readout calls no embedding
        twin.embedding.register_forward_hook(lambda _, __, out: out * case.first)
        for block in twin.blocks:
            multiplied(block.attention, case.attention)
    else:
        twin.input.register_forward_pre_hook(lambda _, x: x[0].flatten(1) * case.first)
    gauges = {case.carries_readout: case.readout, "embedding.weight": case.first, "input.weight": case.first}
    if case.carries_readout == "norm.weight":
        gauges["norm.weight"] /= case.first  # the tied matrix brings the input's multiplier with it
    with torch.no_grad():
        for (name, theirs), (_, ours) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
            queries = case.attention if name.endswith(f"attention.{case.carries_attention}") else 1
            ends = case.branch if ".down." in name and isinstance(twin, Residual) else 1
            theirs.copy_(ours / (gauges.get(name, 1) * queries * ends))
    return twin


def explicit_optimizer(name: str, case: Case, plan: mt.Plan, twin: nn.Module) -> torch.optim.Optimizer:
    """The class with Table 8's settings by hand."""
    recipe, roles, groups = plan.recipe, {row.name: row.role for row in plan.rows}, []
    for parameter_name, parameter in twin.named_parameters():
        role = roles[parameter_name]
        lr, decay, eps = TABLE_8[name][role]
        if case.alpha is not None and "blocks" in parameter_name:
            power = 2 * case.alpha - 1 if name.endswith("sgd") else case.alpha - 1
            lr, decay = lr * DEEPER**power, decay / DEEPER**power
            eps *= 1 if name.startswith("adafactor") else DEEPER**-case.alpha
        if name.startswith("muon") and not (role == "hidden" and parameter.dim() == 2):
            lr *= recipe.adamw_lr_ratio
        group = {"params": [parameter], "lr": recipe.lr * lr, "weight_decay": recipe.weight_decay * decay}
        if name == "asgd":
            group |= {"lambd": group["weight_decay"], "weight_decay": 0}
        elif name == "adafactor":
            group["eps"] = (1e-15, recipe.eps2 * eps)
        elif name == "adafactor-hf":
            group["eps"] = (1e-30, recipe.eps2 * eps)
        elif name not in ("sgd", "lion", "signum", "adafactor-unscaled"):
            group["eps"] = recipe.eps * eps
        if name.startswith("muon"):
            group["muon"] = role == "hidden" and parameter.dim() == 2
            group |= {"momentum": 0.9} if group["muon"] else {"betas": recipe.betas}
        groups.append(group)
    optim: Any = torch.optim
    match name:
        case "adamw" | "adam" | "adamax" | "nadam":
            cls = {"adamw": "AdamW", "adam": "Adam", "adamax": "Adamax", "nadam": "NAdam"}[name]
            options = {"decoupled_weight_decay": True} if name == "nadam" else {}
            return getattr(optim, cls)(groups, betas=recipe.betas, **options)
        case "rmsprop":
            return optim.RMSprop(groups, alpha=recipe.betas[1], momentum=recipe.momentum)
        case "adagrad":
            return optim.Adagrad(groups)
        case "lion" | "signum":
            return Sign(groups)
        case "adafactor":
            return optim.Adafactor(groups)
        case "adafactor-hf" | "adafactor-unscaled":
            scaled = name == "adafactor-hf"
            return transformers.Adafactor(groups, scale_parameter=scaled, relative_step=False)
        case "muon" | "muon-match-rms-adamw":
            adjust = "original" if name == "muon" else "match_rms_adamw"
            return MuonWithAdamW(groups, adjust_lr_fn=adjust)
        case "asgd":
            return optim.ASGD(groups)
        case _:
            return optim.SGD(groups, momentum=recipe.momentum)


def losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    family: mt.Family,
    clip: Callable[[nn.Module], Any] = lambda model: None,
) -> list[float]:
    x, y = family.batch
    batch = (x.double() if x.is_floating_point() else x, y)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = family.loss(model, batch)
        loss.backward()
        clip(model)
        optimizer.step()
        seen.append(loss.item())
    return seen


def both(case: Case, optimizer: str) -> tuple[mt.Family, mt.Plan, nn.Module, nn.Module]:
    family = case.family()
    recipe = mt.Recipe.read(RECIPES[optimizer] | case.recipe, "recipe")
    scale = family.base.with_(width=M * family.base.width)
    if case.alpha is not None:
        scale = scale.with_(depth=DEEPER * family.base.depth)
    table = {None: "mup", 0.5: "depth-mup", 1: "completep"}[case.alpha]
    plan = plan_of(family, scale, table, optimizer, recipe)
    model = family.build(plan.scale).double()
    plan.initialize(model, seed=1)
    return family, plan, model, explicit_twin(case, plan, model)


def trained_alike(name: str, optimizer: str) -> tuple[list[float], list[float]]:
    family, plan, model, twin = both(CASES[name], optimizer)
    folded = losses(model, plan.make_optimizer(model, CLASSES.get(optimizer)), family)
    explicit = losses(twin, explicit_optimizer(optimizer, CASES[name], plan, twin), family)
    assert folded[-1] < 0.99 * folded[0]
    return folded, explicit
