"""What a sweep has cost, and whether another trial is still within its budget."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from optuna.trial import FrozenTrial, TrialState

from .experiment import Budget

__all__ = ["Spent"]


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
