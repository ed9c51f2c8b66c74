"""Summarize a run in a few lines: the verdicts with their reasons, the key numbers, and the expected target loss."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mutransfer.recipe import Recipe
from mutransfer.reports.contents import RunContents
from mutransfer.reports.style import across, label, number, octaves, ordered, power_of_two
from mutransfer.reports.style import regret as regret_words

__all__ = ["Expected", "Fact", "Finding", "answers", "expected_loss", "facts", "findings", "overall"]

FEWEST_WIDTHS = 3  # two widths give one slope, and no evidence on whether it continues


@dataclass(frozen=True)
class Expected:
    """Expected validation loss with the interval for one run; all NaN if there is none. ``words`` explains how, or why not."""

    loss: float
    low: float
    high: float
    words: str

    @property
    def known(self) -> bool:
        """Whether there is an expected loss."""
        return math.isfinite(self.loss)


def expected_loss(basins: pd.DataFrame, transferred: float, target: dict[str, Any]) -> Expected:
    """Return the expected loss of ``target`` (target.json), given the runs at the transferred learning rate.

    At a measured width the loss is that of the runs there. Beyond the widest width the loss is extrapolated as a power of the
    width: the middle continues the slope of the last two widths, the low end the best slope between any two neighbouring
    widths, and the high end assumes no gain at all. Both ends are moved outwards by the 95% interval of a single run over
    seeds, and the error of the slopes grows with the distance. There is no expected loss if the target also changes depth,
    batch size or duration, because runs that vary only the width are no evidence for that.

    Args:
        basins: runs (schema BASINS), of which those of the target's parametrization at ``transferred`` are used.
        transferred: log2 of the transferred learning rate.
        target: a target config as JSON data.
    """
    width = target["scale"]["width"]
    runs = basins[(basins["parametrization"] == target["parametrization"]) & np.isclose(basins["log2_lr"], transferred)]
    if reason := _incomparable(target, runs) or _unusable(runs, width):
        return _unknown(reason)
    logs = {int(size): np.log(rows["loss"].to_numpy(float)) for size, rows in runs.groupby("width")}
    spread, freedom = _seed_spread(logs)
    if width in logs:
        losses = np.exp(logs[width])
        middle, count = math.log(losses.mean()), len(losses)  # the arithmetic mean, as in every table
        half = _t_quantile(freedom) * spread * math.sqrt(1 + 1 / count)
        return _from_logs(
            middle,
            middle - half,
            middle + half,
            f"the mean of {count} seeds measured at this width, with the 95% interval for one more run on a new seed, which is "
            "wider than the interval of the mean",
        )
    return _beyond(logs, width, spread, freedom)


def _beyond(logs: dict[int, np.ndarray], width: int, spread: float, freedom: int) -> Expected:
    """Extrapolate from the widest measured width; ``logs`` has the natural logarithms of the losses of each width."""
    sizes = list(logs)
    widest, count = sizes[-1], min(map(len, logs.values()))
    start, ahead = float(logs[widest].mean()), math.log(width / widest)
    ends = []
    for small, large in itertools.pairwise(sizes):
        step = math.log(large / small)
        slope = float(logs[large].mean() - logs[small].mean()) / step
        # The error of the widest mean enters twice: through the start of the line, and through its slope.
        error = spread * math.sqrt(1 + (1 + ahead / step) ** 2 / count + (ahead / step) ** 2 / count)
        ends.append((start + slope * ahead, start + slope * ahead - _t_quantile(freedom) * error))
    middle, last = ends[-1][0], sizes[-2]
    if middle >= start:
        return _unknown(f"the loss does not fall from width {last} to {widest}, so there is no gain to extrapolate")
    low, high = min(end for _, end in ends), start + _t_quantile(freedom) * spread * math.sqrt(1 + 1 / count)
    return _from_logs(
        middle,
        low,
        high,
        f"if the loss keeps falling to width {width} as it does from width {last} to {widest}, a factor of "
        f"{number(width / widest)} beyond the measured widths. Low end: the best gain between any two neighbouring widths "
        f"continues; high end: there is no gain beyond {widest}; each with the 95% interval for one run on a new seed. Assumes "
        "that gains do not speed up with width",
    )


def _incomparable(target: dict[str, Any], runs: pd.DataFrame) -> str:
    """Return which settings besides the width differ between the target and the measured runs, or an empty string."""
    if runs.empty:
        return "no run of the target's parametrization at the transferred learning rate"
    proxy = target.get("provenance", {}).get("proxy", {})
    depths = set(runs["depth"])
    changes = {
        "depth": (target["scale"].get("depth"), depths.pop() if len(depths) == 1 else None),
        "batch": (target.get("batch_size"), proxy.get("batch")),
        "duration": (target.get("steps"), proxy.get("steps")),
    }
    changed = [name for name, (wanted, measured) in changes.items() if wanted != measured]
    return (
        f"the target's {' and '.join(changed)} differ from those of the measured runs, which vary only the width"
        if changed
        else ""
    )


def _unusable(runs: pd.DataFrame, width: int) -> str:
    """Return why no loss at ``width`` can be expected from the runs at the transferred learning rate, or an empty string."""
    counts = runs.groupby("width").size()
    if runs["loss"].isna().any() or runs["diverged"].fillna(False).any():
        return "a run at the transferred learning rate diverged"
    if counts.min() < 2:
        return "one seed gives no interval: increase `--seeds`"
    if (runs["loss"] <= 0).any():
        return "a loss is not positive, so it cannot follow a power of the width"
    if width in counts.index:
        return ""
    if width < counts.index.max():
        return f"width {width} lies between those measured: add it to `mutransfer verify --widths`"
    enough = len(counts) >= FEWEST_WIDTHS
    return (
        "" if enough else f"not enough widths ({len(counts)}, needs at least {FEWEST_WIDTHS}): add some to `--widths`"
    )


def _seed_spread(logs: dict[int, np.ndarray]) -> tuple[float, int]:
    """Return the standard deviation between seeds, pooled over widths, and its degrees of freedom."""
    freedom = sum(len(values) - 1 for values in logs.values())
    return math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in logs.values()) / freedom), freedom


def _t_quantile(freedom: int) -> float:
    """Return the half-width of a 95% interval in standard errors (Student's t)."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def _from_logs(middle: float, low: float, high: float, words: str) -> Expected:
    return Expected(math.exp(middle), math.exp(low), math.exp(high), words)


def _unknown(words: str) -> Expected:
    return Expected(math.nan, math.nan, math.nan, words)


SIGNS = {"pass": "✓", "fail": "✗", "undecided": "?", "warn": "!"}
DEFAULT = {
    ("check", "pass"): "All modules scale with the size of the model as stable feature learning requires.",
    (
        "check",
        "fail",
    ): "At least one module does not scale with the size of the model as it should; see the slopes below.",
    ("check", "undecided"): "The measurements are inconclusive: add seeds, widths or depths.",
    ("verify", "pass"): "The learning rate tuned on the small proxy stays optimal as the model gets wider.",
    ("verify", "fail"): "The best learning rate moves with width, so the proxy's does not transfer.",
    ("verify", "undecided"): "The measurements are inconclusive: add seeds, widths or learning rates.",
}


@dataclass(frozen=True)
class Finding:
    """One verdict: its name, its status ("pass", "fail", "undecided", "unfinished" or "none"), and the reason in one line."""

    name: str
    status: str
    text: str

    @property
    def sign(self) -> str:
        """Mark of the status that is readable without colour."""
        return SIGNS.get(self.status, "–")


@dataclass(frozen=True)
class Fact:
    """One key number with its name and a note."""

    name: str
    value: str
    note: str = ""


def findings(run: RunContents, verdict: Any | None) -> list[Finding]:
    """Return the verdicts on the transfer and the coordinate check, after a note on the search if it is unfinished.

    ``verdict`` is the coordinate check's verdict computed from the frame; it is used for a folder without check.json.
    """
    check = run.check
    if not check and verdict is not None:
        check = {"verdict": verdict.status, "cause": verdict.cause}
    found = [
        _finding(run, "Learning-rate transfer", "verify", run.verify),
        _finding(run, "Coordinate check", "check", check),
    ]
    search = [Finding("Search", "unfinished", run.unfinished["tune"])] if "tune" in run.unfinished else []
    return [*search, *found]


def overall(found: list[Finding], warnings: list[str]) -> str:
    """Return the verdict on the run: "fail", "warn", "pass", or "none" without any verdict.

    It is "fail" if any finding fails. It is "warn" if one is undecided, or if one passes while the target has warnings or
    something is unfinished.
    """
    statuses = {finding.status for finding in found}
    if "fail" in statuses:
        return "fail"
    if "undecided" in statuses or ("pass" in statuses and (warnings or "unfinished" in statuses)):
        return "warn"
    return "pass" if "pass" in statuses else "none"


def answers(run: RunContents, basins: pd.DataFrame | None) -> list[Fact]:
    """Return the main results of the run: the recipe, the expected loss of the target, and the price."""
    found = []
    if run.recipe is not None:
        found.append(Fact("Recipe", _recipe(run.recipe), "differences from the defaults, at base scale"))
    if run.target:
        found.append(_expected(run, basins))
    price = run.verify.get("price")
    if isinstance(price, dict) and isinstance(price.get("ratio"), int | float):
        found += _price(price, max(run.verify.get("widths") or [0]))
    return found


def _price(price: dict[str, Any], widest: int) -> list[Fact]:
    """Return the prices of tuning, repeats and verification, each relative to one run at the widest width."""
    target = price.get("target_flops")
    whole = f"one run at width {widest}, the widest verified" if widest else "one run at the widest width"
    found = []
    for name, key in (("tuning", "tuning_flops"), ("repeats", "repeats_flops"), ("verify", "verify_flops")):
        spent = price.get(key)
        if isinstance(spent, int | float) and isinstance(target, int | float) and target:
            sides = f"{number(spent)} against {number(target)} FLOPs"
            found.append(Fact(f"Price of {name}", f"{number(100.0 * spent / target)}\u00a0% of {whole}", sides))
    uncounted = price.get("uncounted")
    if found and isinstance(uncounted, list) and uncounted:
        found.append(Fact("Not in the price", ", ".join(map(str, uncounted)), "operations without a FLOP formula"))
    return found


def _recipe(recipe: Recipe) -> str:
    default = {**Recipe().model_dump(), "method": str(Recipe().method)}
    values = {**recipe.model_dump(), "method": str(recipe.method)}
    changed = {key: value for key, value in values.items() if value != default[key] and key != "lr"}
    others = [f"{key} {number(value) if isinstance(value, float) else value}" for key, value in changed.items()]
    return ", ".join([f"lr {number(recipe.lr)} ({power_of_two(math.log2(recipe.lr))})", *others])


def _expected(run: RunContents, basins: pd.DataFrame | None) -> Fact:
    """Return the expected loss at the target's size, or the reason in one line why there is none."""
    size = run.target.get("scale")
    transferred = run.verify.get("transferred_log2_lr")
    if not isinstance(size, dict) or not isinstance(size.get("width"), int) or "parametrization" not in run.target:
        return Fact(
            "Expected target loss", "unknown", "target.json has no size: create it again with `mutransfer transfer`"
        )
    name = f"Expected loss of one run at width {size['width']}"
    if basins is None or not isinstance(transferred, int | float):
        return Fact(name, "unknown", run.missing("verify.json"))
    expected = expected_loss(basins, float(transferred), run.target)
    if not expected.known:
        return Fact(name, "unknown", expected.words)
    return Fact(name, f"{number(expected.loss)} [{number(expected.low)}, {number(expected.high)}]", expected.words)


def facts(run: RunContents, optima: pd.DataFrame | None) -> list[Fact]:
    """Return the key numbers: drift and regret per parametrization at the widest width, and the best trial."""
    drifts, regrets = [], []
    names = [] if optima is None else ordered(list(optima["parametrization"]))[::-1]
    for name in names:
        assert optima is not None
        rows = optima[optima["parametrization"] == name].sort_values("width")
        last = rows.iloc[-1]
        drift = octaves(*last[["drift", "drift_low", "drift_high"]])
        drifts.append(Fact(f"{label(name)}: drift of the best lr", drift, across([*rows["width"]])))
        if pd.isna(last["transferred_loss"]):  # no run at the transferred learning rate
            continue
        regret = regret_words(*last[["regret", "regret_low", "regret_high"]])
        regret = "diverged" if math.isinf(last["transferred_loss"]) else regret
        note = f"loss above the best one at this width, in the loss's unit, width {last['width']}"
        regrets.append(Fact(f"{label(name)}: regret of the transferred lr", regret, note))
    return [*drifts, *regrets, *_best_proxy(run)]


def _best_proxy(run: RunContents) -> list[Fact]:
    """Return the best proxy loss or metric: the mean over seeds if the best trials were repeated, otherwise that of one run."""
    if run.trials is None:
        return []
    rows = run.trials[run.trials["state"].eq("COMPLETE") & ~run.trials["diverged"].fillna(False)].dropna(subset="value")
    if rows.empty:
        return []
    values, what = rows.set_index("number")["value"], "metric" if run.maximize else "loss"
    if run.repeats is not None and "tune" not in run.unfinished:
        again = run.repeats[run.repeats["number"].isin(values.index)]
        whole = again.groupby("number").filter(
            lambda group: not group["diverged"].any() and group["loss"].notna().all()
        )
        means = {number: [values[number], *group["loss"]] for number, group in whole.groupby("number")}
        if means:
            choose = max if run.maximize else min
            number_, losses = choose(means.items(), key=lambda each: sum(each[1]) / len(each[1]))
            value = number(float(sum(losses) / len(losses)))
            return [Fact(f"proxy {what} of the recipe", value, f"mean over {len(losses)} seeds, trial {number_}")]
    ended = f"{run.trials_done} trials" if "tune" not in run.unfinished else f"the {run.trials_done} trials so far"
    best = values.idxmax() if run.maximize else values.idxmin()
    return [Fact(f"best proxy {what} of one run", number(float(values[best])), f"trial {best} of {ended}")]


def _finding(run: RunContents, name: str, kind: str, content: dict[str, Any]) -> Finding:
    status, file = content.get("verdict"), f"{kind}.json"
    if not isinstance(status, str) or file in run.absent:
        going_on = run.unfinished.get(kind) == run.missing(file)
        return Finding(name, "unfinished" if going_on else "none", run.missing(file))
    reasons = [content[key] for key in ("cause", "reason", "reasons") if content.get(key)]
    lines = [str(line) for reason in reasons for line in (reason if isinstance(reason, list) else [reason])]
    return Finding(name, status, " ".join(lines) or DEFAULT.get((kind, status), ""))
