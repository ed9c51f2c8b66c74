"""The control of a transfer: another parametrization, tuned with as many trials at the width where the two are compared.

µTransfer claims that a recipe tuned on a small proxy is as good as one tuned on the wide model. The control must therefore be
tuned on the wide model, over all hyperparameters that the proxy was tuned over: a control that keeps values tuned for another
parametrization loses for that reason alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mutransfer.io import read_json
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS, TRIALS

from .experiment import Experiment, Range
from .jobs import Executor, Job, RunContext, run_jobs
from .results import at_edges
from .tune import tune
from .user_trainers import needed

__all__ = [
    "Control", "announcement", "comparison", "conclusion", "control_experiment", "control_folder", "finished_trials", "short",
    "tune_control",
]  # fmt: skip

SHORT = {"mup": "µP", "sp": "SP"}
SEEDS = "seeds.csv"  # file in the control's folder: runs of its best recipe over seeds
LR_WITHOUT_A_RANGE = 4.0  # if the experiment does not search the learning rate: factor of the range to either side


@dataclass(frozen=True)
class Control:
    """A parametrization tuned at ``width``, and the losses of its best recipe over seeds.

    Args:
        parametrization: name of the parametrization.
        width: width at which it was tuned and trained.
        trials: number of finished trials of its study.
        searched: names of the searched hyperparameters.
        recipe: the best recipe.
        params: the searched values of the best recipe.
        runs: runs of the best recipe over seeds (`schemas.BASINS`).
        flops: floating point operations of its trials and of ``runs``; None if unknown.
        edges: texts that name the searched values at an end of their range.
    """

    parametrization: str
    width: int
    trials: int
    searched: tuple[str, ...]
    recipe: Recipe
    params: dict[str, Any]
    runs: pd.DataFrame
    flops: float | None
    edges: tuple[str, ...] = ()


def control_folder(folder: RunFolder, parametrization: str, width: int) -> RunFolder:
    """Return the run folder of a control inside ``folder``; each width has its own, since a folder holds one study."""
    return RunFolder(folder.path / f"control-{parametrization}-{width}")


def control_experiment(experiment: Experiment, parametrization: str, width: int, trials: int) -> Experiment:
    """Return the control's experiment: ``experiment`` tuned at ``width`` instead of the proxy's, over the same hyperparameters.

    The range of the learning rate is extended by the ratio of ``width`` to the base width, downwards for a wider model: under
    Adam, the best learning rate of the standard parametrization falls as 1/width (TP-V 2203.03466, Figure 1). The other ranges,
    the sampler and the pruner are unchanged.
    """
    ratio = width / experiment.base_scale.width
    search = {name: range_.model_dump(mode="json") for name, range_ in experiment.search.items()}
    search["lr"] = _extended(experiment.search.get("lr"), experiment.recipe.lr, ratio).model_dump(mode="json")
    base = experiment.base or experiment.proxy
    changed = {
        "parametrization": parametrization,
        "proxy": {"width": width, "depth": experiment.proxy.depth},
        "base": base.model_dump(mode="json"),
        "search": search,
        "trials": trials,
        "budget": {},
    }
    return Experiment.read(
        experiment.model_dump(mode="json") | changed, f"the control's experiment ({parametrization})"
    )


def _extended(range_: Range | None, lr: float, ratio: float) -> Range:
    """Return the learning rate's range with its lower end divided by ``ratio``, or its upper end if ``ratio`` is below 1."""
    if range_ is None:
        range_ = Range(low=lr / LR_WITHOUT_A_RANGE, high=lr * LR_WITHOUT_A_RANGE, log=True)
    if range_.choices is not None:
        return Range(choices=tuple(sorted({*range_.choices, *(float(value) / ratio for value in range_.choices)})))
    assert range_.low is not None
    assert range_.high is not None
    return Range(low=range_.low / max(ratio, 1.0), high=range_.high / min(ratio, 1.0), log=range_.log or ratio != 1)


def finished_trials(experiment: Experiment, folder: RunFolder) -> int:
    """Return the number of finished trials of the study in ``folder``, or ``experiment.trials`` if it is not tuned yet."""
    if not folder.trials.exists():
        return experiment.trials
    return max(1, int(TRIALS.read(folder.trials)["state"].isin(["COMPLETE", "PRUNED"]).sum()))


def announcement(context: RunContext, parametrization: str, width: int, trials: int, seeds: int) -> str:
    """Return a one-line announcement of the control's search with its maximum cost.

    Raises:
        RequestError: ``parametrization`` is unknown, or the model does not support ``width``.
    """
    variant = control_experiment(context.experiment, parametrization, width, trials)
    control = context.for_(variant)
    control.plan(variant.proxy_scale, parametrization, variant.recipe)
    each = control.flops(variant.proxy_scale)
    cost = "" if each is None else f", at most {(trials + seeds) * variant.steps * each:.2e} FLOPs"
    return (
        f"control: {parametrization} is tuned at width {width} as well, with {_count(trials, 'trial')} and "
        f"{_count(seeds, 'seed')}{cost}; --control-trials 0 searches its learning rate alone, with the other values of "
        f"{short(context.experiment.parametrization)}"
    )


def tune_control(
    context: RunContext,
    folder: RunFolder,
    parametrization: str,
    width: int,
    *,
    executor: Executor,
    trials: int,
    seeds: int,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Control:
    """Tune ``parametrization`` at ``width`` with ``trials`` trials, and train its best recipe with ``seeds`` seeds.

    Its study has a separate run folder inside ``folder`` (`control_folder`), where an interrupted search can be resumed.

    Args:
        context: context of the experiment that the proxy was tuned with.
        folder: run folder of that experiment.
        parametrization: parametrization of the control.
        width: width at which the two are compared.
        executor: trains the runs.
        trials: number of finished trials to reach.
        seeds: number of seeds; they are 0, 1, … as in the runs that the control is compared with.
        device: device recorded in the folder.
        progress: called with (runs done, runs in total, text about the best result so far).

    Raises:
        RequestError: as for `tune`, or a run failed.
    """
    variant = control_experiment(context.experiment, parametrization, width, trials)
    inside = control_folder(folder, parametrization, width)
    executor = executor.within(inside.path)  # the numbers of trials start again here
    total = trials + seeds
    found = tune(
        variant, inside, executor=executor, device=device, context=context,
        progress=lambda done, _, text: progress(done, total, text),
    )  # fmt: skip
    runs = _over_seeds(
        context.for_(variant), found.best, inside, executor, seeds, lambda done: progress(trials + done, total, "")
    )
    spent = [found.trials["flops"].sum(min_count=1), runs["flops"].sum(min_count=1)]
    finished = int(found.trials["state"].isin(["COMPLETE", "PRUNED"]).sum())
    return Control(
        parametrization, width, finished, tuple(variant.search), found.best, found.params, runs,
        None if pd.isna(spent).any() else float(sum(spent)),
        tuple(f"{name} {value:.3g} at the {end} end of its range" for name, value, end in at_edges(variant, found.params)),
    )  # fmt: skip


def _over_seeds(
    context: RunContext,
    recipe: Recipe,
    inside: RunFolder,
    executor: Executor,
    seeds: int,
    progress: Callable[[int], None],
) -> pd.DataFrame:
    """Train ``recipe`` with every seed whose run is not yet in the folder, and return the runs of all seeds."""
    variant, question = context.experiment, {"recipe": recipe.model_dump(mode="json")}
    before = read_json(inside.environment, "the run's environment") if inside.environment.exists() else {}
    rows: dict[int, dict[str, Any]] = {}
    path = inside.path / SEEDS
    if before.get("control") == question and path.exists():
        rows = {int(row["seed"]): row for row in BASINS.read(path).to_dict("records")}
    else:
        path.unlink(missing_ok=True)
        inside.note_environment(control=question)
    flops = context.flops(variant.proxy_scale, recipe)
    missing = [
        Job(("seed", seed), variant.proxy_scale, variant.parametrization, recipe, seed)
        for seed in range(seeds)
        if seed not in rows
    ]
    progress(seeds - len(missing))
    for job, outcome in run_jobs(executor, context, missing):
        needed(outcome, f"the best recipe of {variant.parametrization} at width {job.scale.width} with seed {job.seed}")
        rows[job.seed] = {
            "parametrization": variant.parametrization, "width": job.scale.width, "depth": job.scale.depth, "seed": job.seed,
            "log2_lr": math.log2(recipe.lr), "loss": outcome.loss if math.isfinite(outcome.loss) else None,
            "diverged": outcome.diverged, "flops": None if flops is None else flops * outcome.steps,
            "seconds": outcome.seconds,
        }  # fmt: skip
        BASINS.write(pd.DataFrame([rows[seed] for seed in sorted(rows)]), path)
        progress(sum(seed < seeds for seed in rows))
    return BASINS.frame([rows[seed] for seed in range(seeds)])


def comparison(
    basins: pd.DataFrame,
    parametrizations: Sequence[str],
    recipe: Recipe,
    proxy: int,
    control: Control | None,
    *,
    maximize: bool = False,
) -> list[dict[str, Any]]:
    """Compare the losses at the widest width; the first row is the recipe from the proxy.

    A row has a ``label``, ``log2_lr``, the mean ``loss`` over seeds with its 95% confidence interval ``low`` to ``high``
    (Student's t), and ``difference`` with its interval: the row's loss minus the first row's, paired by seed, since the initial
    weights and the order of the data of a seed are the same in both. The loss of a row is NaN if any of its runs diverged.

    Args:
        basins: the runs (`schemas.BASINS`).
        parametrizations: the experiment's parametrization, and the control's if there is one.
        recipe: the recipe tuned on the proxy.
        proxy: the width at which it was tuned.
        control: the control tuned at the widest width; None if only its learning rate was searched.
        maximize: whether higher is better.
    """
    width, transferred = int(basins["width"].max()), math.log2(recipe.lr)
    rows: list[tuple[str, float, pd.Series]] = []
    for name in parametrizations:
        runs = basins[(basins["parametrization"] == name) & (basins["width"] == width)]
        best = _best_log2_lr(runs, -1 if maximize else 1)
        others = "" if name == parametrizations[0] else f", other values as {short(parametrizations[0])}'s"
        rows += [
            (f"{short(name)}, recipe from width {proxy}", transferred, _losses(runs, transferred)),
            (f"{short(name)}, learning rate alone tuned at width {width}{others}", best, _losses(runs, best)),
        ]
    if control is not None:
        rows.append((_tuned(control), math.log2(control.recipe.lr), _losses(control.runs)))
    first = rows[0][2]
    return [
        {"label": label, "log2_lr": log2_lr, **_interval("loss", losses), "seeds": len(losses)}
        | _interval("difference", losses - first if index else losses[:0])
        for index, (label, log2_lr, losses) in enumerate(rows)
    ]


def conclusion(
    rows: Sequence[dict[str, Any]], parametrizations: Sequence[str], trials: int, control: Control | None,
    tuning: float | None, *, maximize: bool = False,
) -> str:  # fmt: skip
    """Return a summary of the comparison, its result and its cost as text.

    The best of the control's rows is used: except by chance, a search over all hyperparameters finds a recipe that is at least as
    good as one found by a search over the learning rate alone.

    Args:
        rows: rows of `comparison`, including the control's.
        parametrizations: the experiment's parametrization and the control's.
        trials: number of finished trials on the proxy.
        control: as for `comparison`.
        tuning: floating point operations of the proxy's trials; None if unknown.
        maximize: whether higher is better.
    """
    ours, us, them = rows[0], *map(short, parametrizations)
    sign = -1 if maximize else 1
    theirs = min(reversed(rows[2:]), key=lambda row: math.inf if math.isnan(row["loss"]) else sign * row["loss"])
    sentences = [
        f"{theirs['label']}: {_loss(theirs)}; {ours['label']} ({_count(trials, 'trial')} there): {_loss(ours)}."
    ]
    if not math.isnan(theirs["difference"]):
        sentences.append(_difference(theirs, ours["loss"], them))
    if control is None:
        sentences.append(
            f"This {them} keeps the other values that were tuned for {us}, which need not be its own best ones."
        )
    elif control.flops is not None:
        times = f", {control.flops / tuning:.3g} times the proxy's" if tuning else ""
        sentences.append(f"The search of {them} cost {control.flops:.2e} FLOPs{times}.")
    if control is not None and control.edges:
        sentences.append(f"{them} may do better still: {'; '.join(control.edges)}.")
    return " ".join(sentences)


def _difference(theirs: dict[str, Any], loss: float, them: str) -> str:
    """Return a sentence on how much ``theirs`` differs from our ``loss``, with value and interval given the same sign."""
    sign = 1 if theirs["difference"] >= 0 else -1
    value, *ends = (sign * theirs[key] for key in ("difference", "difference_low", "difference_high"))
    low, high = sorted(ends)
    between = "" if math.isnan(low) else f" [{low:.4f}, {high:.4f}]"
    share = f" ({value / loss:.1%})" if loss > 0 else ""
    unclear = "" if low > 0 else ", which does not tell which of them is better"
    return (
        f"{them} is {value:.4f}{between} {'higher' if sign > 0 else 'lower'}{share}, paired over "
        f"{_count(theirs['seeds'], 'seed')}{unclear}."
    )


def short(parametrization: str) -> str:
    """Return the name papers use for a parametrization ("mup" → "µP")."""
    return SHORT.get(parametrization, parametrization)


def _tuned(control: Control) -> str:
    *others, last = control.searched
    searched = f"{', '.join(others)} and {last}" if others else last
    return (
        f"{short(control.parametrization)}, tuned at width {control.width} over {searched} with "
        f"{_count(control.trials, 'trial')}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _loss(row: dict[str, Any]) -> str:
    if math.isnan(row["loss"]):
        return "diverged"
    return f"{row['loss']:.4f}" + ("" if math.isnan(row["low"]) else f" [{row['low']:.4f}, {row['high']:.4f}]")


def _best_log2_lr(runs: pd.DataFrame, sign: int) -> float:
    """Return the grid point with the lowest mean of ``sign`` times the loss; diverged runs count as infinite."""
    losses = (sign * runs["loss"]).where(~runs["diverged"], math.inf)
    return float(losses.groupby(runs["log2_lr"]).mean().idxmin())


def _losses(runs: pd.DataFrame, log2_lr: float | None = None) -> pd.Series:
    """Return the losses by seed, at one learning rate if it is given; NaN if a run diverged."""
    if log2_lr is not None:
        runs = runs[np.isclose(runs["log2_lr"], log2_lr)]
    return runs["loss"].where(~runs["diverged"]).set_axis(runs["seed"]).astype(float)


def _interval(name: str, values: pd.Series) -> dict[str, float]:
    """Return the mean with its 95% confidence interval; NaN if a value is missing, no interval for fewer than two values."""
    low, high = ("low", "high") if name == "loss" else (f"{name}_low", f"{name}_high")
    if values.empty or values.isna().any():
        return dict.fromkeys((name, low, high), math.nan)
    mean, count = float(values.mean()), len(values)
    error = float(stats.t.ppf(0.975, count - 1) * values.sem()) if count > 1 else math.nan
    return {name: mean, low: mean - error, high: mean + error}
