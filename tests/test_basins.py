"""The analysis of learning-rate basins: planted optima and drifts are found, and the verdict follows the evidence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutransfer.basins import DRIFT_LIMIT, REGRET_LIMIT, judge, optima, worth
from mutransfer.errors import RequestError
from mutransfer.schemas import BASINS, OPTIMA

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
    # of the fitted basins, whose minimum is 1
    assert found.loc[32, "regret"] == pytest.approx(0.529)
    assert found.loc[32, "regret_relative"] == pytest.approx(0.529 / 1.009)
    assert found.loc[8, "regret"] == 0


@pytest.mark.extended
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
        ({"drift": 0.3, "drift_low": 0.1, "drift_high": 0.5}, "pass", None),
        # The whole interval is to be within the limit: a true drift of 0.9 is none that passes.
        ({"drift": 0.5, "drift_low": 0.2, "drift_high": 0.9}, "undecided", "add seeds"),
        ({"drift": 0.7, "drift_low": 0.2, "drift_high": 0.9}, "undecided", "add seeds"),
        ({"drift": 0.7, "drift_low": 0.51, "drift_high": 0.9}, "fail", "width 16: the best learning rate drifts +0.70"),
        ({"drift": -0.7, "drift_low": -0.9, "drift_high": -0.51}, "fail", "drifts -0.70 octaves [-0.90, -0.51]"),
        ({"drift": -0.7, "drift_low": -0.9, "drift_high": -0.4}, "undecided", "add seeds"),
        ({"regret": 0.015, "regret_low": 0.01, "regret_high": 0.02}, "pass", None),
        ({"regret": 0.02, "regret_low": 0.01, "regret_high": 0.04}, "undecided", "add seeds"),
        ({"regret": 0.03, "regret_low": 0.01, "regret_high": 0.04}, "undecided", "costs 0.0300 nats [0.0100, 0.0400]"),
        ({"regret": 0.03, "regret_low": 0.021, "regret_high": 0.04}, "fail", "costs 0.0300 nats [0.0210, 0.0400]"),
        ({"regret": math.nan, "regret_low": math.nan, "regret_high": math.nan}, "undecided", "costs"),
        ({"regret": math.inf, "regret_low": math.inf, "regret_high": math.inf}, "fail", "learning rate diverges"),
        ({"regret": math.inf, "regret_low": 0.0, "regret_high": math.inf}, "undecided", "diverges with some seeds"),
        # Four times the seeds halve the interval.
        ({"drift_low": -0.9, "drift_high": 0.9, "seeds": 5}, "undecided", "about 12 more would decide"),
        ({"regret": 0.01, "regret_high": 0.03, "seeds": 5}, "undecided", "about 15 more would decide"),
        (
            {"regret": 0.04, "regret_low": 0.01, "regret_high": 0.07, "seeds": 4},
            "undecided",
            "about 5 more would decide",
        ),
        ({"regret": 0.0199, "regret_high": 0.04, "seeds": 5}, "undecided", "too close to the limit"),
        (
            {"drift_low": math.nan, "drift_high": math.nan},
            "undecided",
            "drifts +0.00 octaves, but fewer than 3 seeds give no",
        ),
        ({"at_edge": True}, "undecided", "at the edge"),
        ({"at_edge": True, "drift": 2.0, "drift_low": 1.5, "drift_high": 2.5}, "fail", "drifts +2.00"),
    ],
)
def test_the_verdict_follows_the_intervals(changes: dict[str, Any], status: str, said: str | None) -> None:
    judged, reasons = judge(rows(**changes), unit="nats")
    assert judged == status
    assert reasons == [] if said is None else any(said in reason for reason in reasons), reasons


def test_the_limits_are_those_that_are_documented() -> None:
    assert (DRIFT_LIMIT, REGRET_LIMIT) == (0.5, 0.02)


FLAT = {"flat_low": -8.0, "flat_high": -5.0, "perhaps_flat_low": -9.0, "perhaps_flat_high": -4.5}


def test_a_drift_that_costs_nothing_is_no_failure() -> None:
    drifts = {"drift": 2.0, "drift_low": 1.5, "drift_high": 2.5}
    judged, reasons = judge(rows(**drifts, **FLAT).assign(**FLAT), unit="nats")
    assert judged == "pass"
    assert reasons == ["flat: any rate from 2^-8.00 to 2^-5.00 is equally good, within 0.02 nats."]
    narrow = rows(**drifts).assign(**FLAT | {"flat_low": -5.4})
    assert judge(narrow)[0] == "undecided"
    assert judge(narrow.assign(perhaps_flat_low=-4.9))[0] == "fail"
    assert judge(rows(**drifts, regret_high=0.03).assign(**FLAT))[0] == "undecided"
    # Where nothing drifts there is no need to say so.
    assert judge(rows().assign(**FLAT)) == ("pass", [])


def noisy(seed: int, noise: float, loss: Callable[[int, float], float], **options: Any) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return optima(made(lambda width, s, x: loss(width, x) + noise * random.normal(), seeds=range(3), **options), -6.0)


def test_a_regret_is_judged_in_the_losss_own_unit() -> None:
    """A negative loss has a regret like any other: 0.4 nats of 2."""
    for floor in (-2.0, 0.0, 2.0):
        found = noisy(0, 0.002, lambda width, x, floor=floor: floor + 0.1 * (x + 8) ** 2, grid=range(-10, -3))
        assert judge(found)[0] == "fail"
        assert (found["regret_low"] < 0.4).all()
        assert (found["regret_high"] > 0.4).all()
        assert (found["regret_high"] - found["regret_low"] < 0.02).all()
        assert found["regret_relative"].isna().all() == (floor <= 0)


def test_no_interval_of_noisy_seeds_has_width_zero() -> None:
    for seed in range(20):
        found = noisy(seed, 0.01, lambda width, x: 2 + 0.1 * (x + 6) ** 2)
        assert (found["log2_lr_high"] - found["log2_lr_low"] > 0.02).all()
        assert (found["regret_high"] > 1e-5).all()
        assert (found["regret_low"] < 1e-4).all()
        assert found["drift_high"].iloc[1] - found["drift_low"].iloc[1] > 0.02
        assert judge(found)[0] == "pass"


def cliff(edges: dict[int, float]) -> Callable[[int, float], float]:
    return lambda width, x: 2.5 - 0.1 * (x + 6) if x <= edges[width] else math.inf


def test_beside_a_cliff_the_interval_holds_the_cell_that_is_not_resolved() -> None:
    found = noisy(0, 0.002, cliff({8: -5.95, 16: -5.05})).set_index("width")
    assert (found["log2_lr_low"] <= -6).all()
    assert (found["log2_lr_high"] == -5).all()
    assert (found["cell"] == 1).all()
    assert found.loc[16, "drift_low"] <= -1
    assert found.loc[16, "drift_high"] >= 0.9
    assert found.loc[16, "regret_high"] >= 0.09
    status, reasons = judge(found.reset_index())
    assert status == "undecided"
    assert any("which diverges, are" in reason for reason in reasons)


def test_beside_a_jump_of_the_loss_no_parabola_holds() -> None:
    """A run that broke without a NaN: 8 behind 2.4 is a cliff as well."""
    found = noisy(0, 0.002, lambda width, x: 2.5 - 0.1 * (x + 6) if x <= -5.5 else 8.0)
    assert (found["log2_lr_high"] == -5).all()
    assert (found["cell"] == 1).all()


def test_a_carried_rate_that_diverges_fails_and_with_some_seeds_is_undecided() -> None:
    found = noisy(0, 0.002, cliff({8: -5.9, 16: -6.1}))
    assert judge(found) == ("fail", ["width 16: the proxy's learning rate diverges."])
    random = np.random.default_rng(0)
    at = cliff({8: -5.9, 16: -5.9})
    some = made(
        lambda w, s, x: math.inf if (w, s, x) == (16, 2, -6) else at(w, x) + 0.002 * random.normal(), seeds=range(3)
    )
    status, reasons = judge(optima(some, -6.0))
    assert status == "undecided"
    assert any("diverges with some seeds" in reason for reason in reasons)


def test_a_flat_basin_with_noise_is_no_failure() -> None:
    """The optimum moves by two octaves, at a price of a thousandth of a nat."""
    found = noisy(1, 0.003, lambda width, x: 2 + 0.0003 * (x + (6 if width == 8 else 8)) ** 2)
    status, reasons = judge(found)
    assert status == "pass"
    assert reasons[0].startswith("flat: any rate from 2^-")


def test_a_metric_to_be_maximized_has_the_same_optima() -> None:
    frame = made(bowl({8: -6.0, 16: -6.8}))
    down, up = optima(frame, -6.0), optima(frame.assign(loss=-frame["loss"]), -6.0, maximize=True)
    turned = ["best_loss", "transferred_loss"]
    pd.testing.assert_frame_equal(up[turned], -down[turned])
    same = [name for name in OPTIMA.columns if name not in [*turned, "regret_relative"]]
    pd.testing.assert_frame_equal(up[same], down[same])


def test_a_regret_is_worth_the_compute_that_buys_as_much() -> None:
    """The loss falls by 0.1 a width, which is 4 times the compute: 0.05 is worth the half of it."""
    floors = {8: 1.2, 16: 1.1, 32: 1.0}
    frame = made(lambda width, seed, x: floors[width] + 0.0125 * (x + 8) ** 2, widths=floors, grid=range(-10, -5))
    frame["flops"] = frame["width"].astype(float) ** 2
    assert worth(optima(frame, -6.0), frame) == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert worth(optima(frame, -6.0)[1:], frame) is None
    assert worth(optima(frame, -6.0), frame.assign(flops=math.nan)) is None
    far = made(lambda width, seed, x: floors[width] + 0.06 * (x + 8) ** 2, widths=floors, grid=range(-10, -5))
    assert worth(optima(far, -6.0), far.assign(flops=frame["flops"])) is None  # 0.24, where the widths gain 0.2
    rising = frame.assign(loss=-frame["loss"])
    assert worth(optima(rising, -6.0), rising) is None


def test_losses_that_differ_by_less_than_a_square_can_hold() -> None:
    found = optima(made(lambda width, seed, x: 1e-200 * x if width == 16 else 0.0, seeds=[0], grid=[0, 1]), 0.0)
    assert found["best_loss"].tolist() == pytest.approx([0.0, 0.0], abs=1e-100)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_was_measured_there_is_a_verdict(data: st.DataObject) -> None:
    """One seed, few learning rates, equal losses, any of them diverged: no fit breaks."""
    widths, seeds = range(8, 8 + data.draw(st.integers(1, 3))), range(data.draw(st.integers(1, 3)))
    grid = range(data.draw(st.integers(1, 6)))
    value = st.one_of(st.floats(-3, 3), st.sampled_from([1.0, 2.0, math.inf]))
    losses = {key: data.draw(value) for key in itertools.product(widths, seeds, grid)}
    found = optima(made(lambda *key: losses[key], widths, seeds, grid), 0.0, resamples=50)
    assert len(found) == len(widths)
    status, reasons = judge(found)
    assert status in ("pass", "fail", "undecided")
    assert bool(reasons) or status == "pass"
    if len(seeds) < 3:
        assert status != "pass"
