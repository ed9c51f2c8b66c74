"""The one training loop, used by proxies, learning-rate basins and the target run, and its learning-rate schedules."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mutransfer._torch_internals import tree_map_only
from mutransfer.family import Family
from mutransfer.planning.plan import Plan
from mutransfer.recipe import Recipe

from .data.base import Data

__all__ = ["Outcome", "Training", "multiplier", "scheduler", "train"]


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


FINITE_EVERY = 10  # steps between looks at the loss: each look waits for the device


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        loss: mean validation loss in nats; not finite, or above ``start``, if the run diverged.
        start: validation loss before the first step.
        steps: optimizer steps done.
        stopped: whether the caller's report asked to stop early.
        seconds: wall-clock time of training and validation.
        failed: why it was broken off without a loss, as the end of a sentence about it ("its process was killed by …");
            None for a run that came to its end, or diverged.
        maximize: the loss is a metric of which more is better, and below its start the run has diverged.
    """

    loss: float
    start: float
    steps: int
    stopped: bool
    seconds: float
    failed: str | None = None
    maximize: bool = False

    @property
    def diverged(self) -> bool:
        """The loss is not finite, or training made it worse than it began."""
        worse = self.loss < self.start if self.maximize else self.loss > self.start
        return self.failed is None and (not math.isfinite(self.loss) or worse)


class Training:
    """A run that can be advanced, validated, saved and resumed.

    Args:
        family: the model at any size and its loss.
        plan: the settings in force; the model is built at ``plan.scale``.
        data: training and validation batches.
        steps: length of the whole run, which the schedule is laid over.
        batch_size: examples per step.
        seed: of the initial weights and of the order of the data.
        device: where to train.
        compile: compile the model, once for all of its kind in this process.
    """

    def __init__(
        self, family: Family, plan: Plan, data: Data, *, steps: int, batch_size: int, seed: int = 0, device: str = "cpu",
        compile: bool = False,
    ) -> None:  # fmt: skip
        self.family, self.plan, self.data = family, plan, data
        self.steps, self.batch_size, self.seed, self.device = steps, batch_size, seed, device
        self.model = family.built(plan.scale, device)
        plan.attach(self.model)
        plan.initialize(self.model, seed)
        self.optimizer = plan.make_optimizer(self.model)
        self.schedule = scheduler(self.optimizer, plan.recipe, steps)
        if compile:
            self.model.compile()
        self.step = 0
        self.finite = True

    def advance(self, until: int) -> None:
        """Train up to step ``until``, or stop where the loss is no longer finite."""
        self.model.train()
        while self.step < until and self.finite:
            batch = self._on_device(self.data.batch(self.step, self.batch_size, self.seed))
            loss = self._loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.plan.recipe.clip is not None:
                self.plan.clip_grad_norm_(self.model, self.plan.recipe.clip)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            if self.step % FINITE_EVERY == 0 or self.step == until:
                self.finite = bool(torch.isfinite(loss))

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss over the held-out batches, in nats."""
        if not self.finite:
            return math.nan
        self.model.eval()
        held_out = [self._on_device(batch) for batch in self.data.validation()]
        sizes = [len(targets) for _, targets in held_out]
        losses = [self._loss(batch) * size for batch, size in zip(held_out, sizes, strict=True)]
        return float(sum(losses) / sum(sizes))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to go on as if never interrupted."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = int(state["step"])

    def _loss(self, batch: Any) -> torch.Tensor:
        return self.family.loss_on(self.model, batch, f"a batch (inputs, targets) of {self.data.name}")

    def _on_device(self, batch: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), batch)


def train(
    training: Training,
    rungs: tuple[int, ...] = (),
    report: Callable[[int, float], bool] | None = None,
) -> Outcome:
    """Run ``training`` to its end.

    Args:
        training: a fresh run; a resumed one is judged against its loss where it resumed.
        rungs: steps at which the validation loss is reported.
        report: called with (step, validation loss) at each rung; True stops the run there.
    """
    begun = time.perf_counter()
    start = training.validate()
    for rung in sorted({*(rung for rung in rungs if training.step < rung < training.steps)}):
        training.advance(rung)
        loss = training.validate()
        if not math.isfinite(loss):
            return Outcome(loss, start, training.step, False, time.perf_counter() - begun)
        if report is not None and report(rung, loss):
            return Outcome(loss, start, training.step, True, time.perf_counter() - begun)
    training.advance(training.steps)
    return Outcome(training.validate(), start, training.step, False, time.perf_counter() - begun)
