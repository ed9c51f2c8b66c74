"""What a sweep has cost, and whether another trial is still within its budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from optuna.trial import FrozenTrial

from .experiment import Budget

__all__ = ["Spent"]


@dataclass(frozen=True)
class Spent:
    """Floating point operations and seconds of the trials that were told, and the most that one of them took.

    A trial that was interrupted was not told, and what it cost is not known.
    """

    flops: float = 0.0
    seconds: float = 0.0
    longest: float = 0.0

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> Self:
        """Add up what is noted in ``trials``."""
        outcomes = [trial.user_attrs["outcome"] for trial in trials if "outcome" in trial.user_attrs]
        seconds = [outcome["seconds"] or 0.0 for outcome in outcomes]
        return cls(sum(outcome["flops"] or 0.0 for outcome in outcomes), sum(seconds), max(seconds, default=0.0))

    def allows(self, budget: Budget, running: int, flops: float | None) -> bool:
        """Return whether one more trial of ``flops`` fits beside ``running`` others, each as long as the longest was.

        How long a trial takes is not known before one has ended; the first ones are always allowed.
        """
        most = running + 1
        if budget.flops is not None and flops is not None and self.flops + most * flops > budget.flops:
            return False
        if budget.seconds is None:
            return True
        return not self.longest or self.seconds + most * self.longest <= budget.seconds
