"""What a run says in a few lines: the verdicts with their reasons, and the numbers behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from mutransfer.reports.contents import RunContents
from mutransfer.reports.words import across, label, number, octaves, ordered, percent

__all__ = ["Fact", "Finding", "facts", "findings", "overall"]

SIGNS = {"pass": "✓", "fail": "✗", "undecided": "?"}
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


def overall(found: list[Finding]) -> str:
    """Return the worst of the verdicts there are; "none" without any."""
    there = {finding.status for finding in found}
    return next((status for status in ("fail", "undecided", "pass") if status in there), "none")


def facts(run: RunContents, optima: pd.DataFrame | None) -> list[Fact]:
    """Return the key numbers: drift and regret per parametrization at the widest width, the price, the best trial."""
    drifts, regrets, price = [], [], []
    names = [] if optima is None else ordered(list(optima["parametrization"]))[::-1]
    for name in names:
        assert optima is not None
        rows = optima[optima["parametrization"] == name].sort_values("width")
        last = rows.iloc[-1]
        drift = octaves(*last[["drift", "drift_low", "drift_high"]])
        drifts.append(Fact(f"{label(name)}: drift of the best lr", drift, across([*rows["width"]])))
        regret = percent(*last[["regret", "regret_low", "regret_high"]])
        regret = "diverged" if pd.isna(last["transferred_loss"]) else regret
        note = f"loss above its own best, width {last['width']}"
        regrets.append(Fact(f"{label(name)}: regret of the transferred lr", regret, note))
    said = run.verify.get("price")
    if isinstance(said, dict) and isinstance(said.get("ratio"), int | float):
        sides = f"{number(said.get('tuning_flops'))} against {number(said.get('target_flops'))} FLOPs"
        price.append(Fact("price of tuning", f"{number(100.0 * said['ratio'])}\u00a0% of the target run", sides))
    found = [*drifts, *price, *regrets]
    if run.trials is not None and run.trials["value"].notna().any():
        rows = run.trials[run.trials["state"].eq("COMPLETE")].dropna(subset="value")
        if len(rows):
            best = rows.loc[rows["value"].idxmin()]
            found.append(
                Fact("best proxy loss", number(float(best["value"])), f"trial {best['number']} of {len(run.trials)}")
            )
    return found


def _finding(name: str, kind: str, content: dict[str, Any], missing: str) -> Finding:
    status = content.get("verdict")
    if not isinstance(status, str):
        return Finding(name, "none", missing)
    reasons = [content[key] for key in ("cause", "reason", "reasons") if content.get(key)]
    lines = [str(line) for reason in reasons for line in (reason if isinstance(reason, list) else [reason])]
    return Finding(name, status, " ".join(lines) or DEFAULT.get((kind, status), ""))
