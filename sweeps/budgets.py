"""What a sweep has cost, beside the run that it is for, and whether another trial is still within its budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState

from mutransfer.run_dir import RunFolder
from mutransfer.scale import Scale
from mutransfer.schemas import BASINS, REPEATS, TRIALS, Schema

from .experiment import Budget, Experiment
from .jobs import cost_of

__all__ = ["Spent", "price"]


@dataclass(frozen=True)
class Spent:
    """Floating point operations and seconds of the trials that were told, and the seconds that one usually takes.

    Usually is the median of the complete ones: the first in each process may have compiled the model.

    A trial that was interrupted was not told, and what it cost is not known.
    """

    flops: float = 0.0
    seconds: float = 0.0
    usual: float = 0.0

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> Self:
        """Add up what is noted in ``trials``."""
        told = [trial for trial in trials if "outcome" in trial.user_attrs]
        outcomes = [trial.user_attrs["outcome"] for trial in told]
        complete = [each.user_attrs["outcome"]["seconds"] or 0.0 for each in told if each.state is TrialState.COMPLETE]
        return cls(
            sum(outcome["flops"] or 0.0 for outcome in outcomes),
            sum(outcome["seconds"] or 0.0 for outcome in outcomes),
            statistics.median(complete) if complete else 0.0,
        )

    def allows(self, budget: Budget, running: int, flops: float | None) -> bool:
        """Return whether one more trial of ``flops`` fits beside ``running`` others, each as long as is usual.

        How long a trial takes is not known before one has ended; the first ones are always allowed.
        """
        most = running + 1
        if budget.flops is not None and flops is not None and self.flops + most * flops > budget.flops:
            return False
        if budget.seconds is None:
            return True
        return not self.usual or self.seconds + most * self.usual <= budget.seconds


def price(experiment: Experiment, folder: RunFolder, target: Scale) -> dict[str, Any]:
    """Return what was spent in ``folder``, in floating point operations, beside one run of the experiment at ``target``.

    Returns:
        ``tuning_flops`` (all trials, pruned ones too), ``repeats_flops`` (the best ones with other seeds), ``verify_flops`` (all
        runs of the basins, the control's too), ``target_flops``; ``ratio`` of tuning to target; ``uncounted``, the
        names of operations that no figure includes. None for what is not there, or not known (own trainers). Validation
        is not included, in any of them.
    """
    cost = cost_of(experiment, target)
    known = cost is not None
    tuning = _spent(folder.trials, TRIALS) if known else None
    whole = cost.total * experiment.steps if cost is not None else None
    return {
        "tuning_flops": tuning,
        "repeats_flops": _spent(folder.repeats, REPEATS) if known else None,
        "verify_flops": _spent(folder.basins, BASINS) if known else None,
        "target_flops": whole,
        "ratio": tuning / whole if tuning is not None and whole else None,
        "uncounted": list(cost.uncounted) if cost is not None else [],
    }


def _spent(path: Path, schema: Schema) -> float | None:
    total = schema.read(path)["flops"].sum(min_count=1) if path.exists() else math.nan
    return None if math.isnan(total) else float(total)
