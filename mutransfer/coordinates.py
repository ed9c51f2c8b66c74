"""The coordinate check: how the size of every module's output, and of its change, moves with width.

`record` measures, `verdict` judges. The measure is the same for every parametrization: the slopes of width-stable
feature learning (`tables.HEALTHY`), so the standard parametrization fails it, as it should.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch.utils._pytree import tree_leaves

from .errors import RequestError
from .family import Family
from .frames import COORDINATES, SLOPES
from .observe import Observation, observe
from .optimizers import OPTIMIZERS
from .planning import plan
from .recipe import Recipe
from .tables import HEALTHY, TABLES, Band

__all__ = ["MARGIN", "Verdict", "record", "verdict"]

MARGIN = 0.15  # finite width bends every slope a little; healthy and broken are 0.3 and more apart
CHECK_LR = {"adam": 2**-8, "sgd": 2**-3}
Status = Literal["pass", "fail", "undecided"]


def record(
    family: Family,
    widths: Sequence[int],
    parametrization: str = "mup",
    optimizer: str = "adamw",
    *,
    lr: float | None = None,
    depth: int | None = None,
    steps: int = 4,
    seeds: Iterable[int] = range(5),
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """Train ``family`` a few steps at each width and record the size of every module's output.

    The family's example batch is used for every step: outputs before and after training must be compared on the same data.

    Args:
        family: what to check; its base anchors the plan.
        widths: at least two, in any order.
        parametrization: name of the table that sets init and learning rates.
        optimizer: name of a torch optimizer.
        lr: base learning rate; by default one at which all the built-in models learn.
        depth: layers; the base's by default.
        steps: optimizer steps, at least 1.
        seeds: of the initial weights, at least one.
        device: where to train.
        progress: called with (runs done, runs in all).

    Returns:
        A frame with the columns of `frames.COORDINATES`.

    Raises:
        RequestError: fewer than two different widths, or a model that cannot be planned.
    """
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise RequestError(f"a slope needs at least two widths, and {widths} is {len(widths)}: give 4 or more.")
    seeds = list(seeds)
    if steps < 1 or not seeds:
        raise RequestError(f"{steps} steps and {len(seeds)} seeds: give at least one of each.")
    column = OPTIMIZERS[optimizer].column if optimizer in OPTIMIZERS else "adam"
    recipe = Recipe(lr=lr or CHECK_LR[column], schedule="constant", warmup=0)
    scale = family.base.with_(depth=depth or family.base.depth)
    seen = observe(family, scale.depth)
    rows: list[dict[str, Any]] = []
    for i, width in enumerate(widths):
        planned = plan(family, scale.with_(width=width), parametrization, optimizer, recipe, observation=seen)
        for j, seed in enumerate(seeds):
            progress(i * len(seeds) + j, len(widths) * len(seeds))
            model = family.build(planned.scale).to(device)
            planned.initialize(model, seed)
            common = {"parametrization": parametrization, "optimizer": optimizer, "seed": seed}
            common |= {"width": width, "depth": scale.depth}
            rows += [
                row | common for row in _one_run(family, seen, planned.make_optimizer(model), model, steps, device)
            ]
    progress(len(widths) * len(seeds), len(widths) * len(seeds))
    return COORDINATES.frame(rows)


def _one_run(
    family: Family, seen: Observation, optimizer: torch.optim.Optimizer, model: torch.nn.Module, steps: int, device: str
) -> list[dict[str, Any]]:
    batch = family.batch_on(device)
    roles = module_roles(model, seen)
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, _: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if tensors:
            outputs[names[module]] = tensors[0].detach()

    handles = [module.register_forward_hook(keep) for name, module in model.named_modules() if name in roles]
    rows: list[dict[str, Any]] = []
    initial: dict[str, torch.Tensor] = {}
    for step in range(steps + 1):
        loss = family.loss(model, batch)
        if step == 0:
            initial = {name: output.clone() for name, output in outputs.items()}
        sizes = outputs if step == 0 else {name: output - initial[name] for name, output in outputs.items()}
        values = torch.stack([size.abs().mean().double() for size in sizes.values()]).tolist()
        statistic = "activation" if step == 0 else "change"
        rows += [
            {"module": name, "role": roles[name], "statistic": statistic, "step": step, "value": value}
            for name, value in zip(sizes, values, strict=True)
        ]
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for handle in handles:
        handle.remove()
    return rows


def module_roles(model: torch.nn.Module, seen: Observation) -> dict[str, str]:
    """Return, for every module that owns parameters, whether its output is a "feature" or an "output" (a logit)."""
    roles: dict[str, str] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        module, _, _ = name.rpartition(".")
        spec = seen.specs.get(name)
        # A second name for a tied matrix is the readout's.
        is_output = spec is None or spec.role == "output"
        roles[module] = "output" if is_output else roles.get(module, "feature")
    return roles


@dataclass(frozen=True)
class Verdict:
    """What a coordinate check found.

    ``slopes`` has the columns of `frames.SLOPES`; ``cause`` says in a sentence what failed, or what is missing.
    """

    status: Status
    slopes: pd.DataFrame
    cause: str | None


def verdict(coordinates: pd.DataFrame, margin: float = MARGIN) -> Verdict:
    """Judge a coordinates frame of one parametrization against the slopes of width-stable feature learning.

    Per module, statistic and step, the slope of log2(value) against log2(width) is fitted over seeds and widths with a
    95% interval. It passes when the interval lies within the expected band widened by ``margin``, fails when it lies
    wholly outside, and is undecided otherwise. Changes are judged after the first and the last step.

    Raises:
        RequestError: two parametrizations in one frame, or fewer than two widths.
    """
    names = coordinates["parametrization"].unique()
    if len(names) != 1:
        raise RequestError(
            f"one verdict judges one parametrization, and the frame holds {sorted(names)}: filter it first."
        )
    if coordinates["width"].nunique() < 2:
        raise RequestError("a slope needs at least two widths: record more.")
    last = int(coordinates["step"].max())
    judged = coordinates[coordinates["step"].isin([0, 1, last])]
    column = OPTIMIZERS[str(judged["optimizer"].iloc[0])].column
    rows = []
    first_module = judged["module"].iloc[0]
    for (module, role, statistic, step), group in judged.groupby(["module", "role", "statistic", "step"], sort=False):
        slope, low, high = _slope(group)
        expected = HEALTHY[str(statistic), str(role)]
        declared_role = "first" if role == "feature" and statistic == "change" and module == first_module else str(role)
        declared = TABLES[names[0]].declared.get((column, str(statistic), declared_role), expected)
        rows.append(
            {
                "parametrization": names[0],
                "module": module,
                "role": role,
                "statistic": statistic,
                "step": step,
                "slope": slope,
                "low": low,
                "high": high,
                "expected": _words(expected),
                "declared": _words(declared),
                "ok": _judge(group, slope, low, high, expected, margin),
            }
        )
    slopes = SLOPES.frame(rows)
    if (slopes["ok"] == False).any():  # noqa: E712 - a nullable column: missing is not False
        return Verdict("fail", slopes, _cause(slopes))
    if slopes["ok"].isna().any():
        return Verdict("undecided", slopes, _undecided(slopes, coordinates))
    return Verdict("pass", slopes, None)


def _slope(group: pd.DataFrame) -> tuple[float, float, float]:
    """Fitted slope with its 95% interval; NaN when a value is zero or not finite, infinite ends without a residual.

    Least squares over all seeds and widths, weighted by width: the fluctuations of a random network between seeds have a
    variance of 1/width (measured: docs/coordinate-check.md), so the wide models say more. Curvature of the true line
    counts as residual and widens the interval.
    """
    width, value = group["width"].to_numpy(dtype=float), group["value"].to_numpy(dtype=float)
    if not np.isfinite(value).all() or (value <= 0).any():
        return math.nan, math.nan, math.nan
    x, y, weight = np.log2(width), np.log2(value), width / width.mean()
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    spread = weight @ (x * x)
    slope = float(weight @ (x * y) / spread)
    freedom = len(value) - 2
    if freedom < 1:
        return slope, -math.inf, math.inf
    error = math.sqrt(weight @ (y - slope * x) ** 2 / freedom / spread)
    half = float(stats.t.ppf(0.975, freedom)) * error
    return slope, slope - half, slope + half


def _judge(group: pd.DataFrame, slope: float, low: float, high: float, band: Band, margin: float) -> bool | None:
    if not np.isfinite(group["value"]).all():
        return False
    if math.isnan(slope):
        # All zeros is what a zero-initialized readout gives, and may: nothing else may be constant.
        return True if (group["value"] == 0).all() and band[0] == -math.inf else None
    if band[0] - margin <= low and high <= band[1] + margin:
        return True
    return False if high < band[0] - margin or low > band[1] + margin else None


def _cause(slopes: pd.DataFrame) -> str:
    failed = slopes[slopes["ok"] == False]  # noqa: E712
    modules = list(dict.fromkeys(failed["module"]))
    listed = ", ".join(modules[:6]) + (f" and {len(modules) - 6} more" if len(modules) > 6 else "")
    worst = failed.loc[failed["slope"].abs().fillna(math.inf).idxmax()]
    if math.isnan(worst["slope"]):
        return f"{worst['module']} is not finite or zero at some width: lower --lr (fails in {listed})."
    what = f"the {worst['statistic']} of {worst['module']} goes as width^{worst['slope']:+.2f}"
    if worst["statistic"] == "change":
        why = "its learning rate does not shrink with width" if worst["slope"] > 0 else "its updates fade with width"
    else:
        why = "its initial weights are not scaled with the fan-in"
    return f"{what} where {worst['expected']} is healthy, so {why}; failing: {listed}."


def _undecided(slopes: pd.DataFrame, coordinates: pd.DataFrame) -> str:
    modules = list(dict.fromkeys(slopes[slopes["ok"].isna()]["module"]))
    return (
        f"not enough evidence for {', '.join(modules[:6])}: add seeds (now {coordinates['seed'].nunique()}) or widths "
        f"(now {coordinates['width'].nunique()})."
    )


def _words(band: Band) -> str:
    low, high = ("-inf" if math.isinf(end) else f"{end:g}" for end in band)
    return f"{low}..{high}"
