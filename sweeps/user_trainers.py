"""Train with a user's Python function: import it in the process that runs it, handle its reports, and describe its failures."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mutransfer.errors import RequestError, TrainerError, nearest
from mutransfer.planning.plan import Plan
from mutransfer.proxies.importing import describe_exception, helpers_of, import_file, import_module
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe

__all__ = ["TrialRun", "Failures", "Stop", "call", "load_trainer", "needed"]


class Stop(Exception):  # noqa: N818 - as StopIteration: nothing went wrong
    """Raised by ``report`` in a user trainer to end a pruned or diverged trial. Trainers should not catch it."""


class TrialRun:
    """One run of a user trainer, over all its attempts.

    Losses of different trials are only comparable at the same steps. A trial is therefore judged once per rung, by the first
    report at or after the rung as if it were at the rung. A loss reported at step 0 is the starting loss; a run that ends above
    it has diverged.

    Args:
        steps: length of the whole run.
        rungs: steps at which the run may be stopped.
        on_report: called with the step of every report.
        maximize: whether higher reported values are better; a run that ends below its start has then diverged.

    Attributes:
        stopped: whether the run is stopped early; set by the caller of `on_report`.
    """

    def __init__(
        self, steps: int, rungs: tuple[int, ...] = (), on_report: Callable[[int], None] = lambda step: None, *,
        maximize: bool = False,
    ) -> None:  # fmt: skip
        self.steps, self._rungs, self._on_report = steps, sorted(rungs), on_report
        self._begun = time.perf_counter()
        self._start = math.nan
        self._last: tuple[int, float] | None = None
        self.stopped, self._maximize = False, maximize

    @property
    def diverged(self) -> bool:
        """Whether the last reported loss is not finite."""
        return self._last is not None and not math.isfinite(self._last[1])

    @property
    def over(self) -> bool:
        """Whether the run should end because it is stopped or has diverged."""
        return self.stopped or self.diverged

    @property
    def last(self) -> float | None:
        """The last reported loss."""
        return None if self._last is None else self._last[1]

    def note(self, loss: float) -> None:
        """Record a loss that was reported without a step."""
        self._last = (0 if self._last is None else self._last[0]), loss

    def again(self) -> None:
        """Start another attempt, discarding the loss that the previous one reported."""
        self._last = None

    def on_report(self, step: int, loss: float) -> int | None:
        """Record a report; return the rung at which it counts, or None if it is not the first report after a rung."""
        self._last = step, loss
        self._on_report(step)
        if not math.isfinite(loss):
            return None
        if step == 0:
            self._start = loss
        due = [rung for rung in self._rungs if rung <= step]
        self._rungs = self._rungs[len(due) :]
        return due[-1] if due else None

    def outcome(self, loss: float | None = None, failed: str | None = None) -> Outcome:
        """Return the outcome of the run: ``failed``, the final ``loss``, or else the last report, at which it was stopped."""
        seconds = time.perf_counter() - self._begun
        step, last = self._last or (0, math.nan)
        if failed is not None:
            return Outcome(math.nan, self._start, step, False, seconds, failed, self._maximize)
        if loss is not None:
            return Outcome(loss, self._start, self.steps, False, seconds, maximize=self._maximize)
        return Outcome(last, self._start, step, self.stopped, seconds, maximize=self._maximize)


FORMS = "path/to/file.py:name or package.module:name"
SIGNATURE = "(recipe, plan, seed, report)"


def load_trainer(reference: str) -> Callable[..., Any]:
    """Return the function that ``reference`` names; relative paths start at the current folder.

    Raises:
        TrainerError: the function does not exist, cannot be imported, or does not take ``(recipe, plan, seed, report)``.
    """
    where, _, name = reference.rpartition(":")
    module = import_file(Path(where), FORMS) if _is_file(where) else import_module(where, FORMS)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        hint = nearest(name, functions) if functions else f"define a function {name}{SIGNATURE} there."
        raise TrainerError(f"{where} has no {name!r}: {hint}")
    function = getattr(module, name)
    if not callable(function):
        raise TrainerError(f"{reference} is of type {type(function).__name__}: give a function {name}{SIGNATURE}.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled functions may have no signature
        return function
    try:
        signature.bind(*range(4))
    except TypeError as error:
        raise TrainerError(f"{reference} is called as {name}{SIGNATURE} but takes {signature} ({error}).") from None
    return function


def call(
    reference: str, recipe: Recipe, plan: Plan, seed: int, attempt: TrialRun,
    stops: Callable[[int, float], bool] = lambda rung, loss: False,
) -> Outcome:  # fmt: skip
    """Train with the function that ``reference`` names and return the outcome.

    ``stops`` is called with (rung, loss) at each rung of ``attempt`` and returns whether the run should end there.

    The function is called as ``train(recipe, plan, seed, report)`` and returns the final loss; ``report(step, loss)`` raises
    `Stop` if the run should end, and ``report.steps`` is the length of the run. Torch is seeded before the call, which makes a
    trial independent of the process that runs it and of earlier trials. An exception raised by the function is a failed run.

    Raises:
        RequestError: the function cannot be imported.
        TrainerError: it reports or returns something that is not a number.
    """
    function = load_trainer(reference)
    where = reference.rpartition(":")[0]
    file = str(Path(where).expanduser().resolve()) if _is_file(where) else None

    torch.manual_seed(seed)
    try:
        with helpers_of(Path(file).parent) if file else contextlib.nullcontext():
            loss = function(recipe, plan, seed, _Reporter(reference, attempt, stops))
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        # This includes what it raised in response to `Stop`; and a loss that is not finite can end in any exception.
        if attempt.over:
            return attempt.outcome()
        return attempt.outcome(failed=f"{reference} raised {describe_exception(error, file)}")
    return attempt.outcome(_loss(loss, f"{reference} returned"))


class _Reporter:
    """The ``report`` argument of a trainer."""

    def __init__(self, reference: str, attempt: TrialRun, stops: Callable[[int, float], bool]) -> None:
        self._reference, self._attempt, self._stops, self.steps = reference, attempt, stops, attempt.steps

    def __call__(self, step: int, loss: float) -> None:
        step, loss = _step(step, self._reference), _loss(loss, f"{self._reference} reported")
        rung = self._attempt.on_report(step, loss)
        if rung is not None and self._stops(rung, loss):
            self._attempt.stopped = True
        if self._attempt.over:
            raise Stop


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or "\\" in where


def _step(step: Any, reference: str) -> int:
    with contextlib.suppress(TypeError):
        if (whole := operator.index(step)) >= 0 and not isinstance(step, bool):
            return whole
    raise TrainerError(f"{reference} reported at step {step!r}: give the number of optimizer steps done.")


def _loss(loss: Any, what: str) -> float:
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if not isinstance(loss, (bool, str)):
            return float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
    shown = "None" if loss is None else f"{type(loss).__name__} {loss!s:.60}".replace("\n", " ")
    raise TrainerError(f"{what} {shown}: give the loss, one number ({math.nan} if there is none).")


class Failures:
    """Counter of consecutive failures in a sweep that runs ``capacity`` trials at a time.

    One transient cause may fail all trials that run at once, so a sweep ends only after ``capacity`` + 2 failures in a row. As
    long as no trial has ever finished, the cause is probably not transient and the limit is at most 2: a script that cannot work
    should not run all night.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.in_a_row = 0

    def note(self, number: int, outcome: Outcome, finished: int) -> None:
        """Count the outcome of trial ``number``; ``finished`` is the number of finished trials in the study.

        Raises:
            TrainerError: too many trials in a row have failed.
        """
        self.in_a_row = self.in_a_row + 1 if outcome.failed else 0
        if self.in_a_row < (self.capacity + 2 if finished else min(self.capacity, 2)) or not outcome.failed:
            return
        if finished:
            raise TrainerError(
                f"{self.in_a_row} trials in a row failed, the last, trial {number}, because {outcome.failed}: fix that and run "
                "the same command again; finished trials are kept."
            )
        raise TrainerError(
            f"trial {number} failed because {outcome.failed}, and none has finished yet: fix that and run the same command "
            "again."
        )


def needed(outcome: Outcome, what: str) -> Outcome:
    """Return ``outcome`` unchanged; ``what`` describes its run, which no other run can replace.

    Raises:
        TrainerError: the run failed.
    """
    if outcome.failed:
        raise TrainerError(
            f"{what} failed because {outcome.failed}: fix that and run the same command again; finished runs are kept."
        )
    return outcome
