"""What a run of an own trainer has told so far: its reports, whether it is to stop, and its outcome."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from mutransfer.proxies.training import Outcome

__all__ = ["Attempt", "Stop"]


class Stop(Exception):  # noqa: N818 - as StopIteration: nothing went wrong
    """Raised by ``report`` in an own trainer: this trial is not worth training on. Let it pass."""


class Attempt:
    """One run of an own trainer, over all its tries.

    Losses of different trials can be compared only at the same steps: the pruner is asked at the first report at or after
    each rung, as if it were at the rung, and no rung twice. A loss at step 0 is the start, above which a run has diverged.

    Args:
        steps: length of the whole run.
        rungs: steps at which ``ask`` is asked.
        ask: (step, loss) → whether to stop.
        maximize: more is better of what is reported as loss, so that below its start a run has diverged.
        on_report: called with every step that is reported.
    """

    def __init__(
        self, steps: int, rungs: tuple[int, ...] = (), ask: Callable[[int, float], bool] | None = None,
        on_report: Callable[[int], None] = lambda step: None, *, maximize: bool = False,
    ) -> None:  # fmt: skip
        self.steps, self._rungs, self._ask, self._on_report = steps, sorted(rungs), ask, on_report
        self._begun = time.perf_counter()
        self._start = math.nan
        self._last: tuple[int, float] | None = None
        self.stopped, self._maximize = False, maximize

    @property
    def diverged(self) -> bool:
        """Whether the last reported loss is not finite."""
        return self._last is not None and not math.isfinite(self._last[1])

    @property
    def last(self) -> float | None:
        """The last loss that was told."""
        return None if self._last is None else self._last[1]

    def note(self, loss: float) -> None:
        """Note a loss whose step was not told."""
        self._last = (0 if self._last is None else self._last[0]), loss

    def again(self) -> None:
        """Begin another try: what the last one told no longer counts as this one's loss."""
        self._last = None

    def heard(self, step: int, loss: float) -> bool:
        """Note a report, and return whether the run should end here: it is pruned, or has diverged."""
        self._last = step, loss
        self._on_report(step)
        if not math.isfinite(loss):
            return True
        if step == 0:
            self._start = loss
        due = [rung for rung in self._rungs if rung <= step]
        if due and self._ask is not None:
            self._rungs = self._rungs[len(due) :]
            self.stopped = self._ask(due[-1], loss) or self.stopped
        return self.stopped

    def outcome(self, loss: float | None = None, failed: str | None = None) -> Outcome:
        """Return how the run ended: with ``loss``, ``failed``, or else where its last report was answered with a stop."""
        seconds = time.perf_counter() - self._begun
        step, last = self._last or (0, math.nan)
        if failed is not None:
            return Outcome(math.nan, self._start, step, False, seconds, failed, self._maximize)
        if loss is not None:
            return Outcome(loss, self._start, self.steps, False, seconds, maximize=self._maximize)
        return Outcome(last, self._start, step, self.stopped, seconds, maximize=self._maximize)
