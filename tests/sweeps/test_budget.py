"""A budget is never exceeded, and what a sweep has cost is what its trials have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mutransfer.cli.verify import price_lines
from mutransfer.optimizers.muon import orthogonalized
from mutransfer.price import FlopCounter
from mutransfer.recipe import Scale
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import BASINS, REPEATS, TRIALS
from mutransfer.sweeps.experiment import Budget
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.tune import Spent, price

from ..helpers.small import experiment


def trial(**outcome: Any) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(value=1.0, user_attrs={"outcome": outcome} if outcome else {})


def test_told_trials_add_up() -> None:
    spent = Spent.of(
        [trial(flops=3.0, seconds=1.0), trial(flops=1.0, seconds=2.5), trial(flops=None, seconds=None), trial()]
    )
    assert spent == Spent(4.0, 3.5, 1.0)


@given(st.integers(1, 8), st.floats(1, 100), st.floats(1, 1000))
def test_flops_are_never_exceeded(capacity: int, each: float, budget: float) -> None:
    """A batch of ``capacity`` is kept full, and the oldest ends first."""
    spent, running = Spent(), 0
    while True:
        while running < capacity and spent.allows(Budget(flops=budget), running, each):
            running += 1
        if not running:
            break
        running -= 1
        spent = Spent(spent.flops + each, spent.seconds + 1, 1.0)
    assert spent.flops <= budget
    assert spent.flops + each > budget  # and none is left that would have fitted


def test_seconds_are_judged_by_the_usual_trial() -> None:
    budget = Budget(seconds=10)
    assert Spent().allows(budget, 0, 1.0)
    assert Spent().allows(budget, 5, 1.0)  # nothing is known of how long they take
    assert Spent(0, 6.0, 3.0).allows(budget, 0, 1.0)
    assert not Spent(0, 6.0, 3.0).allows(budget, 1, 1.0)


@pytest.mark.parametrize("running", [0, 5])
def test_no_budget_allows_all(running: int) -> None:
    assert Spent(1e30, 1e9, 1e3).allows(Budget(), running, 1e20)


def filled(path: Path) -> RunFolder:
    folder = RunFolder(path).make()
    trial = {"state": "COMPLETE", "value": 1.0, "diverged": False, "steps": 4.0, "seconds": 1.0}
    TRIALS.write(
        pd.DataFrame([trial | {"number": i, "flops": flops} for i, flops in enumerate((3e6, 1e6, None))]), folder.trials
    )
    repeat = {"loss": 1.0, "diverged": False, "flops": 2e6, "seconds": 1.0}
    REPEATS.write(pd.DataFrame([repeat | {"number": 0, "seed": seed} for seed in (1, 2)]), folder.repeats)
    basin = {
        "width": 16,
        "depth": 1,
        "seed": 0,
        "log2_lr": -3.0,
        "loss": 1.0,
        "diverged": False,
        "flops": 7e6,
        "seconds": 1.0,
    }
    BASINS.write(pd.DataFrame([basin | {"parametrization": name} for name in ("mup", "mup", "sp")]), folder.basins)
    return folder


def test_the_price_of_tuning_repeats_and_verify_beside_one_run(tmp_path: Path) -> None:
    asked, target = experiment(), Scale(64, 2)
    context = RunContext(asked)
    found = price(context, filled(tmp_path / "run"), target)
    whole = found["target_flops"]
    assert whole == (context.flops(target) or 0) * asked.steps
    assert found == {
        "tuning_flops": 4e6, "repeats_flops": 4e6, "verify_flops": 21e6, "target_flops": whole, "ratio": 4e6 / whole,
        "uncounted": [],
    }  # fmt: skip
    missing = price(context, RunFolder(tmp_path / "other").make(), target)
    assert [missing[key] for key in ("tuning_flops", "repeats_flops", "verify_flops", "ratio")] == 4 * [None]


def test_what_no_figure_includes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = RunContext.cost
    monkeypatch.setattr(
        RunContext, "cost", lambda *asked: replace(cost(*asked), total=1e6, uncounted=("mylib::op", "aten::_fft_r2c"))
    )
    asked = experiment()
    found = price(RunContext(asked), filled(tmp_path / "run"), Scale(64, 2))
    assert found["uncounted"] == ["mylib::op", "aten::_fft_r2c"]
    text = "\n".join(price_lines(found, 64))
    for words in ("tuning took 4.00e+06 FLOPs", "repeats took 4.00e+06", "verify took 2.10e+07", "one run at width 64"):
        assert words in text
    assert "no formula is known: mylib::op, aten::_fft_r2c" in text


def test_muons_iteration_is_part_of_a_step() -> None:
    """One hidden matrix of 32 × 32 in an MLP of depth 2."""
    plain, muon = (RunContext(experiment(optimizer=name)).flops(Scale(32, 2)) or 0 for name in ("adamw", "muon"))
    with FlopCounter() as counter:
        orthogonalized(torch.randn(32, 32), torch.float32, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert muon - plain == counter.flops.total > 0
