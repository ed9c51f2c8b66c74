"""The training loop shared by proxies, learning-rate basins and the target run, and its learning-rate schedules."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mutransfer._torch_internals import inductor_options
from mutransfer.devices import uploaded
from mutransfer.family import Family
from mutransfer.planning.plan import Plan
from mutransfer.recipe import Recipe

from .data.base import Data
from .methods import gradients_for

__all__ = ["Outcome", "Training", "multiplier", "scheduler", "train"]


def multiplier(recipe: Recipe, step: int, steps: int) -> float:
    """Return the factor on every learning rate at ``step`` (0-based) of ``steps``.

    A linear warmup over the fraction ``recipe.warmup`` of the run is followed by ``recipe.schedule``: "constant" (no decay),
    "cosine" or "linear" (decay over the rest of the run), or "wsd" (warmup, stable, decay; Hu et al. 2404.06395), which is
    constant and then decays linearly over the last fraction ``recipe.cooldown`` of the run. Decays end at the fraction
    ``recipe.final`` of the peak.
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
    """Return a `LambdaLR` scheduler for the recipe; step it once after each optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: multiplier(recipe, min(step, steps - 1), steps))


FINITE_EVERY = 10  # steps between checks that the loss is finite: each check waits for the device


@dataclass(frozen=True)
class Outcome:
    """Result of a training run.

    Args:
        loss: mean validation loss in nats; not finite, or above ``start``, if the run diverged.
        start: validation loss before the first step.
        steps: number of optimizer steps done.
        stopped: whether the run was stopped early because the ``report`` callback of `train` asked for it.
        seconds: wall-clock time of training and validation.
        failed: why the run failed without a loss, phrased as the end of a sentence ("its process was killed by …"); None if
            the run finished or diverged.
        maximize: whether ``loss`` is a metric to maximize; the run has then diverged if it ends below ``start``.
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
        """Whether the loss is not finite or worse than at the start; False for a failed run."""
        worse = self.loss < self.start if self.maximize else self.loss > self.start
        return self.failed is None and (not math.isfinite(self.loss) or worse)


class Training:
    """A training run that can be advanced, validated, saved and resumed.

    Args:
        family: builds the model at any scale and computes its loss.
        plan: settings of every parameter; the model is built at ``plan.scale``.
        data: training and validation batches.
        steps: length of the whole run, which the learning-rate schedule spans.
        batch_size: examples per step.
        seed: seed of the initial weights and of the order of the data.
        device: torch device to train on.
        compile: whether to compile the model; models of the same kind are compiled once per process.
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
        self.gradients = gradients_for(plan, family, seed, self._batches())
        # Every masked layer is a class of its own, which would be compiled anew for each trial; forward mode is not compiled.
        if compile and plan.recipe.method.name == "backprop":
            self.model.compile(options=inductor_options())
        self.step = 0
        self.finite = True

    def advance(self, until: int) -> None:
        """Train up to step ``until``, stopping early if the loss is no longer finite."""
        self.model.train()
        while self.step < until and self.finite:
            loss = self.train_on(uploaded(self.data.batch(self.step, self.batch_size, self.seed), self.device))
            if self.step % FINITE_EVERY == 0 or self.step == until:
                self.finite = bool(torch.isfinite(loss))

    def train_on(self, batch: Any) -> torch.Tensor:
        """Take the next optimizer step on a batch that is on the device; return the loss before it."""
        loss = self.gradients(self.model, batch, self.step)
        if self.plan.recipe.clip is not None:
            self.plan.clip_grad_norm_(self.model, self.plan.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss over the held-out batches in nats, or NaN if the training loss is no longer finite."""
        if not self.finite:
            return math.nan
        self.model.eval()
        held_out = uploaded(self.data.validation(), self.device)
        sizes = [len(targets) for _, targets in held_out]
        losses = [self._loss(batch) * size for batch, size in zip(held_out, sizes, strict=True)]
        return float(sum(losses) / sum(sizes))

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` continues as if the run had never been interrupted."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = int(state["step"])

    def _loss(self, batch: Any) -> torch.Tensor:
        return self.family.loss_on(self.model, batch, self._batches())

    def _batches(self) -> str:
        return f"a batch (inputs, targets) of {self.data.name}"


def train(
    training: Training,
    rungs: tuple[int, ...] = (),
    report: Callable[[int, float], bool] | None = None,
) -> Outcome:
    """Run ``training`` to its end and return its `Outcome`.

    Args:
        training: a new run, or a resumed one, whose ``start`` loss is then the loss at the point where it resumed.
        rungs: steps at which the validation loss is reported.
        report: callback, called with (step, validation loss) at each rung; the run stops there if it returns True.
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
