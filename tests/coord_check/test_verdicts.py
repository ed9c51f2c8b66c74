"""The coordinate check's judgement, on frames whose slopes were planted, and on small models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.coord_check import record
from mutransfer.coord_check.measure import module_roles
from mutransfer.coord_check.verdicts import MARGIN, verdict
from mutransfer.errors import RequestError
from mutransfer.recipe import Scale
from mutransfer.schemas import COORDINATES, SLOPES

from ..helpers import families

WIDTHS = (64, 128, 256, 512)
# (module, role) → slope of the activation and of the change
HEALTHY = {("first", "input"): (0, 0), ("middle", "feature"): (0, 0), ("readout", "output"): (-0.5, -0.25)}


def frame(
    slopes: Mapping[tuple[str, str], tuple[float, float]] = HEALTHY,
    *,
    widths: tuple[int, ...] = WIDTHS,
    seeds: int = 5,
    noise: float = 0.01,
    seed: int = 0,
    **common: Any,
) -> pd.DataFrame:
    """Power laws of the width; ``noise`` is the spread in octaves at the smallest width and falls as width^-1/2."""
    generator = np.random.default_rng(seed)
    rows = []
    for width in widths:
        for i in range(seeds):
            for step in range(3):
                for (module, role), (activation, change) in slopes.items():
                    octaves = (change if step else activation) * math.log2(width / widths[0])
                    octaves += noise * (widths[0] / width) ** 0.5 * generator.standard_normal()
                    rows.append(
                        {
                            "parametrization": "mup",
                            "optimizer": "adamw",
                            "module": module,
                            "role": role,
                            "statistic": "change" if step else "activation",
                            "step": step,
                            "seed": i,
                            "width": width,
                            "depth": 3,
                            "value": 0.3 * 2**octaves,
                        }
                        | common
                    )
    return COORDINATES.frame(rows)


def planted(module: str, role: str, activation: float, change: float) -> dict[tuple[str, str], tuple[float, float]]:
    return HEALTHY | {(module, role): (activation, change)}


def test_healthy_slopes_pass() -> None:
    found = verdict(frame())
    assert (found.status, found.cause) == ("pass", None)
    assert list(found.slopes) == list(SLOPES.columns)
    assert found.slopes["ok"].all()
    assert len(found.slopes) == 9  # three modules, at initialization, after the first and the last step


@pytest.mark.parametrize(
    ("module", "role", "activation", "change", "words"),
    [
        (
            "middle",
            "feature",
            0.5,
            0,
            "the activation of middle goes as width^+0.50 where 0..0 is healthy, so its initial",
        ),
        ("middle", "feature", -0.5, 0, "the activation of middle goes as width^-0.50"),
        (
            "middle",
            "feature",
            0,
            1,
            "the change of middle goes as width^+1.00 where 0..0 is healthy, so its learning rate",
        ),
        (
            "middle",
            "feature",
            0,
            -0.4,
            "the change of middle goes as width^-0.40 where 0..0 is healthy, so its updates shrink",
        ),
        ("first", "input", 0, -0.5, "the change of first goes as width^-0.50"),
        ("readout", "output", 0.3, 0, "the activation of readout goes as width^+0.30 where -inf..0 is healthy"),
        ("readout", "output", 0, 0.3, "the change of readout goes as width^+0.30 where -0.5..0 is healthy"),
        ("readout", "output", 0, -1, "the change of readout goes as width^-1.00 where -0.5..0 is healthy"),
    ],
)
def test_a_broken_slope_fails_and_names_its_module(
    module: str, role: str, activation: float, change: float, words: str
) -> None:
    found = verdict(frame(planted(module, role, activation, change)))
    assert found.status == "fail"
    assert words in str(found.cause)
    assert str(found.cause).endswith(f"failing: {module}.")
    failed = found.slopes[found.slopes["ok"] == False]  # noqa: E712
    assert set(failed["module"]) == {module}


@pytest.mark.parametrize("logits", [-3.0, -0.5, -0.2, 0.0])
def test_logits_may_start_as_small_as_they_like(logits: float) -> None:
    assert verdict(frame(planted("readout", "output", logits, 0))).status == "pass"


def test_the_margin_is_the_whole_intervals() -> None:
    """Inside by the whole interval: pass. Outside by the whole interval: fail. In between: undecided."""
    for slope, status in [(0.1, "pass"), (-0.1, "pass"), (0.2, "fail"), (-0.2, "fail"), (MARGIN, "undecided")]:
        assert verdict(frame(planted("middle", "feature", 0, slope))).status == status
    assert verdict(frame(planted("middle", "feature", 0, 0.2)), margin=0.3).status == "pass"
    assert verdict(frame(planted("middle", "feature", 0, 0.1)), margin=0.05).status == "fail"


def test_noise_without_seeds_is_undecided() -> None:
    found = verdict(frame(seeds=1, noise=0.8))
    assert found.status == "undecided"
    assert "not enough evidence for" in str(found.cause)
    assert "add seeds (now 1) or widths (now 4)" in str(found.cause)
    assert verdict(frame(seeds=200, noise=0.8)).status == "pass"


def test_two_points_have_no_interval() -> None:
    found = verdict(frame(seeds=1, widths=(64, 128)))
    assert found.status == "undecided"
    assert np.isinf(found.slopes["low"]).all()
    assert np.isinf(found.slopes["high"]).all()


def test_a_zero_readout_passes() -> None:
    coordinates = frame()
    coordinates.loc[(coordinates["module"] == "readout") & (coordinates["step"] == 0), "value"] = 0.0
    found = verdict(coordinates)
    assert found.status == "pass"
    assert math.isnan(found.slopes.set_index(["module", "step"]).loc[("readout", 0), "slope"])


def test_a_feature_that_starts_at_zero_passes() -> None:
    """Such as LoRA's B, or Swin's table of positions: it has to move, which the last step says."""
    coordinates = frame()
    coordinates.loc[(coordinates["module"] == "middle") & (coordinates["step"] == 0), "value"] = 0.0
    assert verdict(coordinates).status == "pass"


def test_a_dead_feature_does_not() -> None:
    coordinates = frame()
    coordinates.loc[(coordinates["module"] == "middle") & (coordinates["step"] > 0), "value"] = 0.0
    assert verdict(coordinates).status == "undecided"
    coordinates = frame()
    dead = (coordinates["module"] == "readout") & (coordinates["step"] == 0) & (coordinates["width"] == 512)
    coordinates.loc[dead, "value"] = 0.0  # zero at one width only is no zero readout
    assert verdict(coordinates).status == "undecided"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    coordinates = frame()
    one = (coordinates["module"] == "middle") & (coordinates["step"] == 2) & (coordinates["width"] == 512)
    coordinates.loc[one & (coordinates["seed"] == 0), "value"] = value
    found = verdict(coordinates)
    assert found.status == "fail"
    assert "middle is not finite" in str(found.cause)
    assert "lower --lr" in str(found.cause)


def test_one_width_and_two_parametrizations_are_refused() -> None:
    coordinates = frame()
    with pytest.raises(RequestError, match="a slope needs at least two widths"):
        verdict(coordinates[coordinates["width"] == 64])
    both = pd.concat([coordinates, frame(parametrization="sp")])
    with pytest.raises(RequestError, match=r"the frame holds \['mup', 'sp'\]: filter it first"):
        verdict(both)
    for widths in ([64], [64, 64], []):
        with pytest.raises(RequestError, match="a slope needs at least two widths"):
            record(families.mlp(), widths)
    for options in ({"steps": 0}, {"seeds": []}):
        with pytest.raises(RequestError, match="give at least one of each"):
            record(families.mlp(), [32, 64], **options)


def test_the_order_of_widths_and_seeds_does_not_matter() -> None:
    coordinates = frame(planted("middle", "feature", 0.3, 0.1), noise=0.3)
    one, other = (
        verdict(coordinates),
        verdict(coordinates.sort_values(["width", "seed"], ascending=False, kind="stable")),
    )
    assert one.status == other.status
    assert one.cause == other.cause
    key = ["module", "statistic", "step"]
    one_sorted, other_sorted = (v.slopes.sort_values(key).reset_index(drop=True) for v in (one, other))
    pd.testing.assert_frame_equal(one_sorted, other_sorted, rtol=1e-9)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.31, 1.0])
def test_a_planted_power_law_is_recovered_exactly(slope: float) -> None:
    found = verdict(frame(planted("middle", "feature", slope, slope), noise=0)).slopes
    middle = found[found["module"] == "middle"]
    for column in ("slope", "low", "high"):
        assert middle[column].to_numpy() == pytest.approx(slope, abs=1e-9)


def test_wide_models_weigh_more() -> None:
    """Least squares weighted by width, as numpy does it (whose weights multiply residuals, not their squares)."""
    coordinates = frame(noise=0.5)
    slopes = verdict(coordinates).slopes.set_index(["module", "step"])["slope"]
    for key, group in coordinates.groupby(["module", "step"]):
        x, y = np.log2(group["width"].astype(float)), np.log2(group["value"])
        assert slopes[key] == pytest.approx(np.polyfit(x, y, 1, w=group["width"] ** 0.5)[0], abs=1e-9)


@pytest.mark.extended
def test_intervals_cover_the_true_slope() -> None:
    """95% intervals over 300 noisy frames; 0.90 is four standard errors below."""
    noisy = [verdict(frame(noise=0.4, seeds=3, seed=i)).slopes for i in range(300)]
    found = pd.concat([slopes[(slopes["module"] == "middle") & (slopes["step"] == 0)] for slopes in noisy])
    covered = ((found["low"] <= 0) & (found["high"] >= 0)).mean()
    assert 0.90 <= covered <= 0.985
    assert found["slope"].mean() == pytest.approx(0, abs=0.02)


def test_expected_is_health_and_declared_is_the_tables() -> None:
    slopes = verdict(frame(parametrization="sp", optimizer="sgd")).slopes.set_index(["module", "statistic", "step"])
    assert slopes.loc[("first", "change", 1), ["expected", "declared"]].tolist() == ["0..0", "-0.5..-0.5"]
    assert slopes.loc[("middle", "change", 1), ["expected", "declared"]].tolist() == ["0..0", "0.5..0.5"]
    assert slopes.loc[("readout", "change", 1), ["expected", "declared"]].tolist() == ["-0.5..0", "1..1"]
    assert slopes.loc[("readout", "activation", 0), ["expected", "declared"]].tolist() == ["-inf..0", "0..0"]


def test_a_record_holds_every_module_seed_and_step() -> None:
    calls: list[tuple[int, int]] = []
    family = families.mlp(width=16)
    coordinates = record(family, [32, 16, 32], steps=2, seeds=[3, 4], progress=lambda *call: calls.append(call))
    assert set(coordinates["width"]) == {16, 32}
    assert set(coordinates["seed"]) == {3, 4}
    modules = {"input", "hidden.0", "hidden.1", "readout"}
    of_modules = coordinates[coordinates["module"].isin(modules)]
    assert set(coordinates["module"]) == modules | {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    sizes = of_modules[of_modules["statistic"].isin(["activation", "change"])]
    assert len(sizes) == 2 * 2 * 3 * 4
    assert sizes.groupby(["module", "width", "seed"])["step"].apply(list).eq([[0, 1, 2]] * 16).all()
    assert calls == [(0, 4), (2, 4), (4, 4)]  # both seeds of a width at once
    again = record(family, [16, 32], steps=2, seeds=[3, 4])
    pd.testing.assert_frame_equal(coordinates, again)


def test_a_change_is_measured_from_the_start() -> None:
    """The change after a step, by hand: mean |x_1 − x_0| of the readout on the family's batch."""
    family = families.mlp(width=16)
    coordinates = record(family, [16, 32], steps=1, seeds=[0], optimizer="sgd", lr=0.1)
    plan = mt.plan(family, family.base, "mup", "sgd", mt.Recipe(lr=0.1))
    model = family.build(plan.scale)
    plan.initialize(model, 0)
    optimizer = plan.make_optimizer(model)
    before = model(family.batch[0]).detach()
    families.loss(model, family.batch).backward()
    optimizer.step()
    of_readout = coordinates["module"].eq("readout") & coordinates["statistic"].isin(["activation", "change"])
    readout = coordinates[of_readout & (coordinates["width"] == 16)].set_index("step")["value"]
    assert readout[0] == pytest.approx(before.abs().mean().item(), rel=1e-6)
    assert readout[1] == pytest.approx((model(family.batch[0]) - before).abs().mean().item(), rel=1e-5)


def test_a_tied_readouts_module_is_an_output() -> None:
    family = families.transformer(tied=True)
    roles = module_roles(family.build(family.base), mt.plan(family, family.base))
    assert {module for module, role in roles.items() if role == "output"} == {"readout"}
    assert (roles["embedding"], roles["norm"]) == ("input", "vector")
    assert "blocks.0" not in roles  # owns no parameters


def test_the_whole_model_is_recorded_under_a_name() -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.gain = nn.Linear(64, width), nn.Parameter(torch.ones(width))
            self.readout = nn.Linear(width, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.readout(self.up(x.flatten(1)) * self.gain)

    family = mt.Family(lambda s: Scaled(s.width), families.image_batch(), families.loss, Scale(16))
    assert {"up", "readout", "(model)"} <= set(record(family, [16, 32], steps=1, seeds=[0])["module"])


def test_an_output_with_a_bias_is_an_output() -> None:
    family = families.mlp()
    roles = module_roles(family.build(family.base), mt.plan(family, family.base))
    assert roles == {"input": "input", "hidden.0": "hidden", "hidden.1": "hidden", "readout": "output"}


@pytest.mark.parametrize(("parametrization", "status"), [("mup", "pass"), ("sp", "fail")])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_mup_passes_and_sp_fails(optimizer: str, parametrization: str, status: str) -> None:
    found = verdict(record(families.mlp(width=64), WIDTHS, parametrization, optimizer, seeds=range(5)))
    assert found.status == status, found.cause
    if status == "fail":
        assert "readout" in str(found.cause)


def test_a_training_that_blows_up_fails() -> None:
    found = verdict(record(families.mlp(width=16), [16, 32], "mup", "sgd", lr=1e30, seeds=[0]))
    assert found.status == "fail"
    assert "not finite" in str(found.cause)


def test_modules_that_return_tuples_are_measured() -> None:
    class Recurrent(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = Pair(nn.Linear(8, width))
            self.readout = nn.Linear(width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, _ = self.first(x)
            return self.readout(h)

    class Pair(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.relu(x @ self.weight.T + self.bias), None

    family = mt.Family(lambda s: Recurrent(s.width), torch.ones(2, 8), lambda m, x: m(x).square().mean(), Scale(16))
    assert {"first", "readout"} <= set(record(family, [16, 32], seeds=[0], steps=1)["module"])


@pytest.mark.parametrize(("ratio", "judged"), [(0.5, True), (30.0, False)])
def test_epsilon_is_judged_where_it_is_felt(ratio: float, judged: bool) -> None:
    """A wide interval of |gradient| / epsilon is a question where epsilon is as large, and none where it cannot bend a step."""
    rows = frame({("blocks.weight", "hidden"): (0, 0)}, noise=2.5, statistic="gradient", step=0)
    rows["value"] *= ratio / rows["value"].min()
    found = verdict(pd.concat([frame(), rows], ignore_index=True))
    assert ("gradient" in set(found.slopes["statistic"])) == judged
    assert found.status == ("undecided" if judged else "pass")
