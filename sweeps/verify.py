"""Verify a transfer: learning-rate basins at several widths, extended until each optimum is bracketed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd

from mutransfer.basins import DRIFT_LIMIT, REGRET_LIMIT, bracket, flat_range, judge, optima, worth
from mutransfer.errors import RequestError
from mutransfer.io import as_json_value, read_json, write_json
from mutransfer.proxies.load import cross_entropy
from mutransfer.recipe import Recipe, Scale
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS

from .autoselect import Forecast
from .control import announcement, comparison, conclusion, finished_trials, tune_control
from .experiment import Experiment
from .jobs import Executor, Job, RunContext, run_jobs
from .storage import only_one
from .tune import price
from .user_trainers import needed

__all__ = ["basins", "grid", "loss_unit", "regret_limit_of", "verify_run"]

logger = logging.getLogger(__name__)

REACH = 2  # grid points on each side of the best one, so a parabola can be fitted
LIMIT = 14  # maximum number of grid points per width: if more are needed, the loss does not depend on the learning rate
FINEST = (
    1 / 8
)  # octaves to which a cliff next to the best point is resolved: the drift's interval includes the whole cell
PARTS = 64  # grid points are multiples of 1/64 of a step

Rows = dict[tuple[str, int, int, float], dict[str, Any]]  # (parametrization, width, seed, grid point in steps) → row


def basins(
    context: RunContext,
    recipe: Recipe,
    widths: Sequence[int],
    *,
    folder: RunFolder,
    executor: Executor,
    parametrizations: Sequence[str] = ("mup",),
    seeds: int = 3,
    step: float = 1.0,
    progress: Callable[[int, int, str, float | None], None] = lambda done, total, text, ahead: None,
) -> pd.DataFrame:
    """Train over a grid of learning rates at every width and return the frame `schemas.BASINS`.

    The grid has a point every ``step`` octaves and is centered on the recipe's learning rate. For another parametrization, it is
    laid around the learning rate at which no matrix gets a higher one than under the experiment's parametrization. The grid of
    each width is extended towards its best point until that has two points on both sides. If the loss diverges or jumps right
    next to the best point, the cell between the two is halved until it is at most 1/8 octave.

    Every finished run is written to the folder's ``basins.csv`` at once, and runs found there are not repeated. If two
    parametrizations have the same plan, as at the base scale, the run is done once and counts for both, at no cost in the rows of
    the second.

    Args:
        context: context of the proxy's experiment: model, data, steps.
        recipe: all other hyperparameters, and the center of the grid.
        widths: at least two widths.
        folder: run folder.
        executor: trains the runs.
        parametrizations: "mup", and "sp" as a control.
        seeds: number of seeds of every run; the same seeds everywhere.
        step: octaves between grid points.
        progress: called with (runs done, runs known to be needed, text about the current runs, operations left divided by
            those done in this call).

    Raises:
        RequestError: there are fewer than two widths, the model does not support one of them, the folder has another data hash,
            or a run failed.
    """
    experiment, widths = context.experiment, sorted(set(widths))
    if len(widths) < 2:
        raise RequestError(f"a drift needs at least two widths, but {widths} is {len(widths)}: see --widths.")
    # Report wrong requests before anything is written.
    alike = {width: _alike(context, _scale(experiment, width), parametrizations, recipe) for width in widths}
    flops = {width: context.flops(_scale(experiment, width), recipe) for width in widths}
    middle = {
        (name, width): _middle(context, _scale(experiment, width), name, recipe, step)
        for name, width in itertools.product(parametrizations, widths)
    }
    center = math.log2(recipe.lr)
    folder.note_environment(data_sha256=context.data and context.data.sha256)
    done = _known(folder, recipe, step)
    behind = (
        0.0  # operations of one step, summed over the finished runs of this call: wide runs come first and take longest
    )
    while True:
        wanted = [
            Job(
                (name, width, seed, k), _scale(experiment, width), name, recipe.with_(lr=2 ** (center + k * step)), seed
            )
            for name in parametrizations
            for width in widths
            for k in grid(done, name, width, seeds, step, middle=middle[name, width], maximize=experiment.maximize)
            for seed in range(seeds)
        ]
        for name, width, seed, k in (job.key for job in wanted if job.key not in done):
            if (same := done.get((alike[width][name], width, seed, k))) is not None:
                spent = dict.fromkeys(("flops", "seconds"), 0.0)  # counted in the identical run
                done[name, width, seed, k] = {**same, "parametrization": name} | spent
        missing = [job for job in wanted if job.key not in done]
        waiting = {job.key for job in missing}
        count = len(wanted) - len(missing)
        if missing:
            folder.verify.unlink(missing_ok=True)  # its verdict does not cover the new runs
            _note(folder, experiment, recipe, len(wanted), widths, parametrizations, seeds, step)
        missing = [
            job
            for job in missing
            if (job.key == (same_key := (alike[job.key[1]][job.key[0]], *job.key[1:]))) or same_key not in waiting
        ]
        ahead = sum(flops[job.scale.width] or 1.0 for job in missing)
        progress(count, len(wanted), "", ahead / behind if behind else None)
        if not waiting:
            break
        executor.expect(len(missing) // len({job.scale for job in missing}), independent=True)
        # Longest runs first, so none is left running alone at the end.
        for job, outcome in run_jobs(executor, context, sorted(missing, key=lambda job: -job.scale.width)):
            name, width, seed, k = job.key
            # A grid with a missing point gives no optimum.
            needed(outcome, f"the run of {name} at width {width} with lr {job.recipe.lr:.3g} and seed {seed}")
            done[job.key] = {
                "parametrization": name, "width": width, "depth": job.scale.depth, "seed": seed, "log2_lr": center + k * step,
                "loss": outcome.loss if math.isfinite(outcome.loss) else None, "diverged": outcome.diverged,
                "flops": None if (each := flops[width]) is None else each * outcome.steps, "seconds": outcome.seconds,
            }  # fmt: skip
            count += 1
            BASINS.write(pd.DataFrame(done.values()), folder.basins)
            ahead, behind = ahead - (flops[width] or 1.0), behind + (flops[width] or 1.0)
            progress(count, len(wanted), f"{name} width {width}", ahead / behind)
    BASINS.write(pd.DataFrame(done.values()), folder.basins)
    _note(folder, experiment, recipe, len(wanted), widths, parametrizations, seeds, step, ended=True)
    keys = {job.key for job in wanted}
    return BASINS.frame([row for key, row in done.items() if key in keys])


def _note(
    folder: RunFolder, experiment: Experiment, recipe: Recipe, planned: int, widths: Sequence[int],
    parametrizations: Sequence[str], seeds: int, step: float, *, ended: bool = False,
) -> None:  # fmt: skip
    """Record the planned runs and the question they answer, so the folder shows what an interrupted verification is missing."""
    arguments = {"--widths": ",".join(map(str, widths)), "--seeds": seeds, "--step": step}
    if controls := [name for name in parametrizations if name != experiment.parametrization]:
        arguments["--control"] = controls[0]
    question = {
        **experiment.subject(),
        "recipe": recipe.model_dump(mode="json"),
        "parametrizations": [*parametrizations],
    }
    question |= {"widths": [*widths], "seeds": seeds}
    folder.note_progress("verify", planned=planned, ended=ended, arguments=arguments, question=question)


def _alike(context: RunContext, scale: Scale, parametrizations: Sequence[str], recipe: Recipe) -> dict[str, str]:
    """Map each parametrization to the first one with the same plan at ``scale``; at the base scale, all plans are the same."""
    plans = {name: context.plan(scale, name, recipe) for name in parametrizations}
    if context.experiment.trainer is not None:  # a user trainer may read the parametrization's name
        return {name: name for name in plans}
    return {
        name: next(first for first, other in plans.items() if other.rows == plan.rows) for name, plan in plans.items()
    }


def _scale(experiment: Experiment, width: int) -> Scale:
    return experiment.proxy_scale.with_(width=width)


def _known(folder: RunFolder, recipe: Recipe, step: float) -> Rows:
    """Return the runs of an earlier call with the same recipe and step; set those of another recipe or step aside."""
    question = {"recipe": recipe.model_dump(mode="json"), "step": step}
    before = read_json(folder.environment, "the run's environment") if folder.environment.exists() else {}
    if before.get("basins") != question or not folder.basins.exists():
        if folder.basins.exists():
            folder.basins.replace(folder.path / "basins.previous.csv")  # finished runs are never thrown away
        folder.verify.unlink(missing_ok=True)
        folder.note_environment(basins=question)
        return {}
    center = math.log2(recipe.lr)
    known: Rows = {}
    for row in BASINS.read(folder.basins).to_dict("records"):
        k = round((row["log2_lr"] - center) / step * PARTS) / PARTS
        known[row["parametrization"], row["width"], row["seed"], k] = row
    return known


def _middle(context: RunContext, scale: Scale, name: str, recipe: Recipe, step: float) -> int:
    """Return the grid point around which a grid is first laid; 0 for the experiment's own parametrization.

    Another parametrization is likely to be best where no matrix gets a higher learning rate than under the experiment's own.
    """
    reference = {row.name: row.lr for row in context.plan(scale, context.experiment.parametrization, recipe).rows}
    ratios = [
        reference[row.name] / row.lr for row in context.plan(scale, name, recipe).rows if row.lr and reference[row.name]
    ]
    return round(math.log2(min(ratios, default=1.0)) / step)


def grid(
    done: Rows, name: str, width: int, seeds: int, step: float, *, middle: int = 0, maximize: bool = False
) -> list[float]:
    """Return the grid points that this width needs, in steps from the center, given the runs in ``done``.

    The grid is first laid around ``middle`` and always includes 0, the transferred learning rate.
    """
    known: dict[float, dict[int, dict[str, Any]]] = {}
    for (parametrization, w, seed, k), row in done.items():
        if (parametrization, w) == (name, width) and seed < seeds:
            known.setdefault(k, {})[seed] = row
    points: set[float] = {0, *range(middle - REACH, middle + REACH + 1)}
    while all(len(known.get(k, {})) == seeds for k in points):
        further = _further(sorted(points), known, step, -1 if maximize else 1)
        if further <= points:
            break
        points |= further
    return sorted(points)


def _further(points: list[float], known: dict[float, dict[int, dict[str, Any]]], step: float, sign: int) -> set[float]:
    """Return the grid points that are needed given the losses at ``points``."""
    losses = [[_known_loss(known[k][seed], sign) for k in points] for seed in sorted(known[points[0]])]
    at = bracket(step * np.array(points), np.array(losses))
    best = points[at.best]
    low, high = math.floor(best) - REACH, math.ceil(best) + REACH
    wanted: set[float] = set()
    # Do not extend the grid beyond a cliff.
    if len(points) < LIMIT:
        wanted |= set(range(low, math.floor(best) + 1)) if not at.cliff_low else set()
        wanted |= set(range(math.ceil(best), high + 1)) if not at.cliff_high else set()
    for cliff, last, beyond in ((at.cliff_low, at.first, at.first - 1), (at.cliff_high, at.last, at.last + 1)):
        if cliff and abs(points[beyond] - points[last]) * step > FINEST:
            wanted.add((points[beyond] + points[last]) / 2)
    return wanted


def _known_loss(row: dict[str, Any], sign: int) -> float:
    diverged = row["diverged"] or row["loss"] is None or not math.isfinite(row["loss"])
    return math.inf if diverged else sign * row["loss"]


def loss_unit(context: RunContext) -> str:
    """Return the unit of the experiment's losses: "nats", or a phrase for a user's own loss or metric."""
    experiment = context.experiment
    if experiment.trainer is None and (experiment.model.startswith("hf:") or context.family.loss is cross_entropy):
        return "nats"
    return "in the metric's unit" if experiment.maximize else "in the loss's unit"


def regret_limit_of(context: RunContext, basins: pd.DataFrame, given: float | None = None) -> float:
    """Return the regret limit of the transferred learning rate: ``given``, 0.02 nats, or 2% of the size of another loss.

    The size is the absolute value of the best mean loss at the smallest width.
    """
    if given is not None:
        return given
    if loss_unit(context) == "nats":
        return REGRET_LIMIT
    experiment = context.experiment
    rows = basins[(basins["width"] == basins["width"].min()) & ~basins["diverged"].astype(bool)]
    rows = rows[rows["parametrization"] == experiment.parametrization]
    means = rows.groupby("log2_lr")["loss"].mean()
    best = means.max() if experiment.maximize else means.min()
    return REGRET_LIMIT * (abs(float(best)) if best == best and best != 0 else 1.0)


Shown = Callable[[str, Callable[[], float] | None], AbstractContextManager[Callable[..., None]]]


@contextlib.contextmanager
def silent(what: str, left: Callable[[], float] | None) -> Iterator[Callable[..., None]]:
    """Show no progress."""
    yield lambda *_, **__: None


def verify_run(
    context: RunContext, recipe: Recipe, folder: RunFolder, widths: Sequence[int], executor: Executor, *,
    seeds: int, control: str | None, control_trials: int | None = None, step: float = 1.0, device: str = "cpu",
    regret_limit: float | None = None, forecast: Forecast | None = None, progress: Shown = silent,
) -> tuple[dict[str, Any], pd.DataFrame]:  # fmt: skip
    """Measure the basins, judge them and write verify.json; return its content and the optima.

    Args:
        context: context of the experiment that was tuned.
        recipe: the proxy's best recipe.
        folder: the run folder.
        widths: widths to compare; the proxy's own is added.
        executor: trains the runs.
        seeds: seeds per run.
        control: a second parametrization to compare with.
        control_trials: trials of the control's search; as many as `tune` had by default.
        step: octaves between learning rates.
        device: where the control's search trains by default.
        regret_limit: largest acceptable cost of the proxy's learning rate, in the loss's unit.
        forecast: has the phases "basins" and "control", and is updated with the runs of the executor.
        progress: returns a context manager that shows the progress of one phase, from its name and the estimate of the time
            left; it is called with (done, total, text).
    """
    experiment, name = context.experiment, context.experiment.parametrization
    widths = sorted(
        {experiment.proxy.width, *widths}
    )  # the drift is measured from the width at which the recipe was tuned
    kinds = [name, *([control] if control and control != name else [])]
    trials, tuned = finished_trials(experiment, folder), None
    count = trials if control_trials is None else control_trials
    if kinds[1:] and count:
        logger.info("%s", announcement(context, kinds[1], widths[-1], count, seeds))
    left = None if forecast is None else forecast.left
    if forecast is not None:
        forecast.begin("basins")
    with (
        only_one(folder),
        progress(
            f"learning-rate basins of {experiment.model} at widths {', '.join(map(str, sorted(widths)))}", left
        ) as shown,
    ):
        frame = basins(
            context, recipe, widths,
            folder=folder, executor=executor, parametrizations=kinds, seeds=seeds, step=step, progress=shown,
        )  # fmt: skip
    if kinds[1:] and count:
        if forecast is not None:
            forecast.begin("control")
        with progress(f"tuning {control} at width {widths[-1]}, {count} trials and {seeds} seeds", left) as shown:
            tuned = tune_control(
                context, folder, kinds[1], widths[-1],
                executor=executor, trials=count, seeds=seeds, device=device, progress=shown,
            )  # fmt: skip
    transferred = math.log2(recipe.lr)  # the rate that `transfer` writes
    limit = regret_limit_of(context, frame, regret_limit)
    unit = loss_unit(context)
    found = optima(frame, transferred, maximize=experiment.maximize, regret_limit=limit)
    main_rows = found[found["parametrization"] == name]
    status, reasons = judge(main_rows, regret_limit=limit, unit=unit)
    first, last = main_rows.iloc[0], main_rows.iloc[-1]
    widest = experiment.proxy_scale.with_(width=int(last["width"]))
    compared = comparison(frame, kinds, recipe, experiment.proxy.width, tuned, maximize=experiment.maximize)
    paid = price(context, folder, widest)
    result = {
        "verdict": status,
        "reasons": reasons,
        "widths": widths,
        "seeds": seeds,
        "optimum_log2_lr": first["log2_lr"],
        "transferred_log2_lr": transferred,
        "drift_octaves": {kind: _by_width(found, kind, "drift") for kind in kinds},
        "regret": {kind: _by_width(found, kind, "regret") for kind in kinds},
        "regret_relative": {kind: _values(found, kind, "regret_relative") for kind in kinds},
        "regret_compute": {
            kind: worth(found[found["parametrization"] == kind], frame, maximize=experiment.maximize) for kind in kinds
        },
        "limits": {"drift_octaves": DRIFT_LIMIT, "regret": limit, "unit": unit},
        "flat_log2_lr": flat_range(main_rows),
        "price": paid,
        "comparison": compared,
        "control": None
        if not kinds[1:]
        else {
            "parametrization": kinds[1],
            "trials": tuned.trials if tuned is not None else 0,
            "searched": list(tuned.searched) if tuned is not None else ["lr"],
            "params": tuned.params if tuned is not None else {"lr": 2 ** compared[-1]["log2_lr"]},
            "flops": tuned.flops if tuned is not None else None,
            "conclusion": conclusion(
                compared, kinds, trials, tuned, paid["tuning_flops"], maximize=experiment.maximize
            ),
        },
    }
    write_json(folder.verify, as_json_value(result))
    return result, found


def _by_width(found: pd.DataFrame, kind: str, what: str) -> dict[int, dict[str, float]]:
    rows = found[found["parametrization"] == kind]
    return {
        int(row["width"]): {"value": row[what], "low": row[f"{what}_low"], "high": row[f"{what}_high"]}
        for row in rows.to_dict("records")
    }


def _values(found: pd.DataFrame, kind: str, what: str) -> dict[int, float]:
    rows = found[found["parametrization"] == kind]
    return {int(width): float(value) for width, value in zip(rows["width"], rows[what], strict=True)}
