"""What a run says in a few lines: the verdicts with their reasons, the numbers behind them, and the loss to expect."""

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

FEWEST_WIDTHS = 3  # two give one pace, and no sign whether it holds


@dataclass(frozen=True)
class Expected:
    """A validation loss with the interval for one run; all NaN where it cannot be expected. ``words`` say how or why not."""

    loss: float
    low: float
    high: float
    words: str

    @property
    def known(self) -> bool:
        """Whether there is a number at all."""
        return math.isfinite(self.loss)


def expected_loss(basins: pd.DataFrame, transferred: float, target: dict[str, Any]) -> Expected:
    """Return the loss to expect of ``target`` (target.json) from the runs at the transferred learning rate.

    A measured width needs no model. Beyond the widest one the loss is taken to fall on at the pace of the last two widths;
    the low end takes the best pace between any two neighbours, the high end no gain at all, and each is moved out by the
    95% interval of a single run over seeds. The paces are powers of the width, and their error grows with the distance.
    Nothing is told when the target also changes depth, batch or duration: widths hold no evidence for that.

    Args:
        basins: runs (schema BASINS); those of the target's parametrization at ``transferred`` count.
        transferred: log2 of the learning rate that is carried over.
        target: a target config as JSON data.
    """
    width = target["scale"]["width"]
    mine = basins[(basins["parametrization"] == target["parametrization"]) & np.isclose(basins["log2_lr"], transferred)]
    if reason := _incomparable(target, mine) or _unusable(mine, width):
        return _unknown(reason)
    logs = {int(size): np.log(rows["loss"].to_numpy(float)) for size, rows in mine.groupby("width")}
    spread, freedom = _seed_spread(logs)
    if width in logs:
        losses = np.exp(logs[width])
        middle, count = math.log(losses.mean()), len(losses)  # the mean that every table shows
        half = _half(freedom) * spread * math.sqrt(1 + 1 / count)
        return _of(
            middle,
            middle - half,
            middle + half,
            f"the mean of {count} seeds measured at this width, with the 95% interval of one more run on a new seed: wider than "
            "the interval of the mean",
        )
    return _beyond(logs, width, spread, freedom)


def _beyond(logs: dict[int, np.ndarray], width: int, spread: float, freedom: int) -> Expected:
    """Continue from the widest measured width; losses are natural logarithms."""
    sizes = list(logs)
    widest, count = sizes[-1], min(map(len, logs.values()))
    start, ahead = float(logs[widest].mean()), math.log(width / widest)
    ends = []
    for small, large in itertools.pairwise(sizes):
        step = math.log(large / small)
        pace = float(logs[large].mean() - logs[small].mean()) / step
        # The widest mean's error enters twice: where the line starts, and how steep it is.
        error = spread * math.sqrt(1 + (1 + ahead / step) ** 2 / count + (ahead / step) ** 2 / count)
        ends.append((start + pace * ahead, start + pace * ahead - _half(freedom) * error))
    middle, last = ends[-1][0], sizes[-2]
    if middle >= start:
        return _unknown(f"the loss does not fall from width {last} to {widest}, so no pace can be continued")
    low, high = min(end for _, end in ends), start + _half(freedom) * spread * math.sqrt(1 + 1 / count)
    return _of(
        middle,
        low,
        high,
        f"if the pace from width {last} to {widest} goes on to {width}, a factor of {number(width / widest)} beyond what was "
        f"measured. Low end: the best pace between any two widths goes on; high end: nothing is gained beyond {widest}; each "
        "with the 95% interval of one run on a new seed. Assumes that gains do not speed up with width",
    )


def _incomparable(target: dict[str, Any], mine: pd.DataFrame) -> str:
    """Return what else than the width differs between the target and the measured runs, if anything."""
    if mine.empty:
        return "no run of the target's parametrization at the transferred learning rate"
    proxy = target.get("provenance", {}).get("proxy", {})
    depths = set(mine["depth"])
    changes = {
        "depth": (target["scale"].get("depth"), depths.pop() if len(depths) == 1 else None),
        "batch": (target.get("batch_size"), proxy.get("batch")),
        "duration": (target.get("steps"), proxy.get("steps")),
    }
    changed = [name for name, (wanted, measured) in changes.items() if wanted != measured]
    return (
        f"the target's {' and '.join(changed)} differ from the measured runs', which only vary the width"
        if changed
        else ""
    )


def _unusable(mine: pd.DataFrame, width: int) -> str:
    """Return why the runs at the transferred learning rate say nothing about ``width``, if they do not."""
    counts = mine.groupby("width").size()
    if mine["loss"].isna().any() or mine["diverged"].fillna(False).any():
        return "a run at the transferred learning rate diverged"
    if counts.min() < 2:
        return "one seed tells no interval: add `--seeds`"
    if (mine["loss"] <= 0).any():
        return "a loss is not positive, so it is no power of the width"
    if width in counts.index:
        return ""
    if width < counts.index.max():
        return f"width {width} lies between those measured: add it to `mutransfer verify --widths`"
    enough = len(counts) >= FEWEST_WIDTHS
    return "" if enough else f"not enough widths ({len(counts)}, at least {FEWEST_WIDTHS}): add `--widths`"


def _seed_spread(logs: dict[int, np.ndarray]) -> tuple[float, int]:
    """Return the standard deviation between seeds, pooled over widths, and its degrees of freedom."""
    freedom = sum(len(values) - 1 for values in logs.values())
    return math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in logs.values()) / freedom), freedom


def _half(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def _of(middle: float, low: float, high: float, words: str) -> Expected:
    return Expected(math.exp(middle), math.exp(low), math.exp(high), words)


def _unknown(words: str) -> Expected:
    return Expected(math.nan, math.nan, math.nan, words)


SIGNS = {"pass": "✓", "fail": "✗", "undecided": "?", "warn": "!"}
DEFAULT = {
    ("check", "pass"): "Every module's size moves with the model's as stable feature learning needs.",
    ("check", "fail"): "At least one module's size does not move with the model's as it should; see the slopes below.",
    ("check", "undecided"): "The measurements do not tell yet: add seeds, widths or depths.",
    ("verify", "pass"): "The learning rate tuned on the small proxy stays optimal as the model gets wider.",
    ("verify", "fail"): "The best learning rate moves with width, so the proxy's does not carry over.",
    ("verify", "undecided"): "The measurements do not tell yet: add seeds, widths or learning rates.",
}


@dataclass(frozen=True)
class Finding:
    """One verdict: what was asked, "pass", "fail", "undecided", "unfinished" or "none", and why in one line."""

    name: str
    status: str
    text: str

    @property
    def sign(self) -> str:
        """A mark that does not need colour."""
        return SIGNS.get(self.status, "–")


@dataclass(frozen=True)
class Fact:
    """One number with what it is about."""

    name: str
    value: str
    note: str = ""


def findings(run: RunContents, verdict: Any | None) -> list[Finding]:
    """Return the verdict on the transfer and that of the coordinate check.

    ``verdict`` is the coordinate check's as computed from the frame, for a folder without check.json.
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
    """Return the verdict on the run: "fail" if any fails, "warn" if any is undecided or the target has warnings, else "pass".

    A "pass" beside something unfinished is a "warn" as well.

    "none" without any verdict.
    """
    there = {finding.status for finding in found}
    if "fail" in there:
        return "fail"
    if "undecided" in there or ("pass" in there and (warnings or "unfinished" in there)):
        return "warn"
    return "pass" if "pass" in there else "none"


def answers(run: RunContents, basins: pd.DataFrame | None) -> list[Fact]:
    """Return what the run was made for: the recipe, the loss to expect of the target, and the price."""
    found = []
    if run.recipe is not None:
        found.append(Fact("Recipe", _recipe(run.recipe), "what differs from the defaults; at base scale"))
    if run.target:
        found.append(_expected(run, basins))
    said = run.verify.get("price")
    if isinstance(said, dict) and isinstance(said.get("ratio"), int | float):
        found += _price(said, max(run.verify.get("widths") or [0]))
    return found


def _price(said: dict[str, Any], widest: int) -> list[Fact]:
    """What tuning, repeats and verifying took, each against one run at the widest width."""
    target = said.get("target_flops")
    whole = f"one run at width {widest}, the widest verified" if widest else "one run at the widest width"
    found = []
    for name, key in (("tuning", "tuning_flops"), ("repeats", "repeats_flops"), ("verify", "verify_flops")):
        spent = said.get(key)
        if isinstance(spent, int | float) and isinstance(target, int | float) and target:
            sides = f"{number(spent)} against {number(target)} FLOPs"
            found.append(Fact(f"Price of {name}", f"{number(100.0 * spent / target)}\u00a0% of {whole}", sides))
    uncounted = said.get("uncounted")
    if found and isinstance(uncounted, list) and uncounted:
        found.append(Fact("Not in the price", ", ".join(map(str, uncounted)), "operations without a formula"))
    return found


def _recipe(recipe: Recipe) -> str:
    default = Recipe().model_dump()
    changed = {key: value for key, value in recipe.model_dump().items() if value != default[key] and key != "lr"}
    said = [f"{key} {number(value) if isinstance(value, float) else value}" for key, value in changed.items()]
    return ", ".join([f"lr {number(recipe.lr)} ({power_of_two(math.log2(recipe.lr))})", *said])


def _expected(run: RunContents, basins: pd.DataFrame | None) -> Fact:
    """The loss to expect at the target's size, or in one line why it is not expected."""
    size = run.target.get("scale")
    transferred = run.verify.get("transferred_log2_lr")
    if not isinstance(size, dict) or not isinstance(size.get("width"), int) or "parametrization" not in run.target:
        return Fact(
            "Expected target loss", "not told", "target.json holds no size: make it again with mutransfer transfer"
        )
    name = f"Expected loss of one run at width {size['width']}"
    if basins is None or not isinstance(transferred, int | float):
        return Fact(name, "not told", run.missing("verify.json"))
    expected = expected_loss(basins, float(transferred), run.target)
    if not expected.known:
        return Fact(name, "not told", expected.words)
    return Fact(name, f"{number(expected.loss)} [{number(expected.low)}, {number(expected.high)}]", expected.words)


def facts(run: RunContents, optima: pd.DataFrame | None) -> list[Fact]:
    """Return the key numbers: drift and regret per parametrization at the widest width, the best trial."""
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
        note = f"loss above its own best, in the loss's unit, width {last['width']}"
        regrets.append(Fact(f"{label(name)}: regret of the transferred lr", regret, note))
    return [*drifts, *regrets, *_best_proxy(run)]


def _best_proxy(run: RunContents) -> list[Fact]:
    """Return the best proxy loss, or metric: a mean over seeds where the best trials were repeated, else that of one run."""
    if run.trials is None:
        return []
    rows = run.trials[run.trials["state"].eq("COMPLETE") & ~run.trials["diverged"].fillna(False)].dropna(subset="value")
    if rows.empty:
        return []
    own, what = rows.set_index("number")["value"], "metric" if run.maximize else "loss"
    if run.repeats is not None and "tune" not in run.unfinished:
        again = run.repeats[run.repeats["number"].isin(own.index)]
        whole = again.groupby("number").filter(
            lambda group: not group["diverged"].any() and group["loss"].notna().all()
        )
        means = {number: [own[number], *group["loss"]] for number, group in whole.groupby("number")}
        if means:
            choose = max if run.maximize else min
            number_, losses = choose(means.items(), key=lambda each: sum(each[1]) / len(each[1]))
            value = number(float(sum(losses) / len(losses)))
            return [Fact(f"proxy {what} of the recipe", value, f"mean over {len(losses)} seeds, trial {number_}")]
    ended = f"{run.trials_done} trials" if "tune" not in run.unfinished else f"the {run.trials_done} trials so far"
    best = own.idxmax() if run.maximize else own.idxmin()
    return [Fact(f"best proxy {what} of one run", number(float(own[best])), f"trial {best} of {ended}")]


def _finding(run: RunContents, name: str, kind: str, content: dict[str, Any]) -> Finding:
    status, file = content.get("verdict"), f"{kind}.json"
    if not isinstance(status, str) or file in run.absent:
        going_on = run.unfinished.get(kind) == run.missing(file)
        return Finding(name, "unfinished" if going_on else "none", run.missing(file))
    reasons = [content[key] for key in ("cause", "reason", "reasons") if content.get(key)]
    lines = [str(line) for reason in reasons for line in (reason if isinstance(reason, list) else [reason])]
    return Finding(name, status, " ".join(lines) or DEFAULT.get((kind, status), ""))
