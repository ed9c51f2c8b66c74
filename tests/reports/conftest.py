"""Frames such as real runs leave: SP's optimum drifts by an octave per step of width, µP's stays."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from mutransfer.io import write_json
from mutransfer.recipe import Recipe
from mutransfer.reports import write_report
from mutransfer.schemas import BASINS, COORDINATES, OPTIMA, PARAMETERS, SLOPES, TRIALS, varying

WIDTHS = (64, 256, 1024)
OPTIMUM = {"mup": (-7.0, -7.0, -7.0), "sp": (-7.0, -8.0, -9.0)}
FLOOR = {"mup": (0.42, 0.31, 0.24), "sp": (0.43, 0.34, 0.29)}


def made_basins() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = []
    for name, optima in OPTIMUM.items():
        for width, best, floor in zip(WIDTHS, optima, FLOOR[name], strict=True):
            for seed in range(5):
                for log2_lr in range(-12, -3):
                    away = log2_lr - best + generator.normal(0, 0.08)
                    loss = floor * math.exp(0.055 * away**2 + max(away, 0) ** 3 * 0.02 + generator.normal(0, 0.025))
                    diverged = away > (3.5 if name == "sp" else 2.6) or (away > 2.4 and generator.random() < 0.4)
                    flops = 6.0 * width**2 * 1e5
                    rows.append((name, width, 4, seed, log2_lr, math.nan if diverged else loss, diverged, flops, 1.0))
    return BASINS.frame(pd.DataFrame(rows, columns=list(BASINS.columns)))


def made_optima() -> pd.DataFrame:
    rows = []
    for name, best in OPTIMUM.items():
        for i, (width, floor) in enumerate(zip(WIDTHS, FLOOR[name], strict=True)):
            drift, regret = best[i] - best[0], math.exp(0.055 * (best[i] + 7) ** 2 + 0.02 * abs(best[i] + 7) ** 3) - 1
            spread = 0.15 if i else 0.0
            rows.append(
                {
                    "parametrization": name,
                    "width": width,
                    "log2_lr": best[i] + 0.03 * i,
                    "log2_lr_low": best[i] - 0.12,
                    "log2_lr_high": best[i] + 0.14,
                    "drift": drift + 0.03 * i,
                    "drift_low": drift - spread,
                    "drift_high": drift + spread + 0.03 * i,
                    "best_loss": floor,
                    "transferred_loss": floor * (1 + regret),
                    "regret": floor * regret,
                    "regret_low": floor * (regret * 0.8 - 0.004 * i),
                    "regret_high": floor * (regret * 1.2 + 0.004 * i),
                    "at_edge": False,
                }
            )
    return OPTIMA.frame(rows)


MODULES = {"embed": (0.0, 0.0), "blocks.0.attn.out": (0.0, 1.0), "blocks.0.ffn.down": (0.02, 1.0), "head": (-0.5, 1.2)}


def coordinate_frame(modules: dict[str, tuple[float, float]], broken: str | None = None) -> pd.DataFrame:
    """Return both parametrizations' coordinates; ``modules`` gives µP's and SP's slope of the change."""
    generator = np.random.default_rng(1)
    rows = []
    for column, name in enumerate(("mup", "sp")):
        for module, slopes in modules.items():
            output = module == "head"
            for step in (0, 1, 2, 4):
                statistic = "activation" if step == 0 else "change"
                slope = slopes[column] if step else (-0.5 if output and name == "mup" else 0.0)
                slope = 0.98 if module == broken and name == "mup" and step else slope
                for width in (64, 128, 256, 512):
                    for seed in range(5):
                        size = 0.8 if step == 0 else 0.05 * step
                        value = size * (width / 64) ** slope * math.exp(generator.normal(0, 0.06))
                        role = "output" if output else "feature"
                        rows.append((name, "adamw", module, role, statistic, step, seed, width, 4, value))
    return COORDINATES.frame(pd.DataFrame(rows, columns=list(COORDINATES.columns)))


def slope_frame(coordinates: pd.DataFrame) -> pd.DataFrame:
    """Return µP's slopes with a made-up interval."""
    rows = []
    keys = ["parametrization", "module", "role", "statistic", "step"]
    for key, group in coordinates[coordinates["parametrization"] == "mup"].groupby(keys, sort=False):
        slope = float(np.polyfit(np.log2(group[varying(coordinates)]), np.log2(group["value"]), 1)[0])
        low, high = (-0.5, 0.0) if key[2] == "output" else (0.0, 0.0)
        ok = low - 0.15 < slope < high + 0.15
        expected = f"{low:g}..{high:g}"
        rows.append([*key, slope, slope - 0.03, slope + 0.03, expected, expected, ok])
    return SLOPES.frame(pd.DataFrame(rows, columns=list(SLOPES.columns)))


@pytest.fixture
def basins() -> pd.DataFrame:
    return made_basins()


@pytest.fixture
def optima() -> pd.DataFrame:
    return made_optima()


@pytest.fixture
def trials() -> pd.DataFrame:
    return made_trials()


@pytest.fixture
def coordinates() -> pd.DataFrame:
    return coordinate_frame(MODULES)


@pytest.fixture
def slopes(coordinates: pd.DataFrame) -> pd.DataFrame:
    return slope_frame(coordinates)


def made_trials() -> pd.DataFrame:
    generator = np.random.default_rng(2)
    rows = []
    for number in range(60):
        value = 0.52 if number == 0 else 0.34 + generator.gamma(2.0, 0.09) * (1.3 - number / 60)
        state, diverged, flops = "COMPLETE", False, 2e12
        if number and generator.random() < 0.3:
            state, flops, value = "PRUNED", 6e11, value + 0.15
        elif number and generator.random() < 0.12:
            diverged, value, flops = True, math.nan, 3e11
        rows.append([number, state, value, diverged, 200.0, flops, 1.5, 2.0 ** generator.uniform(-10, -5)])
    rows[-1][1:3] = ["RUNNING", math.nan]
    return TRIALS.frame(pd.DataFrame(rows, columns=[*TRIALS.columns, "lr"]))


def made_search(count: int) -> pd.DataFrame:
    """Return a search of five hyperparameters in which lr matters; high ones diverge, and trial 7 ends at a loss of 30."""
    g = np.random.default_rng(3)
    lr, weight_decay = 2.0 ** g.uniform(-12, -3, count), 10 ** g.uniform(-3, -0.5, count)
    init, beta1 = 2 ** g.uniform(-1, 1, count), g.uniform(0.9, 0.99, count)
    schedule = g.choice(["cosine", "linear", "wsd"], count)
    value = 1.2 + 0.03 * (np.log2(lr) + 7) ** 2 + 0.1 * np.log2(init) ** 2 + g.gamma(2, 0.03, count)
    diverged = (np.log2(lr) > -4.3) & (g.random(count) < 0.7)
    pruned = (g.random(count) < 0.3) & (np.arange(count) > 7) & ~diverged
    value[7], diverged[7] = 30.0, False
    columns = {
        "number": range(count),
        "state": np.where(pruned, "PRUNED", "COMPLETE"),
        "value": np.where(diverged, np.nan, value + 0.3 * pruned),
        "diverged": diverged,
        "steps": np.where(pruned, 80.0, 200.0),
        "flops": np.where(pruned, 4e11, 1e12),
        "seconds": np.where(pruned, 0.8, 2.0),
    }
    searched = {"beta1": beta1, "init_scale": init, "lr": lr, "schedule": schedule, "weight_decay": weight_decay}
    frame = pd.DataFrame(columns | searched)
    frame.loc[9, ["state", "value", "flops", "seconds"]] = ["FAIL", np.nan, np.nan, np.nan]
    return TRIALS.frame(frame.assign(diverged=frame["diverged"] & (frame.index != 9)))


@pytest.fixture
def many_trials() -> Callable[[int], pd.DataFrame]:
    return made_search


@pytest.fixture
def broken() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Coordinates of 20 modules and µP's slopes; one module grows with width as if its lr were not scaled."""
    many = {f"{letter}.ffn": (0.0, 1.0) for letter in "abcdefghijklmnopqrst"}
    coordinates = coordinate_frame(many, broken="h.ffn")
    return coordinates, slope_frame(coordinates)


class Verdict(NamedTuple):
    status: str
    slopes: pd.DataFrame
    cause: str | None


def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for what computes optima and slopes, so that these tests are about the page; return what it was given."""
    given: dict[str, Any] = {}

    def fit(basins: pd.DataFrame, transferred: float | None = None, **options: Any) -> pd.DataFrame:
        given.update(basins=basins, transferred=transferred)
        return made_optima()

    def judge(coordinates: pd.DataFrame) -> Verdict:
        given.update(coordinates=coordinates)
        return Verdict("pass", slope_frame(coordinates), None)

    for name, members in {"basins": {"optima": fit, "REGRET_LIMIT": 0.02}, "coord_check": {"verdict": judge}}.items():
        module = types.ModuleType(f"mutransfer.{name}")
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return given


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return stand_in(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run folder with its report, written once for all tests that only read it."""
    folder = run_folder(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        return write_report(folder)


HOSTILE = "<script>alert(1)</script>"


def run_folder(parent: Path) -> Path:
    """Write a run folder with everything in it, and names that try to leave their place."""
    folder = parent / "a run & <b>"
    folder.mkdir()
    BASINS.write(made_basins(), folder / "basins.csv")
    TRIALS.write(made_search(60), folder / "trials.csv")
    COORDINATES.write(
        coordinate_frame({"head": (-0.5, 1.2), HOSTILE: (0.0, 1.0), "$x_{": (0.0, 1.0)}), folder / "coordinates.csv"
    )
    Recipe(lr=2**-7, weight_decay=0.1).save(folder / "best.json")
    numbers = dict.fromkeys([c for c, (dtype, _) in PARAMETERS.columns.items() if dtype == "float64"], 0.25)
    rows = [{"name": name, "shape": "64x64", "role": "hidden", **numbers} for name in ("w", HOSTILE, "</table>")]
    rows[0]["eps"] = None
    target = {"parameters": rows, "warnings": [f"decay was tuned {HOSTILE}: see `--decay`."], "parametrization": "mup"}
    target |= {"scale": {"width": 4096, "depth": 4}, "batch_size": 16, "steps": 200, "seed": 3}
    write_json(folder / "target.json", target | {"provenance": {"proxy": {"batch": 16, "steps": 200}}})
    commands = [f"mutransfer tune '{HOSTILE}'", "mutransfer verify 'a run & <b>'"]
    environment = {"commands": commands, "versions": {"torch": "2.13"}, "data_sha256": "2dd84a", "seed": 11}
    write_json(folder / "environment.json", environment)
    (folder / "experiment.yaml").write_text(f"model: mlp\ndata: '{HOSTILE}'\n", encoding="utf-8")
    compared = [
        {"label": "µP at the transferred lr", "log2_lr": -7.0, "loss": 0.24, "low": 0.23, "high": 0.25},
        {"label": "SP at the transferred lr", "log2_lr": -7.0, "loss": None, "low": None, "high": None},
        {"label": "SP at its own best", "log2_lr": -9.0, "loss": 0.3, "low": 0.29, "high": 0.31},
        {
            "label": "SP, tuned at width 1024 over lr and alpha_output",
            "log2_lr": -9.5,
            "loss": 0.252,
            "low": 0.24,
            "high": 0.26,
            "difference": 0.012,
            "difference_low": 0.008,
            "difference_high": 0.016,
        },
    ]
    price = {
        "tuning_flops": 3.1e14,
        "repeats_flops": 6.2e13,
        "verify_flops": 9.3e16,
        "target_flops": 3.1e16,
        "ratio": 0.01,
    }
    price |= {"uncounted": ["mylib::op"]}
    verified = {"verdict": "pass", "transferred_log2_lr": -7.0, "price": price, "comparison": compared}
    verified["control"] = {
        "parametrization": "sp",
        "trials": 24,
        "conclusion": f"SP is 0.0120 higher, paired {HOSTILE}.",
    }
    write_json(folder / "verify.json", verified)
    write_json(folder / "check.json", {"verdict": "pass", "cause": None, "parametrization": "mup", "control": "sp"})
    return folder
