"""Check learning rate schedulers against a plan: those that multiply keep the groups' ratios, absolute values break them.

A scheduler that writes the same number into every group (a peak, a floor) silently switches training to the standard
parametrization. Such numbers are looked up by name in torch's own schedulers; all other behavior is checked by stepping a
copy, whose groups must stay in proportion.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import RequestError, describe
from ..param_names import planned_names

__all__ = ["check", "per_group"]

TOLERANCE = 1e-6  # relative, as in `audit`: float32 learning rates round at 6e-8
SAFE = "a LambdaLR whose floor is a fraction of each rate"
# Scheduler class → argument, and where its value per group is stored: an attribute of the scheduler or a key of the groups.
LISTS = {
    "OneCycleLR": (("max_lr", "max_lr"),),
    "CyclicLR": (("base_lr", "base_lrs"), ("max_lr", "max_lrs")),
    "ReduceLROnPlateau": (("min_lr", "min_lrs"),),
    "SWALR": (("swa_lr", "swa_lr"),),
}
NUMBERS = ("eta_min",)  # arguments that torch accepts only as a single number
# Raised past the last step, for example by OneCycleLR or by a LambdaLR over a list.
ENDED = (ValueError, LookupError, StopIteration)


def per_group(planned: Mapping[str, float], lr: float, groups: list[dict[str, Any]], value: float) -> list[float]:
    """Return ``value`` times each group's learning rate factor; see `Plan.per_group`.

    Args:
        planned: parameter name → its learning rate in the plan.
        lr: the recipe's learning rate.
        groups: an optimizer's parameter groups, with parameter names.
        value: a learning rate of the base model.
    """
    names = [_names(i, group) for i, group in enumerate(groups)]
    owners = planned_names({name for each in names for name in each}, planned)
    rates = []
    for i, each in enumerate(names):
        unplanned = next((name for name in each if owners[name] not in planned), None)
        if unplanned is not None:
            raise RequestError(
                f"parameter group {i} holds {unplanned!r}, which is not in the plan: plan the same model."
            )
        lrs = {planned[owners[name]] for name in each}
        if len(lrs) != 1:
            raise RequestError(
                f"parameter group {i} has parameters with {len(lrs)} planned learning rates: build the optimizer from "
                "plan.param_groups(model), one group per setting."
            )
        rates.append(value * (lrs.pop() / lr))
    return rates


def check(rates: Mapping[str, float], lr: float, scheduler: Any, steps: int) -> None:
    """Raise if a scheduler would not keep the plan's ratios; see `Plan.check_scheduler`.

    Args:
        rates: parameter name → its learning rate in the plan.
        lr: the recipe's learning rate.
        scheduler: a scheduler with the interface of torch's.
        steps: how many steps to try on a copy.
    """
    for leaf in _leaves(scheduler):
        name, planned = type(leaf).__name__, per_group(rates, lr, leaf.optimizer.param_groups, lr)
        if max(planned) == min(planned):
            continue  # all groups have the same rate
        for argument, place in LISTS.get(name, ()):
            values = getattr(leaf, place, None) or [group[place] for group in leaf.optimizer.param_groups]
            if not _proportional([float(value) for value in values], planned):
                raise RequestError(
                    f"{name} sets {argument} to {_show(values)}, which does not keep the {len(planned)} groups' ratios: pass "
                    f"{argument}=plan.per_group(optimizer, value), where value is the learning rate of the base model."
                )
        for argument in NUMBERS:
            if getattr(leaf, argument, 0):
                raise RequestError(
                    f"{name} ends at {argument}={getattr(leaf, argument):g} for all {len(planned)} groups, whose rates differ by "
                    f"{max(planned) / min(planned):.4g}x: leave {argument} at 0, or use {SAFE}."
                )
        if name != "ReduceLROnPlateau":  # its steps depend on a metric, and one factor applies to all groups
            _refuse_drift(leaf, name, planned, steps)


def _leaves(scheduler: Any) -> Iterator[Any]:
    """Yield the schedulers inside SequentialLR and ChainedScheduler, which have no learning rate of their own."""
    inner = getattr(scheduler, "_schedulers", None)
    if inner is not None:
        for each in inner:
            yield from _leaves(each)
    elif isinstance(getattr(scheduler, "optimizer", None), torch.optim.Optimizer):
        yield scheduler
    else:
        raise RequestError(
            f"{type(scheduler).__name__} is not the scheduler of an optimizer: pass a scheduler like torch's."
        )


def _refuse_drift(scheduler: Any, name: str, planned: list[float], steps: int) -> None:
    twin = _detached(scheduler)
    for step in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the copy's optimizer is never stepped
            try:
                twin.step()
            except ENDED:
                return
            except Exception as error:
                raise RequestError(
                    f"{name} cannot be tried on a copy ({describe(error)}): use one whose step() needs no arguments."
                ) from error
        rates = [float(group["lr"]) for group in twin.optimizer.param_groups]
        if not _proportional(rates, planned):
            raise RequestError(
                f"{name} gives the groups the learning rates {_show(rates)} after {step + 1} steps, which are not in the "
                f"plan's ratios ({_show(planned)}): use a scheduler that multiplies each group's own rate by the same factor."
            )


def _detached(scheduler: Any) -> Any:
    """Return a copy of the scheduler on an optimizer with the same settings and no weights, so that neither original moves."""
    real = scheduler.optimizer
    bare = torch.optim.SGD([torch.zeros(())])
    bare.defaults = dict(real.defaults)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in real.param_groups]
    bare.param_groups = [copy.deepcopy(each) | {"params": [torch.zeros(())]} for each in settings]
    return copy.deepcopy(scheduler, {id(real): bare})


def _proportional(values: list[float], planned: list[float]) -> bool:
    ratios = [value / lr for value, lr in zip(values, planned, strict=True)]
    # a cosine ends at zero, where rounding errors are not in proportion
    return all(math.isclose(ratio, ratios[0], rel_tol=TOLERANCE, abs_tol=1e-12) for ratio in ratios)


def _names(index: int, group: dict[str, Any]) -> list[str]:
    """Return the parameter names of an optimizer's group, or of a group that is not in an optimizer yet."""
    names = group.get("param_names") or [each[0] for each in group["params"] if isinstance(each, tuple)]
    if len(names) != len(group["params"]) or not names:
        raise RequestError(
            f"parameter group {index} has no names for its {len(group['params'])} parameters: build the optimizer from "
            "plan.param_groups(model), which keeps them."
        )
    return list(names)


def _show(values: list[Any]) -> str:
    return ", ".join(f"{value:.4g}" for value in sorted({float(value) for value in values}))
