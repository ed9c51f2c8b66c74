"""Learning-rate schedules as multipliers, so that the ratios between parameter groups never change."""

from __future__ import annotations

import math

import torch

from mutransfer.recipe import Recipe

__all__ = ["multiplier", "scheduler"]


def multiplier(recipe: Recipe, step: int, steps: int) -> float:
    """Return what multiplies every learning rate at ``step`` (0-based) of ``steps``.

    A linear warmup over ``recipe.warmup`` of the run is followed by "constant", "cosine" or "linear" decay over the rest,
    or by "wsd" (warmup, stable, decay; Hu et al. 2404.06395), which is constant and falls linearly over the last
    ``recipe.cooldown``. Decays end at ``recipe.final`` of the peak.
    """
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    match recipe.schedule:
        case "constant":
            return 1.0
        case "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        case "linear":
            left = 1 - done
        case "wsd":
            cooldown = max(1, round(recipe.cooldown * steps))
            left = min(1.0, (steps - step) / cooldown)
    return recipe.final + (1 - recipe.final) * left


def scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return torch's scheduler for the recipe; step it once after each optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: multiplier(recipe, min(step, steps - 1), steps))
