"""What a run says in a few lines: the verdicts with their reasons, and the numbers behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mutransfer.recipe import Recipe
from mutransfer.reports.contents import RunContents
from mutransfer.reports.expected import expected_loss
from mutransfer.reports.words import across, label, number, octaves, ordered, power_of_two
from mutransfer.reports.words import regret as regret_words

__all__ = ["Fact", "Finding", "answers", "facts", "findings", "overall"]

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
    """The loss to expect at the target's size, or in one line why it is not told."""
    size = run.target.get("scale")
    transferred = run.verify.get("transferred_log2_lr")
    if not isinstance(size, dict) or not isinstance(size.get("width"), int) or "parametrization" not in run.target:
        return Fact(
            "Expected target loss", "not told", "target.json holds no size: make it again with mutransfer transfer"
        )
    name = f"Expected loss of one run at width {size['width']}"
    if basins is None or not isinstance(transferred, int | float):
        return Fact(name, "not told", run.missing("verify.json"))
    told = expected_loss(basins, float(transferred), run.target)
    if not told.known:
        return Fact(name, "not told", told.words)
    return Fact(name, f"{number(told.loss)} [{number(told.low)}, {number(told.high)}]", told.words)


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
