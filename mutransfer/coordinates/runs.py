"""One size of a model trained for a few steps from several seeds, and everything that is measured on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..family import Family
from ..names import planned_names
from .lanes import Lane, lanes
from .parameters import decays, shrink, sizes_of_gradients, sizes_of_pulls, sizes_of_steps, sizes_of_weights
from .places import ROOT, naming, places, units
from .setups import Setup
from .watching import Pass, Tensors, Watched, watch

__all__ = ["layers", "run"]

Row = dict[str, Any]
# (name, role, statistic, step) and the sizes [seeds]
Measured = tuple[str, str, str, int, torch.Tensor]


def run(
    family: Family,
    setup: Setup,
    seeds: Sequence[int],
    steps: int,
    device: str,
    growing: dict[str, int] | None,
    progress: Callable[[int], None],
) -> Iterator[Row]:
    """Train on the family's example batch and yield a row per module or parameter, statistic, step and seed.

    Args:
        family: what is trained.
        setup: its weights and optimizer.
        seeds: of the initial weights.
        steps: optimizer steps.
        device: where to train.
        growing: stacks of layers of a check over depths (`places.places`); None for one over widths.
        progress: called with the seeds done.
    """
    batch = family.batch_on(device)
    watched: Watched | None = None
    done = 0
    for make in lanes(family, setup.build, setup.make_optimizer, seeds, batch, setup.stacked):
        progress(done)
        here, lane = make()
        if watched is None:
            watched = _survey(family, lane.model, setup, growing, batch)
        found = list(_measure(lane, setup, watched, steps, parameters=growing is None))
        values = torch.stack([value.detach().double().cpu() for *_, value in found]).T.tolist()
        for seed, column in zip(here, values, strict=True):
            for (name, role, statistic, step, _), value in zip(found, column, strict=True):
                yield {"module": name, "role": role, "statistic": statistic, "step": step, "seed": seed, "value": value}
        done += len(here)


def layers(model: torch.nn.Module) -> dict[str, int]:
    """Return every numbered stack of modules with its length."""
    counts: dict[str, int] = {}
    for name, _ in model.named_modules():
        stack, _, last = name.rpartition(".")
        if last.isdigit():
            counts[stack] = max(counts.get(stack, 0), int(last) + 1)
    return counts


def _survey(
    family: Family, model: torch.nn.Module, setup: Setup, growing: dict[str, int] | None, batch: Any
) -> Watched:
    """Return what to watch, its roles corrected by a forward pass; say which modules never run."""
    roles = setup.roles(model)
    stacks = None if growing is None else {name: n for name, n in layers(model).items() if name in growing}
    called = naming(model, setup.known)
    shown = places(model, set(roles), stacks, called)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    watched = Watched(shown, roles)
    with torch.no_grad(), torch.random.fork_rng([]), watch(model, watched, None, None, survey=True) as seen:
        family.loss_on(model, batch)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if idle := [shown[name] for name in _silent(family, model, batch, [n for n in shown if n in roles], seen)]:
        warnings.warn(
            f"{', '.join(idle[:6])}{f' and {len(idle) - 6} more' if idle[6:] else ''} of {family.name} gave no floating output "
            "on the example batch, so the check says nothing about it: give a batch that uses it.",
            stacklevel=2,
        )
    if growing is not None:
        return watched
    known = {name: owner.role for name, owner in setup.known.items()}
    measured = units(model, seen.ran, roles, known)
    return replace(watched, shown={name: called(name) or ROOT for name in measured} | shown, units=measured)


def _silent(family: Family, model: torch.nn.Module, batch: Any, names: list[str], seen: Pass) -> list[str]:
    """Return the modules that take no part: no output, and no weight that the loss reaches.

    A layer whose weight is used by another's forward (Mamba's fused projections, a tied head) gives no output itself and
    is at work all the same.
    """
    quiet = [name for name in names if name not in seen.outputs]
    if not quiet:
        return []
    # A pass of its own, without hooks: a model that changes its features in place cannot be followed backward with them.
    parameters = {name: list(model.get_submodule(name).parameters()) for name in quiet}
    wanted = [each for own in parameters.values() for each in own if each.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad(), torch.random.fork_rng([]):
        found = torch.autograd.grad(family.loss_on(model, batch), wanted, allow_unused=True) if wanted else ()
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])
    reached = {id(each) for each, gradient in zip(wanted, found, strict=True) if gradient is not None}
    return [name for name, own in parameters.items() if not any(id(each) in reached for each in own)]


def _measure(lane: Lane, setup: Setup, watched: Watched, steps: int, parameters: bool) -> Iterator[Measured]:
    start: Pass | None = None
    first: Tensors | None = None
    pulls: Tensors = {}
    shrunk: dict[str, float] = {}
    stacked = lane.size > 1
    owners = planned_names(lane.parameters, setup.known)
    own_parameters = {owners[name]: each for name, each in lane.parameters.items()}
    moved: Tensors = {}
    names = watched.recorded_names()
    updates = {name: (unit, role) for unit, own in watched.units.items() for name, role in own.updates.values()}
    if updates:
        wanted = {name for own in watched.units.values() for name in own.first.values()}
        first = {name: each.detach().clone() for name, each in lane.parameters.items() if name in wanted}
        moved = {owners[name]: each for name, each in first.items()}
    for step in range(steps + 1):
        losses, seen = lane.forward(watched, start, first if step in (1, steps) else None)
        for (name, statistic), value in seen.sizes.items():
            if statistic == "update":
                unit, role = updates[name]
                folded = setup.divisors.get(unit, 1.0) if role != "output" else 1.0
                yield name, role, statistic, step, value / folded
                continue
            role = watched.roles.get(name, "stream")
            # A feature that carries a folded multiplier (queries, a final norm before a tied readout) is compared as
            # it is without it; a logit is what it is.
            folded = setup.divisors.get(name, 1.0) if role != "output" and statistic != "input" else 1.0
            yield watched.shown[name], role, statistic, step, value / folded
        if step == 0:
            start = seen
        if parameters and step in (0, steps):
            for name, value in sizes_of_weights(own_parameters, setup.known, stacked):
                yield name, setup.known[name].role, "weight", step, value
        if step in (1, steps):
            for name, value in sizes_of_steps(own_parameters, moved, pulls, shrunk, setup.known, stacked):
                for recorded in names.get(name, ()):
                    yield recorded, setup.known[name].role, "step", step, value
        if parameters and step == 0:
            for name, taken in decays(own_parameters, setup.known, lane.optimizer):
                yield name, setup.known[name].role, "decay", step, torch.full((lane.size,), taken)
        if step < steps:
            lane.backward(losses)
            pulls = sizes_of_pulls(own_parameters, moved, setup.known, lane.optimizer, stacked) if step == 0 else {}
            shrink(shrunk, own_parameters, setup.known, lane.optimizer)
            if parameters and step in (0, steps - 1):
                for name, value in sizes_of_gradients(own_parameters, setup.known, lane.optimizer, stacked):
                    yield name, setup.known[name].role, "gradient", step, value
            lane.optimizer.step()
