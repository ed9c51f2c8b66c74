"""The loss to expect of the target: right where the truth is known, and silent where there is no evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mutransfer.reports.summary import expected_loss
from mutransfer.schemas import BASINS

from ..helpers.sets import extended_but

WIDTHS, SEEDS, NOISE = (64, 128, 256, 512), 5, 0.01


def target_of(width: int, **changes) -> dict:
    plain = {"parametrization": "mup", "scale": {"width": width, "depth": 4}, "batch_size": 16, "steps": 200}
    return plain | {"provenance": {"proxy": {"batch": 16, "steps": 200}}} | changes


def runs(truth, seed=0, widths=WIDTHS, seeds=SEEDS, aways=(-1, 0, 1)) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    rows = [
        ("mup", width, 4, s, -7.0 + away, truth(width) * np.exp(generator.normal(0, NOISE)) + away**2, False, 1.0, 1.0)
        for width in widths for s in range(seeds) for away in aways
    ]  # fmt: skip
    return BASINS.frame(pd.DataFrame(rows, columns=list(BASINS.columns)))


@pytest.mark.parametrize("floor", extended_but([0.0, 0.5, 2.0], 0.5))
@pytest.mark.parametrize("width", extended_but([256, 1024, 8192], 256, 8192))
def test_the_interval_holds_a_run_of_the_target(floor, width):
    """From a pure power law to one that has nearly stopped falling, one more run lies inside 95 times of 100."""
    generator = np.random.default_rng(1)

    def truth(w):
        return floor + 3.0 * (w / 64) ** -0.3

    inside = 0
    for seed in range(200):
        told = expected_loss(runs(truth, seed, aways=(0,)), -7.0, target_of(width))
        run = truth(width) * np.exp(generator.normal(0, NOISE))
        inside += told.low <= run <= told.high
    assert inside >= 183  # 95% of 200, less 2.3 standard deviations


def test_gains_that_stop_are_inside_too():
    def stops(w):
        return max(3.0 * (w / 64) ** -0.3, 3.0 * (512 / 64) ** -0.3)

    told = expected_loss(runs(stops), -7.0, target_of(4096))
    assert told.low < stops(4096) < told.high


def test_a_measured_width_is_not_extrapolated():
    frame = runs(lambda w: 3.0 * (w / 64) ** -0.3)
    there = frame[(frame["width"] == 256) & (frame["log2_lr"] == -7.0)]["loss"]
    told = expected_loss(frame, -7.0, target_of(256))
    assert told.loss == pytest.approx(there.mean(), rel=1e-12)  # the mean that the tables show
    assert "mean of 5 seeds measured at this width" in told.words
    assert "one more run" in told.words
    far = expected_loss(frame, -7.0, target_of(8192))
    assert far.high / far.low > told.high / told.low
    assert "a factor of 16 beyond" in far.words


def falling(w):
    return 3.0 * (w / 64) ** -0.3


@pytest.mark.parametrize(
    ("frame", "target", "words"),
    [
        (runs(falling, widths=(64, 128)), target_of(1024), "not enough widths"),
        (runs(falling, seeds=1), target_of(1024), "one seed"),
        (runs(falling), target_of(200), "lies between"),
        (runs(lambda w: 3.0 + w / 64), target_of(1024), "does not fall"),
        (runs(falling).assign(parametrization="sp"), target_of(1024), "no run of the target"),
        (runs(falling), target_of(1024, steps=400), "duration"),
        (runs(falling), target_of(1024, batch_size=32), "batch"),
        (runs(falling), target_of(1024, scale={"width": 1024, "depth": 8}), "depth"),
        (runs(falling), target_of(1024, provenance={}), "batch and duration"),
        (runs(falling).assign(loss=lambda f: f["loss"].where(f["seed"] > 0)), target_of(1024), "diverged"),
    ],
)
def test_without_evidence_nothing_is_told(frame, target, words):
    told = expected_loss(frame, -7.0, target)
    assert not told.known
    assert words in told.words
