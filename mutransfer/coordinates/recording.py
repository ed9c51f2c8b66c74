"""A family trained for a few steps at several sizes, with the size of every module's output written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch.utils._pytree import tree_leaves

from ..errors import RequestError
from ..family import Family
from ..frames import COORDINATES
from ..observing.building import on_fake_tensors
from ..observing.observe import observe
from ..observing.running import build
from ..observing.specs import Observation
from ..observing.target import with_depth_constants
from ..optimizers.registry import OPTIMIZERS
from ..planning import plan
from ..plans import Plan
from ..recipe import Recipe
from ..scale import Scale
from ..tables import table
from .kept import Kept
from .runs import layers, run
from .setups import OWN, Setup, as_built, as_planned, of_repeated

__all__ = ["record"]

CHECK_LR = {"adam": 2**-8, "sgd": 2**-3}
DECAY = 1e-6  # too little to be felt in a few steps; lr · decay is compared all the same
STEP = 2**-4  # of a weight's initial size that one step of an Adam-like optimizer may move it: beyond, slopes bend


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
    kept: Kept | None = None,
) -> pd.DataFrame:
    """Train ``family`` a few steps at each width and record the size of every module's output.

    The family's example batch is used for every step: outputs before and after training must be compared on the same data.

    Args:
        family: what to check; its base anchors the plan.
        widths: at least two, in any order; empty or one for a check over ``depths``.
        parametrization: name of the table that sets init and learning rates, or "own" for the model as its builder leaves
            it, with mup's optimizer if mup has annotated it.
        optimizer: name of a torch optimizer.
        lr: base learning rate; by default one at which the built-in models learn, or less where initial weights are small.
        depth: layers; the base's by default.
        depths: for a check over depths instead: numbers of layers, at the one width in ``widths`` or the base's.
        steps: optimizer steps, at least 1.
        seeds: of the initial weights, at least one.
        device: where to train.
        progress: called with (runs done, runs in all).
        planner: plans in place of `plan`, called with the same arguments: to measure a plan that was changed.
        observation: what `observe` returned for this family, to save doing it again.
        kept: where finished sizes are kept, and taken from when they are asked for again.

    Returns:
        A frame with the columns of `frames.COORDINATES`.

    Raises:
        RequestError: fewer than two different widths, a model that cannot be planned or trained, or NaN in the batch.
    """
    sizes = sorted(set(depths or widths))
    if len(sizes) < 2:
        what = "depths" if depths else "widths"
        raise RequestError(f"a slope needs at least two {what}, and {sizes} is {len(sizes)}: give 4 or more.")
    seeds = list(seeds)
    if steps < 1 or not seeds:
        raise RequestError(f"{steps} steps and {len(seeds)} seeds: give at least one of each.")
    if any(isinstance(each, torch.Tensor) and each.isnan().any() for each in tree_leaves(family.batch)):
        raise RequestError(f"the example batch of {family.name} holds NaN: give one without.")
    family = family.printing_once()
    column = OPTIMIZERS[optimizer].column if optimizer in OPTIMIZERS else "adam"
    base = family.base.with_(depth=depth or family.base.depth)
    scales = [base.with_(depth=each) if depths else base.with_(width=each) for each in sizes]
    if depths and len(set(widths)) == 1:
        scales = [scale.with_(width=widths[0]) for scale in scales]
    seen = observation or observe(family)
    if depths and parametrization != OWN and table(parametrization).depth is not None:
        seen = with_depth_constants(family, seen)  # once, not in every plan
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
            setup = replace(setup, divisors=of_repeated(setup.divisors, growing, seen))
        common: dict[str, Any] = {"parametrization": parametrization, "optimizer": optimizer}
        common |= {"width": scale.width, "depth": scale.depth}
        done = partial(lambda i, n: progress(i * len(seeds) + n, len(scales) * len(seeds)), i)

        def measured(setup: Setup = setup, common: dict[str, Any] = common, done: Any = done) -> pd.DataFrame:
            return COORDINATES.frame([row | common for row in run(family, setup, seeds, steps, device, growing, done)])

        if kept is None:
            frames.append(measured())
            continue
        facts = {**common, "seeds": seeds, "steps": steps, "lr": recipe.lr, "growing": growing, "device": device}
        facts["plan"] = planned and planned.as_dict()
        frames.append(kept.piece(measured, family.batch, base=family.base.as_dict(), **facts))
    progress(len(scales) * len(seeds), len(scales) * len(seeds))
    return pd.concat(frames, ignore_index=True)


def _check_lr(column: str, seen: Observation) -> float:
    """Return a learning rate at which the base model learns, and its first steps leave the initial weights in charge."""
    stds = [spec.init.std for spec in seen.specs.values() if spec.role == "hidden" and spec.init.std]
    return min(CHECK_LR[column], STEP * median(stds)) if column == "adam" and stds else CHECK_LR[column]


def _stacks(family: Family, scales: Sequence[Scale]) -> dict[str, int]:
    """Return the stacks of layers, by name, that the greatest depth has more of than the least; with no count yet."""
    counts = []
    for scale in (scales[0], scales[-1]):
        with on_fake_tensors():
            counts.append(layers(build(family, scale)))
    # A stack inside of a layer that only the deeper model has (blocks.7.mlp) does not grow.
    return {name: count for name, count in counts[1].items() if counts[0].get(name, count) != count}
