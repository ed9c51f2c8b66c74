"""The big run by a trainer of the person's own, function or command, started with the target's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutransfer.planning.target import TargetConfig
from mutransfer.proxies.importing import modules_in
from mutransfer.proxies.training import Outcome

from .commands import CommandRun, check_command, environment, look
from .experiment import Trainer
from .user_trainers import TrialRun, call, load_trainer, needed

__all__ = ["train_target", "trainer_of"]


def trainer_of(target: TargetConfig) -> Trainer | None:
    """Return the trainer that the target's recipe was tuned with; None for mutransfer's own loop."""
    given = target.provenance.get("trainer")
    return None if given is None else Trainer.read(given, "the target's trainer")


def train_target(
    target: TargetConfig, out: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Train ``target`` by the trainer that its recipe was tuned with, at the target's scale.

    A function is called with the tuned recipe, the target's plan, its seed and a ``report`` whose ``steps`` are the target's. A
    command gets recipe.json, plan.json and the folder out below ``out``; what a run before has left there stays, so that it can
    go on from its own checkpoint.

    Args:
        target: what to train.
        out: folder of a command's files.
        progress: called with (steps reported, steps in all).

    Returns:
        ``loss`` (the final one; None if not finite), ``steps`` (the last that was reported, or all of a run that ended well),
        ``tokens_per_second`` and ``checkpoint``, which are None: they are the trainer's own.

    Raises:
        RequestError: there is no such trainer any more, or it failed.
    """
    trainer = trainer_of(target)
    assert trainer is not None
    references, folder = target.found()
    maximize = target.provenance.get("direction") == "maximize"
    attempt = TrialRun(
        target.steps, on_report=lambda step: progress(min(step, target.steps), target.steps), maximize=maximize
    )
    if trainer.call is not None:
        with modules_in(folder):
            load_trainer(references["call"])
            outcome = call(references["call"], target.plan.recipe, target.plan, target.seed, attempt)
    else:
        check_command(trainer, folder)
        outcome = _run(CommandRun(trainer, target, attempt, out, folder, environment=environment()))
    needed(outcome, f"the run of {trainer} at width {target.plan.scale.width}")
    return {
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
        "steps": outcome.steps,
        "tokens_per_second": None,
        "checkpoint": None,
    }


def _run(run: CommandRun) -> Outcome:
    try:
        while (outcome := run.advance()) is None:
            look([run])
    finally:
        run.ward.close()
    return outcome
