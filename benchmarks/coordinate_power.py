"""How often the coordinate check catches a planted fault and names it, and how often it fails a healthy model.

Every verdict has seeds of its own, at the command's default budget: 4 widths, 4 steps, 5 seeds and up to 20 while undecided.
Each is written down as it is reached, so that an interrupted script goes on where it was; several may run at once on
different --models.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from harness import Claim, publish
from scipy.stats import beta

import mutransfer as mt
from mutransfer.coord_check import Verdict
from mutransfer.coord_check.check import judge_coordinates
from mutransfer.coord_check.diagnosis import FAULTS, Fault, plant, plant_in
from mutransfer.optimizers.rules import OPTIMIZERS
from mutransfer.proxies.data import load_data
from mutransfer.proxies.load import DEFAULT_DATA, DEFAULT_DEPTH, builtin
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import Observation

WIDTHS = (64, 128, 256, 512)
MODELS, KINDS = ("mlp", "transformer", "resnet"), ("adamw", "sgd")
FIRST = {"mlp": "input", "transformer": "embedding", "resnet": "stem"}
HEALTHY = "healthy"
# With --single: the learning rate of one parameter of the transformer is off by a power of the width.
SINGLE = {
    f"{parameter} x width^{power:+g}": (parameter, power)
    for parameter in (
        *(f"blocks.1.attention.{name}.weight" for name in ("q", "k", "v", "out")),
        *(f"blocks.0.ffn.{name}.weight" for name in ("up", "down")),
        "blocks.1.norm1.weight",
        "readout.weight",
    )
    for power in (1, 0.5, -0.5, -1)
}
ONE = "one-parameter"
FELT_EPS = 1e-2
COLUMNS = ["model", "optimizer", "fault", "group", "status", "named", "seeds", "seconds"]


def family_of(model: str) -> mt.Family:
    """Return a built-in model as `mutransfer check` takes it."""
    data = load_data(DEFAULT_DATA[model], 16)
    return builtin(model, data, mt.Scale(WIDTHS[0], DEFAULT_DEPTH[model]), batch_size=4)


def planted(family: mt.Family, seen: Observation, fault: str, optimizer: str) -> tuple[mt.Family, Any]:
    """Return the family and the planner that have the fault."""
    column = OPTIMIZERS[optimizer].column

    def planner(*args: Any, **kwargs: Any) -> mt.Plan:
        recipe = args[4]
        if fault == "epsilon":
            recipe = recipe.with_(eps=FELT_EPS)
        plan = mt.plan(family, *args[1:4], recipe, observation=seen)
        if fault == "epsilon":
            plan = replace(plan, rows=tuple(replace(row, eps=FELT_EPS) for row in plan.rows))
        return plan

    if fault in SINGLE:
        return family, plant_in(*SINGLE[fault], planner)
    known = FAULTS.get(fault)
    if known is None:
        return family, planner
    return behind_first(family, known), plant(known, planner, column)


def behind_first(family: mt.Family, fault: Fault) -> mt.Family:
    """Return the family with its first layer's output multiplied by the fault's power of the width."""
    power = float(fault.forward.get("input", 0))
    if not power:
        return family

    def build(scale: mt.Scale) -> torch.nn.Module:
        model = family.build(scale)
        factor = (scale.width / family.base.width) ** power
        model.get_submodule(FIRST[family.name]).register_forward_hook(lambda module, args, output: output * factor)
        return model

    return replace(family, build=build)


def missing(done: pd.DataFrame, given: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Yield what is still to be measured, a group of seeds at a time, so that every table on the way is balanced."""
    have = set(done[["model", "optimizer", "fault", "group"]].itertuples(index=False, name=None))
    for group in range(max(given.groups, given.healthy)):
        for model in given.models:
            for optimizer in KINDS:
                kinds = [*FAULTS, *(["epsilon"] if optimizer == "adamw" else [])] if group < given.groups else []
                if given.single:
                    kinds = [*SINGLE] if group < given.groups else []
                for fault in [HEALTHY, *kinds] if group < given.healthy else kinds:
                    if (model, optimizer, fault, group) not in have:
                        yield model, optimizer, fault, group


def measure(given: argparse.Namespace) -> pd.DataFrame:
    """Reach every missing verdict."""
    done = pd.read_csv(given.out) if given.out.exists() else pd.DataFrame(columns=COLUMNS)
    families = {model: family_of(model) for model in given.models}
    seen = {model: observe(family) for model, family in families.items()}
    todo = list(missing(done, given))
    for i, (model, optimizer, fault, group) in enumerate(todo):
        family, planner = planted(families[model], seen[model], fault, optimizer)
        # Disjoint seeds for every verdict: groups of 20 within a block of its own.
        block = zlib.crc32(f"{model} {optimizer} {fault}".encode()) % 2**20
        found = judge_coordinates(
            family,
            WIDTHS,
            "mup",
            optimizer,
            seeds=5,
            first=block * 2**12 + group * 20,
            planner=planner,
            observation=seen[model],
        )
        row = (
            model,
            optimizer,
            fault,
            group,
            found.verdict.status,
            named(found.verdict, fault),
            found.seeds,
            round(found.seconds, 2),
        )
        done.loc[len(done)] = row
        if not given.out.exists():
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        with given.out.open("a", encoding="utf-8") as file:
            print(*("" if value is None else value for value in row), sep=",", file=file)
        print(f"{i + 1}/{len(todo)}", *row, flush=True)
    return done


def named(found: Verdict, fault: str) -> str | None:
    """Return the fault that a verdict names: a single parameter's only with its name and which way it is off."""
    if fault not in SINGLE:
        return found.fault
    parameter, power = SINGLE[fault]
    if (parameter, power) == ("readout.weight", 1):  # the one readout there is
        return fault if found.fault == "readout-lr" else found.fault
    says = f"the learning rate of {parameter} is too {'large' if power > 0 else 'small'}"
    return fault if found.fault == ONE and str(found.cause).startswith(says) else found.fault


def interval(hits: int, of: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Clopper and Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    return low, float(beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0


def shares(done: pd.DataFrame) -> list[Claim]:
    """Return the claims: per fault, model and optimizer caught and named; per optimizer false alarms."""
    claims = []
    for (fault, model, optimizer), rows in done[done["fault"] != HEALTHY].groupby(["fault", "model", "optimizer"]):
        caught, n = rows["status"].eq("fail"), len(rows)
        for what, hits, bar in (
            ("caught", int(caught.sum()), 0.95),
            ("named", int((caught & rows["named"].eq(fault)).sum()), 0.8),
        ):
            claims.append(
                Claim(f"{fault}, {model}, {optimizer}: {what}", hits / n, *interval(hits, n), bar, hits / n >= bar)
            )
    for optimizer, rows in done[done["fault"] == HEALTHY].groupby("optimizer"):
        for what, status, bar in (("false alarms", "fail", 0.01), ("undecided", "undecided", 0.05)):
            hits, n = int(rows["status"].eq(status).sum()), len(rows)
            claims.append(
                Claim(f"healthy, {optimizer} ({n}): {what}", hits / n, *interval(hits, n), bar, hits / n <= bar)
            )
    return claims


def main() -> None:
    """Measure what is missing and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="does it run: one group of seeds, the MLP only")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--groups", type=int, default=20, help="groups of seeds per fault, model and optimizer")
    parser.add_argument("--healthy", type=int, default=100, help="groups of seeds per healthy model and optimizer")
    parser.add_argument("--single", action="store_true", help="single parameters' rates instead, in the transformer")
    parser.add_argument("--out", type=Path, default=Path("runs/coordinate_power.csv"))
    given = parser.parse_args()
    torch.set_num_threads(1)  # so that several run beside each other
    if given.single:
        given.models, given.healthy = ["transformer"], 0
    if given.quick:
        given.models, given.groups, given.healthy, given.single = ["mlp"], 1, 1, False
        given.out = given.out.with_name("coordinate_power_quick.csv")
        given.out.unlink(missing_ok=True)
    publish(shares(measure(given)), given.json)


if __name__ == "__main__":
    main()
