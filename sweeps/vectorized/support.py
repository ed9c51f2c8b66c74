"""Check whether trials can be vectorized, by comparing two fused trials with two separate ones; recognize a lack of memory."""

from __future__ import annotations

import math

import torch

from mutransfer.errors import describe
from mutransfer.planning.plan import Plan
from mutransfer.proxies.training import Training
from mutransfer.scale import Scale

from ..jobs import RunContext
from .batch_training import Slot, VectorizedTraining
from .step import FUSED

__all__ = ["NOT_FOR_ONE", "is_out_of_memory", "refusal"]

NOT_FOR_ONE = "there is not enough memory for one trial: lower batch_size or the proxy's width in the experiment."

# Messages of CPU allocators in a plain RuntimeError.
SAID = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` or one of its causes is an out-of-memory error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, (RuntimeError, OSError)) and any(words in str(seen) for words in SAID):
            return True
        seen = seen.__cause__
    return False


STEPS = 3
EXAMPLES = 8
TOLERANCE = (
    1e-3  # relative, of the loss after three steps: rounding is far below this, interaction between trials far above
)
SEEDS = (0, 1)


def refusal(context: RunContext, scale: Scale | None = None, device: str = "cpu") -> str | None:
    """Return why trials of the experiment at ``scale`` (default: the proxy's) cannot be fused, or None if they can.

    Raises:
        RequestError: the trials cannot be trained at all.
    """
    experiment = context.experiment
    if experiment.trainer is not None:
        return f"{experiment.trainer} trains them, one at a time"
    if experiment.optimizer not in FUSED:
        return f"{experiment.optimizer} has no update of many trials at once ({', '.join(FUSED)} have)"
    scale, asked = scale or experiment.proxy_scale, experiment.model_dump_json(exclude={"trials"})
    return context.once(("refusal", asked, scale, device), lambda: _tried(context, scale, device))


def _tried(context: RunContext, scale: Scale, device: str) -> str | None:
    plan = context.plan(scale, context.experiment.parametrization, context.experiment.recipe)
    apart = _apart(context, plan, device, 0)
    try:
        together = _together(context, plan, device)
    except Exception as error:
        if is_out_of_memory(error):
            return "there is no memory for two of them at once"
        return f"the model does not run under torch.vmap ({describe(error)})"
    for alone, joint in zip(apart, together, strict=True):
        both_diverged = not math.isfinite(alone) and not math.isfinite(joint)
        if not both_diverged and not abs(alone - joint) <= TOLERANCE * abs(alone):
            if _apart(context, plan, device, 1) != apart:
                return None  # the loss is random, as with dropout: it cannot be compared
            return f"next to another trial, the model's loss after {STEPS} steps is {joint:.6g} instead of {alone:.6g}"
    return None


def _together(context: RunContext, plan: Plan, device: str) -> list[float]:
    slots = [Slot(plan, seed) for seed in SEEDS]
    training = VectorizedTraining(
        context.family, slots, context.required_data, steps=STEPS, batch_size=_size(context), device=device
    )
    training.advance(STEPS)
    return training.validate(range(len(SEEDS)))


def _apart(context: RunContext, plan: Plan, device: str, draws: int) -> list[float]:
    losses = []
    for seed in SEEDS:
        training = Training(
            context.family,
            plan,
            context.required_data,
            steps=STEPS,
            batch_size=_size(context),
            seed=seed,
            device=device,
        )
        with torch.random.fork_rng():
            torch.manual_seed(draws)
            training.advance(STEPS)
        losses.append(training.validate())
    return losses


def _size(context: RunContext) -> int:
    return min(context.experiment.batch_size, EXAMPLES)
