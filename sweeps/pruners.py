"""Successive halving that knows batches: a trial is compared with all that have reached its rung, finished or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .workers import origin

__all__ = ["REDUCTION", "Halving", "geometric_rungs", "judged_once"]

REDUCTION = 3
FIRST = 10  # steps before which no trial is judged: a warmup says nothing
ONCE = 0.4  # of a run, where its loss tells the better half of trials from the other, and most of its cost is ahead


def geometric_rungs(steps: int, most: int, reduction: int = REDUCTION) -> tuple[int, ...]:
    """Return up to ``most`` rungs, each ``reduction`` times the one before, the last one ``reduction`` times below ``steps``.

    None comes before step 10, unless that would leave none at all.
    """
    rungs = [round(steps / reduction**k) for k in range(1, most + 1)]
    late = [rung for rung in rungs if rung >= FIRST] or rungs[:1]
    return tuple(sorted({rung for rung in late if 0 < rung < steps}))


def judged_once(rungs: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return the rung that is nearest to two fifths of the run, if there is any: the only one a trial is judged at."""
    inside = [rung for rung in rungs if 0 < rung < steps]
    return tuple(sorted(inside, key=lambda rung: abs(rung - ONCE * steps))[:1])


class Halving(optuna.pruners.BasePruner):
    """Keep the best 1 in ``reduction`` of those that reached a rung (Li et al. 2018, JMLR 18:185; async: 1810.05934).

    Of trials that run side by side all report before the first is judged, and it is the synchronous algorithm; of trials
    one after the other each is compared with those before it, the asynchronous one. Optuna's own pruners do neither for a
    batch: SuccessiveHalvingPruner judges a trial when it reports, so the first of a batch always goes on, and the median
    and percentile pruners compare with complete trials, of which the first batch has none.

    Args:
        rungs: steps at which trials report.
        reduction: one in how many goes on.
        hyperband: hedge against rungs that come too early: the trials are dealt to brackets, of which the i-th is spared
            the first i rungs, in the numbers of Hyperband's Algorithm 1.
    """

    def __init__(self, rungs: Sequence[int], reduction: int = REDUCTION, hyperband: bool = False) -> None:
        self._rungs, self._reduction = tuple(rungs), reduction
        self._dealt = _dealt(len(self._rungs), reduction) if hyperband else [0]

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether ``trial`` is to stop at the rung it has reported last."""
        step = trial.last_step
        if step not in self._rungs or self._rungs.index(step) < self._bracket(study, trial):
            return False
        value = trial.intermediate_values[step]
        if math.isnan(value):
            return True
        sign = -1 if study.direction is StudyDirection.MAXIMIZE else 1
        rivals = sorted(
            sign * other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False)
            if step in other.intermediate_values
            and other.state is not TrialState.FAIL  # begun again as another trial
            and self._bracket(study, other) == self._bracket(study, trial)
        )
        return sign * value > rivals[max(1, len(rivals) // self._reduction) - 1]

    def _bracket(self, study: optuna.Study, trial: FrozenTrial) -> int:
        """What was interrupted and is done again stays in its bracket."""
        if len(self._dealt) == 1:
            return 0
        return self._dealt[origin(trial, study.get_trials(deepcopy=False)).number % len(self._dealt)]


def _dealt(rungs: int, reduction: int) -> list[int]:
    """Return the brackets of one round of trials, each bracket spread evenly over the round."""
    counts = [math.ceil((rungs + 1) * reduction**s / (s + 1)) for s in range(rungs, -1, -1)]
    places = ([((k + 0.5) / count, bracket) for k in range(count)] for bracket, count in enumerate(counts))
    return [bracket for _, bracket in sorted(itertools.chain(*places))]
