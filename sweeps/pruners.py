"""Successive halving for batches: a trial is compared with all trials that have reached its rung, finished or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .workers import origin

__all__ = ["REDUCTION", "Halving", "bracket_sequence", "geometric_rungs", "judged_once"]

REDUCTION = 3
FIRST = 10  # steps before which no trial is pruned: losses during warmup are not informative
ONCE = (
    0.4  # fraction of a run at which its loss separates the better half of trials while most of its cost is still ahead
)


def geometric_rungs(steps: int, most: int, reduction: int = REDUCTION) -> tuple[int, ...]:
    """Return up to ``most`` rungs in a geometric sequence with the factor ``reduction``; the last is ``steps / reduction``.

    Rungs before step 10 are left out, unless no rung would remain.
    """
    rungs = [round(steps / reduction**k) for k in range(1, most + 1)]
    late = [rung for rung in rungs if rung >= FIRST] or rungs[:1]
    return tuple(sorted({rung for rung in late if 0 < rung < steps}))


def judged_once(rungs: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return only the rung nearest to two fifths of the run, for pruning once; empty if there is none."""
    inside = [rung for rung in rungs if 0 < rung < steps]
    return tuple(sorted(inside, key=lambda rung: abs(rung - ONCE * steps))[:1])


class Halving(optuna.pruners.BasePruner):
    """Keep the best 1 in ``reduction`` of the trials that reached a rung (Li et al. 2018, JMLR 18:185; async: 1810.05934).

    Trials that run in parallel all report before the first decision, which is the synchronous algorithm. Trials that run one
    after the other are each compared with the earlier ones, which is the asynchronous algorithm. Optuna's own pruners do
    neither for a batch: SuccessiveHalvingPruner decides when a trial reports, so the first trial of a batch always continues,
    and the median and percentile pruners compare with complete trials, which do not exist during the first batch.

    Args:
        rungs: steps at which trials report.
        reduction: one in ``reduction`` trials continues.
        hyperband: hedge against rungs that come too early. Trials are distributed over brackets in the proportions of
            Hyperband's Algorithm 1, and bracket i skips the first i rungs.
    """

    def __init__(self, rungs: Sequence[int], reduction: int = REDUCTION, hyperband: bool = False) -> None:
        self._rungs, self._reduction = tuple(rungs), reduction
        self._brackets = bracket_sequence(len(self._rungs), reduction) if hyperband else [0]

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether ``trial`` should stop at the rung of its last report."""
        step = trial.last_step
        if step not in self._rungs or self._rungs.index(step) < self.bracket(study, trial):
            return False
        value = trial.intermediate_values[step]
        if math.isnan(value):
            return True
        sign = -1 if study.direction is StudyDirection.MAXIMIZE else 1
        rivals = sorted(
            sign * other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False)
            if step in other.intermediate_values
            and other.state is not TrialState.FAIL  # retried as another trial
            and self.bracket(study, other) == self.bracket(study, trial)
        )
        return sign * value > rivals[max(1, len(rivals) // self._reduction) - 1]

    def bracket(self, study: optuna.Study, trial: FrozenTrial) -> int:
        """Return the trial's bracket; the retry of an interrupted trial keeps the bracket of the original."""
        if len(self._brackets) == 1:
            return 0
        return self._brackets[origin(trial, study.get_trials(deepcopy=False)).number % len(self._brackets)]


def bracket_sequence(rungs: int, reduction: int) -> list[int]:
    """Return the bracket of each trial in one round, with every bracket spread evenly over the round."""
    counts = [math.ceil((rungs + 1) * reduction**s / (s + 1)) for s in range(rungs, -1, -1)]
    places = ([((k + 0.5) / count, bracket) for k in range(count)] for bracket, count in enumerate(counts))
    return [bracket for _, bracket in sorted(itertools.chain(*places))]
