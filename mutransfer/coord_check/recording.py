"""Train a family for a few steps at several widths or depths and record the size of every module's output."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch

from .._torch_internals import tree_leaves
from ..devices import devices_of, is_out_of_memory, random_state_restored, seeded_generators
from ..errors import DataError, RequestError, nearest
from ..family import Family, unwrapped
from ..optimizers.rules import OPTIMIZERS
from ..param_names import pattern_of, planned_names
from ..parametrizations.tables import table
from ..planning.build import plan
from ..planning.plan import Plan
from ..recipe import Recipe, Scale
from ..schemas import COORDINATES
from ..tracing.observe import observe, with_depth_constants
from ..tracing.run import build, on_fake_tensors
from ..tracing.specs import Observation
from .cache import CheckCache
from .measure import (
    ROOT,
    Owned,
    Pass,
    Tensors,
    Watched,
    decays,
    module_roles,
    naming,
    owned,
    places,
    shrink,
    sizes_of_gradients,
    sizes_of_pulls,
    sizes_of_steps,
    sizes_of_weights,
    units,
    watch,
)
from .stacked import StackedModels, stacked_models

__all__ = ["OWN", "Setup", "as_built", "as_planned", "divisors", "layers", "of_repeated", "record", "run"]

OWN = "own"  # in place of the name of a parametrization: the model as its builder leaves it
FUSED = ("adamw", "adam", "sgd")  # optimizers with a fused step on every device; the arithmetic is the same


@dataclass(frozen=True)
class Setup:
    """How to build, train and measure one model of a check.

    Args:
        scale: size of the model.
        build: seed → initialized model.
        make_optimizer: model → its optimizer.
        roles: model → role by module.
        divisors: module → the multiplier folded into it, by which its features are divided.
        known: parameter → role and units.
        added_in: where residual branches are added to the stream (`Observation`).
        stacked: whether seeds may be stacked.
    """

    scale: Scale
    build: Callable[[int], torch.nn.Module]
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
    roles: Callable[[torch.nn.Module], dict[str, str]]
    divisors: Mapping[str, float]
    known: Mapping[str, Owned]
    added_in: Mapping[str, str]
    stacked: bool


def as_planned(family: Family, planned: Plan, seen: Observation, device: str) -> Setup:
    """Return the setup of the model that ``planned`` initializes, with the plan's optimizer."""

    def build(seed: int) -> torch.nn.Module:
        model = unwrapped(family.built(planned.scale, device))
        planned.attach(model)
        planned.initialize(model, seed)
        return model

    rule, ratio = OPTIMIZERS[planned.optimizer], planned.scale.width / family.base.width
    inside = {name: ratio**spec.constant for name, spec in seen.specs.items() if spec.constant_inside}
    options: dict[str, Any] = {"fused": True} if planned.optimizer in FUSED else {}
    return Setup(
        scale=planned.scale,
        build=build,
        make_optimizer=partial(planned.make_optimizer, **options),
        roles=partial(module_roles, planned=planned, attention=_growing_attention(seen)),
        divisors=divisors(planned, inside),
        known=owned(planned),
        added_in=seen.added_in,
        stacked=rule.entrywise,
    )


def as_built(family: Family, scale: Scale, seen: Observation, optimizer: str, lr: float, device: str) -> Setup:
    """Return the setup of the model as its builder leaves it, for users who implement µP in their own code.

    A model on which ``mup.set_base_shapes`` was called is trained with mup's optimizer of that name, any other model with
    torch's optimizer and a single learning rate.

    Raises:
        RequestError: the optimizer is not one of adam, adamw and sgd, or the roles of the model cannot be inferred.
    """
    if optimizer not in FUSED:
        raise RequestError(
            f"a model's own parametrization is checked with adam, adamw or sgd, not {optimizer!r}: {nearest(optimizer, FUSED)}"
        )

    def build(seed: int) -> torch.nn.Module:
        with seeded_generators(seed, [device]):
            return unwrapped(family.built(scale, device))

    annotated = any(hasattr(parameter, "infshape") for parameter in build(0).parameters())
    planned = plan(family, scale, "sp", observation=seen)  # for the roles

    def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        if annotated:
            import mup

            made: torch.optim.Optimizer = {"adamw": mup.MuAdamW, "adam": mup.MuAdam, "sgd": mup.MuSGD}[optimizer](
                model.parameters(), lr=lr
            )
            return made
        cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        return cls(model.parameters(), lr=lr, fused=True)

    known = {row.name: Owned(row.role, None) for row in planned.rows}
    roles = partial(module_roles, planned=planned, attention=_growing_attention(seen))
    return Setup(scale, build, make_optimizer, roles, {}, known, seen.added_in, stacked=not annotated)


def _growing_attention(seen: Observation) -> frozenset[str]:
    """Return the parameters that produce queries and keys if the head dim grows with the width, else none."""
    if seen.heads.ratio == 1:
        return frozenset()
    return frozenset().union(*(each.queries | each.keys for each in seen.attentions))


def divisors(planned: Plan, constants: Mapping[str, float]) -> dict[str, float]:
    """Return, by module, the number by which its features are divided: the multipliers folded into it.

    Args:
        planned: the plan that folds them.
        constants: parameter → number by which its module multiplies its own output, which is part of the features.
    """
    found: dict[str, float] = {}
    rules = table(planned.parametrization).rows
    for row in planned.rows:
        # A multiplier that the table itself folds is part of the function, so it is not divided out.
        correction = constants.get(row.name, 1.0) / rules[row.role].gauge(row.m_in, row.m_out)
        module = _measured_at(row.name)
        found[module] = row.gauge * correction * found.get(module, 1.0)  # a parametrized weight has several parameters
    return found


def of_repeated(divisors: Mapping[str, float], stacks: Collection[str], seen: Observation) -> dict[str, float]:
    """Return the divisors for a check over depths: only those of modules in a growing stack or used by every layer.

    A multiplier on a branch that depth does not repeat belongs to no rule and must remain visible.
    """

    def repeats(name: str) -> bool:
        parts = name.split(".")
        if any(part.isdecimal() and ".".join(parts[:i]) in stacks for i, part in enumerate(parts)):
            return True
        spec = seen.specs.get(f"{name}.weight") or seen.specs.get(name)
        return spec is not None and spec.rounds[1] > 0

    return {name: divisor for name, divisor in divisors.items() if repeats(name)}


def _of_branches(
    divisors: Mapping[str, float], parameters: Collection[str], added_in: Mapping[str, str]
) -> dict[str, float]:
    """Return ``divisors`` with those of modules that own several parameters and return a residual branch.

    A stack of experts, or a mixer whose last projection is never called as a module, returns what the branch's last parameter
    has multiplied.
    """
    found = dict(divisors)
    for module in {name[:i] for name in parameters for i, letter in enumerate(name) if letter == "."}:
        if module not in found and (ends := _branch_ends(module, parameters, added_in)):
            found[module] = divisors.get(_measured_at(ends[0]), 1.0)
    return found


def _branch_ends(module: str, parameters: Collection[str], added_in: Mapping[str, str]) -> list[str]:
    """Return the parameters in ``module`` that end a residual branch, if it is added to the stream outside of the module."""
    ends = [name for name in parameters if name.startswith(f"{module}.") and pattern_of(name) in added_in]
    inside = any(f"{added_in[pattern_of(name)]}.".startswith(f"{pattern_of(module)}.") for name in ends)
    return [] if inside else ends


def _measured_at(parameter: str) -> str:
    """Return the module whose output has the factor of ``parameter``, or the name of a parameter that is no module's weight."""
    return parameter.removesuffix(".weight").partition(".parametrizations.")[0]


Row = dict[str, Any]
# (name, role, statistic, step, sizes [seeds])
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
        family: the model family to train.
        setup: how to build its models and their optimizer.
        seeds: seeds of the initial weights.
        steps: number of optimizer steps.
        device: the device to train on.
        growing: stacks of layers for a check over depths (`places`); None for a check over widths.
        progress: called with the number of seeds done.
    """
    batch = family.batch_on(device)
    watched: Watched | None = None
    done, groups = 0, deque([list(seeds)])
    while groups:
        progress(done)
        group = groups.popleft()
        try:
            makers = stacked_models(family, setup.build, setup.make_optimizer, group, batch, setup.stacked)
            if len(makers) == 1:
                rows, watched = _trained(family, setup, makers[0], steps, growing, batch, watched)
        except Exception as error:
            if len(group) == 1 or not is_out_of_memory(error):
                raise
            makers = []
        if len(makers) != 1:  # the seeds cannot be stacked, or there is no memory for as many
            size = 1 if makers else (len(group) + 1) // 2
            groups.extendleft(reversed([group[i : i + size] for i in range(0, len(group), size)]))
            continue
        yield from rows
        done += len(group)


def _trained(
    family: Family, setup: Setup, make: Callable[[], tuple[list[int], StackedModels]], steps: int,
    growing: dict[str, int] | None, batch: Any, watched: Watched | None,
) -> tuple[list[Row], Watched]:  # fmt: skip
    """Train one stack of models; return its rows, and what was measured, which is surveyed on the first stack."""
    seeds, stack = make()
    if watched is None:
        watched = _survey(family, stack.model, setup, growing, batch)
    found = list(_measure(stack, setup, watched, steps, parameters=growing is None))
    device = found[0][-1].device
    values = torch.stack([value.detach().to(device, torch.float64) for *_, value in found]).T.tolist()  # waits once
    rows = [
        {"module": name, "role": role, "statistic": statistic, "step": step, "seed": seed, "value": value}
        for seed, column in zip(seeds, values, strict=True)
        for (name, role, statistic, step, _), value in zip(found, column, strict=True)
    ]
    return rows, watched


def layers(model: torch.nn.Module) -> dict[str, int]:
    """Return name → length of every numbered stack of modules."""
    counts: dict[str, int] = {}
    for name, _ in model.named_modules():
        stack, _, last = name.rpartition(".")
        if last.isdigit():
            counts[stack] = max(counts.get(stack, 0), int(last) + 1)
    return counts


def _survey(
    family: Family, model: torch.nn.Module, setup: Setup, growing: dict[str, int] | None, batch: Any
) -> Watched:
    """Return the modules to measure, with roles corrected by a forward pass, and warn about modules that have no part in it."""
    roles = setup.roles(model)
    stacks = None if growing is None else {name: n for name, n in layers(model).items() if name in growing}
    called = naming(model, setup.known)
    shown = places(model, set(roles), stacks, called)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    watched = Watched(shown, roles)
    devices = devices_of(model.parameters())
    with torch.no_grad(), random_state_restored(devices), watch(model, watched, None, None, survey=True) as seen:
        family.loss_on(model, batch)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if idle := [shown[name] for name in _unused_modules(family, model, batch, [n for n in shown if n in roles], seen)]:
        warnings.warn(
            f"{', '.join(idle[:6])}{f' and {len(idle) - 6} more' if idle[6:] else ''} of {family.name} gave no floating-point "
            "output on the example batch and cannot be checked: pass a batch that uses every module.",
            stacklevel=2,
        )
    if growing is not None:
        # A layer that returns its branch is not the stream: the branch falls with the depth by the table's own power, and is
        # measured at the module that ends it.
        for name in list(shown):
            stack, _, last = name.rpartition(".")
            is_layer = last.isdigit() and stack in growing and f"{name}.weight" not in setup.known
            if is_layer and _branch_ends(name, setup.known, setup.added_in):
                del shown[name]
        return watched
    known = {name: owner.role for name, owner in setup.known.items()}
    measured = units(model, seen.ran, roles, known)
    return replace(watched, shown={name: called(name) or ROOT for name in measured} | shown, units=measured)


def _unused_modules(family: Family, model: torch.nn.Module, batch: Any, names: list[str], seen: Pass) -> list[str]:
    """Return the modules among ``names`` that have no effect: no output, and no weight that the loss depends on.

    A layer whose weight is used by another module's forward (Mamba's fused projections, a tied head) has no output itself but
    does have an effect.
    """
    quiet = [name for name in names if name not in seen.outputs]
    if not quiet:
        return []
    # A separate pass without hooks, because autograd fails through hooks on a model that changes its features in place.
    parameters = {name: list(model.get_submodule(name).parameters()) for name in quiet}
    wanted = [each for members in parameters.values() for each in members if each.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad(), random_state_restored(devices_of(model.parameters())):
        found = torch.autograd.grad(family.loss_on(model, batch), wanted, allow_unused=True) if wanted else ()
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])
    reached = {id(each) for each, gradient in zip(wanted, found, strict=True) if gradient is not None}
    return [name for name, members in parameters.items() if not any(id(each) in reached for each in members)]


def _measure(stack: StackedModels, setup: Setup, watched: Watched, steps: int, parameters: bool) -> Iterator[Measured]:
    start: Pass | None = None
    first: Tensors | None = None
    pulls: Tensors = {}
    shrunk: dict[str, float] = {}
    stacked = stack.size > 1
    owners = planned_names(stack.parameters, setup.known)
    planned_parameters = {owners[name]: each for name, each in stack.parameters.items()}
    moved: Tensors = {}
    names = watched.recorded_names()
    updates = {name: (module, role) for module, unit in watched.units.items() for name, role in unit.updates.values()}
    if updates:
        wanted = {name for unit in watched.units.values() for name in unit.first.values()}
        first = {name: each.detach().clone() for name, each in stack.parameters.items() if name in wanted}
        moved = {owners[name]: each for name, each in first.items()}
    for step in range(steps + 1):
        losses, seen = stack.forward(watched, start, first if step in (1, steps) else None)
        for (name, statistic), value in seen.sizes.items():
            if statistic == "update":
                module, role = updates[name]
                folded = setup.divisors.get(module, 1.0) if role != "output" else 1.0
                yield name, role, statistic, step, value / folded
                continue
            role = watched.roles.get(name, "stream")
            # Features with a folded multiplier (queries, a final norm before a tied readout) are compared without it; logits
            # are compared as they are.
            folded = setup.divisors.get(name, 1.0) if role != "output" and statistic != "input" else 1.0
            yield watched.shown[name], role, statistic, step, value / folded
        if step == 0:
            start = seen
        if parameters and step in (0, steps):
            for name, value in sizes_of_weights(planned_parameters, setup.known, stacked):
                yield name, setup.known[name].role, "weight", step, value
        if step in (1, steps):
            for name, value in sizes_of_steps(planned_parameters, moved, pulls, shrunk, setup.known, stacked):
                for recorded in names.get(name, ()):
                    yield recorded, setup.known[name].role, "step", step, value
        if parameters and step == 0:
            for name, taken in decays(planned_parameters, setup.known, stack.optimizer):
                value = torch.full((stack.size,), taken, device=planned_parameters[name].device)
                yield name, setup.known[name].role, "decay", step, value
        if step < steps:
            stack.backward(losses)
            pulls = (
                sizes_of_pulls(planned_parameters, moved, setup.known, stack.optimizer, stacked) if step == 0 else {}
            )
            shrink(shrunk, planned_parameters, setup.known, stack.optimizer)
            if parameters and step in (0, steps - 1):
                for name, value in sizes_of_gradients(planned_parameters, setup.known, stack.optimizer, stacked):
                    yield name, setup.known[name].role, "gradient", step, value
            stack.optimizer.step()


CHECK_LR = {"adam": 2**-8, "sgd": 2**-3}
DECAY = 1e-6  # too small to matter within a few steps; lr · weight decay is compared all the same
# Largest step of an Adam-like optimizer, as a fraction of a weight's initial size; larger steps bend the slopes.
STEP = 2**-4


def record(
    family: Family,
    widths: Sequence[int],
    parametrization: str = "mup",
    optimizer: str = "adamw",
    *,
    lr: float | None = None,
    depth: int | None = None,
    depths: Sequence[int] = (),
    steps: int = 4,
    seeds: Iterable[int] = range(5),
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    planner: Callable[..., Plan] | None = None,
    observation: Observation | None = None,
    cache: CheckCache | None = None,
) -> pd.DataFrame:
    """Train ``family`` a few steps at each width and record how large every module's output is: the mean of |x|.

    Every step uses the family's example batch, because outputs before and after training must be compared on the same data.

    Args:
        family: the model family to check; plans are relative to its base.
        widths: at least two, in any order. If ``depths`` is given: the one width to check at, or none for the base's width.
        parametrization: name of the table that sets initialization and learning rates, or "own" to check the model
            exactly as built; if it is annotated by mup, it is then trained with mup's optimizer.
        optimizer: one of `optimizers.rules.OPTIMIZERS`; for "own", one of adam, adamw and sgd.
        lr: base learning rate; by default 2^-3 for SGD; for optimizers like Adam, the smaller of 2^-8 and 1/16 of the median
            initial std of the hidden weights.
        depth: number of layers; by default the base's.
        depths: numbers of layers, given for a check over depths instead of widths.
        steps: number of optimizer steps, at least 1.
        seeds: seeds of the initial weights, at least one.
        device: the device to train on.
        progress: called with (runs done, total number of runs).
        planner: used in place of `plan`, with the same arguments, to measure modified plans.
        observation: result of `observe` for this family, to avoid computing it again.
        cache: stores what was measured at each finished width or depth, and is read before measuring.

    Returns:
        A frame with the columns of `schemas.COORDINATES`.

    Raises:
        RequestError: fewer than two different widths, a model that cannot be planned or trained, or NaN in the batch.
    """
    sizes = sorted(set(depths or widths))
    if len(sizes) < 2:
        what = "depths" if depths else "widths"
        raise RequestError(f"a slope needs at least two {what}, but {sizes} has {len(sizes)}: give 4 or more.")
    seeds = list(seeds)
    if steps < 1 or not seeds:
        raise RequestError(f"{steps} steps and {len(seeds)} seeds were requested: give at least one of each.")
    if any(isinstance(each, torch.Tensor) and each.isnan().any() for each in tree_leaves(family.batch)):
        raise DataError(f"the example batch of {family.name} holds NaN: give one without.")
    family = family.printing_once()
    column = OPTIMIZERS[optimizer].column if optimizer in OPTIMIZERS else "adam"
    base = family.base.with_(depth=depth or family.base.depth)
    scales = [base.with_(depth=each) if depths else base.with_(width=each) for each in sizes]
    if depths and len(set(widths)) == 1:
        scales = [scale.with_(width=widths[0]) for scale in scales]
    seen = observation or observe(family)
    if depths and parametrization != OWN and table(parametrization).depth is not None:
        seen = with_depth_constants(family, seen)  # once here rather than in every plan
    decay = 0.0 if optimizer in OPTIMIZERS and OPTIMIZERS[optimizer].l2 else DECAY
    recipe = Recipe(lr=lr or _check_lr(column, seen), weight_decay=decay, schedule="constant", warmup=0)
    growing = _stacks(family, scales) if depths else None
    make = planner or plan
    frames: list[pd.DataFrame] = []
    for i, scale in enumerate(scales):
        if parametrization == OWN:
            planned = None
            setup = as_built(family, scale, seen, optimizer, recipe.lr, device)
        else:
            planned = make(family, scale, parametrization, optimizer, recipe, observation=seen)
            setup = as_planned(family, planned, seen, device)
        if growing is not None:
            repeated = of_repeated(setup.divisors, growing, seen)
            setup = replace(setup, divisors=_of_branches(repeated, setup.known, setup.added_in))
        common: dict[str, Any] = {"parametrization": parametrization, "optimizer": optimizer}
        common |= {"width": scale.width, "depth": scale.depth}
        done = partial(lambda i, n: progress(i * len(seeds) + n, len(scales) * len(seeds)), i)

        def measured(setup: Setup = setup, common: dict[str, Any] = common, done: Any = done) -> pd.DataFrame:
            with random_state_restored([device]):
                rows = list(run(family, setup, seeds, steps, device, growing, done))
            return COORDINATES.frame([row | common for row in rows])

        if cache is None:
            frames.append(measured())
            continue
        facts = {**common, "seeds": seeds, "steps": steps, "lr": recipe.lr, "growing": growing, "device": device}
        facts["plan"] = planned and planned.as_dict()
        frames.append(cache.piece(measured, family.batch, base=family.base.as_dict(), **facts))
    progress(len(scales) * len(seeds), len(scales) * len(seeds))
    return pd.concat(frames, ignore_index=True)


def _check_lr(column: str, seen: Observation) -> float:
    """Return a learning rate at which the base model learns, while its first steps stay small relative to the initial weights."""
    stds = [spec.init.std for spec in seen.specs.values() if spec.role == "hidden" and spec.init.std]
    return min(CHECK_LR[column], STEP * median(stds)) if column == "adam" and stds else CHECK_LR[column]


def _stacks(family: Family, scales: Sequence[Scale]) -> dict[str, int]:
    """Return name → length at the greatest depth, for the stacks of layers whose length differs at the smallest depth."""
    counts = []
    for scale in (scales[0], scales[-1]):
        with on_fake_tensors():
            counts.append(layers(build(family, scale)))
    # A stack inside a layer that only the deeper model has (blocks.7.mlp) does not count as growing.
    return {name: count for name, count in counts[1].items() if counts[0].get(name, count) != count}
