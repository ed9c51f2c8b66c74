"""The analysis of learning-rate basins: planted optima and drifts are found, and the verdict follows the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mutransfer.basins import DRIFT_LIMIT, REGRET_LIMIT, judge, optima
from mutransfer.errors import RequestError
from mutransfer.frames import BASINS, OPTIMA

Loss = Callable[[int, int, float], float]  # (width, seed, log2 lr) → loss


def made(loss: Loss, widths: Any = (8, 16), seeds: Any = range(5), grid: Any = range(-9, -2), name: str = "mup") -> Any:
    rows = []
    for width in widths:
        for seed in seeds:
            for x in grid:
                value = loss(width, seed, x)
                lost = not math.isfinite(value)
                rows.append(
                    {"parametrization": name, "width": width, "depth": 2, "seed": seed, "log2_lr": float(x),
                     "loss": None if lost else value, "diverged": lost, "flops": 1.0, "seconds": 1.0}
                )  # fmt: skip
    return BASINS.frame(rows)


def bowl(optimum: dict[int, float], floor: float = 1.0, steepness: float = 0.1) -> Loss:
    return lambda width, seed, x: floor + steepness * (x - optimum[width]) ** 2


@pytest.mark.parametrize("grid", [(-7.0, -6.0, -5.0), (-6.5, -6.0, -5.25), range(-10, -2)])
@pytest.mark.parametrize("place", [-5.7, -6.0, -6.2])
def test_a_planted_parabola_is_found_exactly(grid: Any, place: float) -> None:
    found = optima(made(bowl({8: place, 16: place}), grid=grid))
    assert found["log2_lr"].tolist() == pytest.approx([place, place], abs=1e-9)
    assert found["log2_lr_low"].tolist() == pytest.approx([place, place], abs=1e-9)
    assert found["drift"].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert list(found.columns) == list(OPTIMA.columns)


def test_a_planted_drift_and_its_regret_are_found_exactly() -> None:
    found = optima(made(bowl({8: -6.0, 16: -6.8, 32: -8.3}), widths=(32, 8, 16), grid=range(-12, -2))).set_index(
        "width"
    )
    assert found["drift"].tolist() == pytest.approx([0, -0.8, -2.3], abs=1e-9)
    assert found.index.tolist() == [8, 16, 32]
    # at the width's best grid point (−8) the loss is 1.009, at the transferred −6 it is 1.529
    assert found.loc[32, "best_loss"] == pytest.approx(1 + 0.1 * 0.3**2)
    assert found.loc[32, "transferred_loss"] == pytest.approx(1 + 0.1 * 2.3**2)
    assert found.loc[32, "regret"] == pytest.approx(1.529 / 1.009 - 1)
    assert found.loc[8, "regret"] == 0


def test_the_interval_covers_a_planted_drift_under_noise() -> None:
    """60 frames of 20 seeds; each seed moves its basins, and every loss a little: of few seeds, a bootstrap covers less."""
    covered, wide = [], []
    for trial in range(60):
        random = np.random.default_rng(trial)
        moved = {(width, seed): random.normal(0, 0.2) for width in (8, 16) for seed in range(20)}

        def loss(width: int, seed: int, x: float, random: Any = random, moved: Any = moved) -> float:
            place = {8: -6.0, 16: -6.9}[width] + moved[width, seed]
            return 1 + 0.1 * (x - place) ** 2 + random.normal(0, 0.002)

        row = optima(made(loss, seeds=range(20)), resamples=200, seed=trial).set_index("width").loc[16]
        assert row["drift_low"] <= row["drift"] <= row["drift_high"]
        covered.append(row["drift_low"] < -0.9 < row["drift_high"])
        wide.append(row["drift_high"] - row["drift_low"])
    assert 0.88 <= np.mean(covered) < 1
    # a normal interval: 2 · 1.96 · 0.2 · √2 / √20
    assert np.mean(wide) == pytest.approx(0.248, abs=0.03)


def test_a_single_outlying_seed_widens_the_interval() -> None:
    def loss(width: int, seed: int, x: float) -> float:
        return 1 + 0.1 * (x + (8 if seed == 0 and width == 16 else 6)) ** 2

    row = optima(made(loss)).set_index("width").loc[16]
    assert row["drift_low"] < row["drift"] < 0 < row["drift_high"]


def test_the_bootstrap_repeats_itself() -> None:
    random = np.random.default_rng(0)
    frame = made(lambda width, seed, x: 1 + 0.1 * (x + 6) ** 2 + random.normal(0, 0.01))
    pd.testing.assert_frame_equal(optima(frame), optima(frame.sample(frac=1, random_state=1)))


def test_one_diverged_run_is_an_infinite_loss() -> None:
    """Four of five seeds do best at −5, where the fifth diverges: it is no optimum, and no mean of the rest."""
    frame = made(lambda w, seed, x: math.inf if x > -5 or (x == -5 and seed == 4) else 3 + (x + 5) / 10)
    found = optima(frame)
    assert found["log2_lr"].tolist() == [-9, -9] or found["log2_lr"].max() <= -6
    frame = made(lambda w, seed, x: math.inf if x > -5 or (x == -5 and seed == 4) else 3 - (x + 5) / 10)
    found = optima(frame)
    assert found["log2_lr"].tolist() == [-6, -6]
    assert np.isfinite(found["best_loss"]).all()


def test_a_loss_that_was_finite_though_diverged_counts_as_infinite() -> None:
    frame = made(bowl({8: -6.0, 16: -6.0}))
    frame.loc[frame["log2_lr"] == -6, "diverged"] = True
    assert not np.isclose(optima(frame)["log2_lr"], -6).any()


@pytest.mark.parametrize(("place", "edge"), [(-9.4, True), (-9.0, True), (-8.0, False), (-3.0, True), (-3.6, False)])
def test_an_optimum_at_the_edge_is_marked(place: float, edge: bool) -> None:
    found = optima(made(bowl({8: -6.0, 16: place}))).set_index("width")
    assert bool(found.loc[16, "at_edge"]) == edge
    assert not found.loc[8, "at_edge"]


def test_each_parametrization_drifts_from_its_own_smallest_width() -> None:
    ours = made(bowl({8: -6.0, 16: -6.0}))
    theirs = made(bowl({8: -5.0, 16: -7.0}), name="sp")
    found = optima(pd.concat([ours, theirs], ignore_index=True))
    assert found["drift"].tolist() == pytest.approx([0, 0, 0, -2], abs=1e-9)
    assert found["parametrization"].tolist() == ["mup", "mup", "sp", "sp"]


def test_regret_is_measured_at_the_learning_rate_that_is_carried() -> None:
    frame = made(bowl({8: -6.0, 16: -6.0}))
    assert optima(frame, transferred=-5.0)["regret"].tolist() == pytest.approx([0.1, 0.1])
    assert optima(frame, transferred=-5.5)["regret"].isna().all()


def test_a_learning_rate_that_not_every_seed_ran_is_left_out() -> None:
    frame = made(bowl({8: -6.0, 16: -6.0}))
    partial = frame[(frame["log2_lr"] != -6) | (frame["seed"] != 3) | (frame["width"] != 16)]
    found = optima(partial).set_index("width")
    assert found.loc[16, "best_loss"] == pytest.approx(1.1)


def test_widths_with_other_seeds_cannot_be_compared() -> None:
    frame = made(bowl({8: -6.0, 16: -6.0}))
    with pytest.raises(RequestError, match=r"width 16 of mup has seeds \[0, 1, 2, 3\]"):
        optima(frame[(frame["width"] == 8) | (frame["seed"] < 4)])
    with pytest.raises(RequestError, match="mutransfer verify"):
        optima(frame[:0])


def rows(**changes: Any) -> pd.DataFrame:
    quiet = {
        "parametrization": "mup", "width": 16, "log2_lr": -6.0, "log2_lr_low": -6.1, "log2_lr_high": -5.9, "drift": 0.0,
        "drift_low": -0.1, "drift_high": 0.1, "best_loss": 1.0, "transferred_loss": 1.0, "regret": 0.0, "regret_low": 0.0,
        "regret_high": 0.01, "at_edge": False,
    }  # fmt: skip
    return OPTIMA.frame([quiet | {"width": 8}, quiet | changes])


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, "pass", None),
        ({"drift": 0.5, "drift_low": 0.2, "drift_high": 0.9}, "pass", None),
        ({"drift": 0.7, "drift_low": 0.2, "drift_high": 0.9}, "undecided", "add seeds"),
        ({"drift": 0.7, "drift_low": 0.51, "drift_high": 0.9}, "fail", "width 16: the best learning rate drifts +0.70"),
        ({"drift": -0.7, "drift_low": -0.9, "drift_high": -0.51}, "fail", "drifts -0.70 octaves [-0.90, -0.51]"),
        ({"drift": -0.7, "drift_low": -0.9, "drift_high": -0.4}, "undecided", "add seeds"),
        ({"regret": 0.02, "regret_low": 0.01, "regret_high": 0.04}, "pass", None),
        ({"regret": 0.03, "regret_low": 0.01, "regret_high": 0.04}, "undecided", "costs 3.0% of the loss"),
        ({"regret": 0.03, "regret_low": 0.021, "regret_high": 0.04}, "fail", "costs 3.0% of the loss"),
        ({"regret": math.nan, "regret_low": math.nan, "regret_high": math.nan}, "undecided", "costs"),
        (
            {"drift_low": math.nan, "drift_high": math.nan},
            "undecided",
            "drifts +0.00 octaves, and fewer than 3 seeds make no",
        ),
        ({"at_edge": True}, "undecided", "at the edge"),
        ({"at_edge": True, "drift": 2.0, "drift_low": 1.5, "drift_high": 2.5}, "fail", "drifts +2.00"),
    ],
)
def test_the_verdict_follows_the_intervals(changes: dict[str, Any], status: str, said: str | None) -> None:
    judged, reasons = judge(rows(**changes))
    assert judged == status
    assert reasons == [] if said is None else any(said in reason for reason in reasons), reasons


def test_the_limits_are_those_that_are_documented() -> None:
    assert (DRIFT_LIMIT, REGRET_LIMIT) == (0.5, 0.02)
