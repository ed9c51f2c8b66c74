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
    """One verdict: what was asked, "pass", "fail", "undecided" or "none", and why in one line."""

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
    return [
        _finding("Learning-rate transfer", "verify", run.verify, run.missing("verify.json")),
        _finding("Coordinate check", "check", check, run.missing("check.json")),
    ]


def overall(found: list[Finding], warnings: list[str]) -> str:
    """Return the verdict on the run: "fail" if any fails, "warn" if any is undecided or the target has warnings, else "pass".

    "none" without any verdict.
    """
    there = {finding.status for finding in found}
    if "fail" in there:
        return "fail"
    if "undecided" in there or ("pass" in there and warnings):
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
    name = f"Expected loss at width {size['width']}"
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
        regret = regret_words(*last[["regret", "regret_low", "regret_high"]])
        regret = "diverged" if pd.isna(last["transferred_loss"]) else regret
        note = f"loss above its own best, in the loss's unit, width {last['width']}"
        regrets.append(Fact(f"{label(name)}: regret of the transferred lr", regret, note))
    found = [*drifts, *regrets]
    if run.trials is not None and run.trials["value"].notna().any():
        rows = run.trials[run.trials["state"].eq("COMPLETE")].dropna(subset="value")
        if len(rows):
            best = rows.loc[rows["value"].idxmax() if run.maximize else rows["value"].idxmin()]
            found.append(
                Fact(
                    "best proxy metric" if run.maximize else "best proxy loss",
                    number(float(best["value"])),
                    f"trial {best['number']} of {len(run.trials)}",
                )
            )
    return found


def _finding(name: str, kind: str, content: dict[str, Any], missing: str) -> Finding:
    status = content.get("verdict")
    if not isinstance(status, str):
        return Finding(name, "none", missing)
    reasons = [content[key] for key in ("cause", "reason", "reasons") if content.get(key)]
    lines = [str(line) for reason in reasons for line in (reason if isinstance(reason, list) else [reason])]
    return Finding(name, status, " ".join(lines) or DEFAULT.get((kind, status), ""))
