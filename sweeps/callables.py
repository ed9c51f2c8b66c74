"""An own trainer that is a Python function: imported where it runs, its failures in one sentence."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mutransfer.errors import RequestError, nearest
from mutransfer.planning.plan import Plan
from mutransfer.proxies.importing import helpers_of, import_file, import_module, said
from mutransfer.proxies.training import Outcome
from mutransfer.recipe import Recipe

from .attempt import Attempt, Stop

__all__ = ["call", "load_trainer"]

FORMS = "path/to/file.py:name or package.module:name"
SIGNATURE = "(recipe, plan, seed, report)"


def load_trainer(reference: str) -> Callable[..., Any]:
    """Return the function that ``reference`` names; relative paths are taken from the current folder.

    Raises:
        RequestError: there is none, it cannot be imported, or it does not take ``(recipe, plan, seed, report)``.
    """
    where, _, name = reference.rpartition(":")
    module = import_file(Path(where), FORMS) if _is_file(where) else import_module(where, FORMS)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        hint = nearest(name, own) if own else f"define a function {name}{SIGNATURE} there."
        raise RequestError(f"{where} has no {name!r}: {hint}")
    function = getattr(module, name)
    if not callable(function):
        raise RequestError(f"{reference} is of type {type(function).__name__}: give a function {name}{SIGNATURE}.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # something compiled, which has none
        return function
    try:
        signature.bind(*range(4))
    except TypeError as error:
        raise RequestError(f"{reference} is called as {name}{SIGNATURE} and takes {signature} ({error}).") from None
    return function


def call(reference: str, recipe: Recipe, plan: Plan, seed: int, attempt: Attempt) -> Outcome:
    """Train by the function that ``reference`` names, and return how it ended.

    It is called as ``train(recipe, plan, seed, report)`` and returns the final loss; ``report(step, loss)`` raises `Stop`
    if it should not go on, and ``report.steps`` is the length of the run. Torch is seeded before, so that a trial is the
    same wherever and after whatever it runs. An exception of its own is a failed run.

    Raises:
        RequestError: it cannot be imported, or what it reports or returns is no number.
    """
    function = load_trainer(reference)
    where = reference.rpartition(":")[0]
    file = str(Path(where).expanduser().resolve()) if _is_file(where) else None

    torch.manual_seed(seed)
    try:
        with helpers_of(Path(file).parent) if file else contextlib.nullcontext():
            loss = function(recipe, plan, seed, _Reporter(reference, attempt))
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        # Also what it raised in answer to the stop, and a loss that is not finite ends in many ways.
        if attempt.stopped or attempt.diverged:
            return attempt.outcome()
        return attempt.outcome(failed=f"{reference} raised {said(error, file)}")
    return attempt.outcome(_loss(loss, f"{reference} returned"))


class _Reporter:
    """What a trainer is given as ``report``."""

    def __init__(self, reference: str, attempt: Attempt) -> None:
        self._reference, self._attempt, self.steps = reference, attempt, attempt.steps

    def __call__(self, step: int, loss: float) -> None:
        if self._attempt.heard(_step(step, self._reference), _loss(loss, f"{self._reference} reported")):
            raise Stop


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or "\\" in where


def _step(step: Any, reference: str) -> int:
    with contextlib.suppress(TypeError):
        if (whole := operator.index(step)) >= 0 and not isinstance(step, bool):
            return whole
    raise RequestError(f"{reference} reported at step {step!r}: give the number of optimizer steps done.")


def _loss(loss: Any, what: str) -> float:
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if not isinstance(loss, (bool, str)):
            return float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
    shown = "None" if loss is None else f"{type(loss).__name__} {loss!s:.60}".replace("\n", " ")
    raise RequestError(f"{what} {shown}: give the loss, one number ({math.nan} where it is none).")
