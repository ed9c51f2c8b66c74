"""The source of a module of trainers: one that is real, and as many as can go wrong."""

from __future__ import annotations

__all__ = ["TRAINER"]

# Real training, of the model above on data of its own, by a module beside it.
TRAINER = """
import torch
from models import build
from mutransfer.sweeps.user_trainers import Stop

def train(recipe, plan, seed, report):
    model = build(plan.scale.width, plan.scale.depth)
    plan.initialize(model, seed)
    optimizer = plan.make_optimizer(model)
    draws = torch.Generator().manual_seed(seed)
    loss = None
    for step in range(9):
        x = torch.randn(32, 8, generator=draws)
        loss = nn_loss(model(x), x)
        if step % 2 == 0:
            report(step, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss

def nn_loss(y, x):
    from helper import labels
    return torch.nn.functional.cross_entropy(y, labels(x))

# Planted: what a sweep sees of a trainer.
def bowl(recipe, plan, seed, report):
    import math
    loss = 1 + (math.log2(recipe.lr) + 5) ** 2
    for step in range(1, 9):
        report(step, loss)
    return loss

def stubborn(recipe, plan, seed, report):
    try:
        return bowl(recipe, plan, seed, report)
    except Stop:
        raise RuntimeError("could not clean up")

def silent(recipe, plan, seed, report):
    return recipe.lr

def epochs(recipe, plan, seed, report):
    report(1, 3.0)
    return recipe.lr

def overflows(recipe, plan, seed, report):
    report(0, 4.0)
    if recipe.lr > 2 ** -6:
        report(3, float("nan"))
        raise AssertionError("not reached")
    return 1.0

def grows(recipe, plan, seed, report):
    report(0, 4.0)
    return 5.0 if recipe.lr > 2 ** -6 else 1.0

def fails(recipe, plan, seed, report):
    x = recipe.lr
    raise ValueError("no such\\ndataset")

def leaves(recipe, plan, seed, report):
    raise SystemExit("out of licences")

def sometimes(recipe, plan, seed, report):
    if recipe.lr > 2 ** -6:
        raise MemoryError("too large")
    return recipe.lr

def returns_none(recipe, plan, seed, report):
    pass

def returns_text(recipe, plan, seed, report):
    return "2.5"

def reports_text(recipe, plan, seed, report):
    report("first", 2.5)

def reports_pair(recipe, plan, seed, report):
    report(1, (2.5, 2.6))

def two(recipe, plan):
    pass

number = 3
"""
