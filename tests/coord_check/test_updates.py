"""The update of every parameter, alone and on its own input: measured right, judged, and named where it is off."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.coord_check import judge_coordinates, record, verdict
from mutransfer.coord_check.diagnosis import plant_in, relative_updates
from mutransfer.tracing.observe import observe

from ..helpers import families
from ..helpers.sets import extended_but
from .test_verdicts import HEALTHY, frame

WIDTHS = (64, 128, 256, 512)


def family(make: Any, batch: Any = None, **options: Any) -> mt.Family:
    return mt.Family(
        lambda s: make(s.width), batch or families.image_batch(4), families.loss, mt.Scale(16), "one", **options
    )


class Several(nn.Module):
    """Modules of several matrices: an LSTM, and attention whose last projection is a child's that never runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.gain = nn.Linear(8, width), nn.Parameter(torch.ones(width))
        self.attention = nn.MultiheadAttention(width, width // 8, batch_first=True)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.readout = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu_(self.input(x.flatten(1).unflatten(1, (8, 8))))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.readout(self.lstm(h * self.gain)[0].mean(1))


def test_updates_are_those_of_each_parameter_alone() -> None:
    """By hand: a module of the start, with one parameter put in from after the step, on the first pass's input."""
    made = family(Several)
    found = record(made, [16, 32], optimizer="sgd", lr=0.1, steps=1, seeds=[0])
    rows = found[found["statistic"].eq("update") & found["width"].eq(16)].set_index("module")["value"]

    plan = mt.plan(made, made.base, "mup", "sgd", mt.Recipe(lr=0.1, weight_decay=1e-6))
    before, after = made.build(made.base), made.build(made.base)
    for model in (before, after):
        plan.initialize(model, 0)
    optimizer = plan.make_optimizer(after)
    families.loss(after, made.batch).backward()
    optimizer.step()
    trained = dict(after.named_parameters())
    x = made.batch[0].flatten(1).unflatten(1, (8, 8))
    with torch.no_grad():
        h = torch.relu(before.input(x))
        mixed = h + before.attention(h, h, h, need_weights=False)[0]

    def alone(module: nn.Module, name: str, local: str, *args: Any, **options: Any) -> float:
        with torch.no_grad():
            first = module(*args, **options)
            again = torch.func.functional_call(module, {local: trained[name]}, args, options)
        first, again = (each[0] if isinstance(each, tuple) else each for each in (first, again))
        return float((again - first).abs().mean())

    for local in ("weight", "bias"):
        assert rows[f"input.{local}"] == pytest.approx(alone(before.input, f"input.{local}", local, x), rel=1e-4)
    for local in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        by_hand = alone(before.attention, f"attention.{local}", local, h, h, h, need_weights=False)
        assert rows[f"attention.{local}"] == pytest.approx(by_hand, rel=1e-3), local
    for local in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        assert rows[f"lstm.{local}"] == pytest.approx(alone(before.lstm, f"lstm.{local}", local, mixed), rel=1e-3), (
            local
        )
    assert rows["gain"] == pytest.approx(alone(before, "gain", "gain", made.batch[0]), rel=1e-3)
    # Against what entered: the attention's own input, not the model's.
    relative = relative_updates(found[found["width"].eq(16)]).set_index("module")["value"]
    entered = float(h.abs().mean())
    assert relative["attention.out_proj.weight"] == pytest.approx(rows["attention.out_proj.weight"] / entered, rel=1e-4)
    assert relative["lstm.bias_hh_l0"] == rows["lstm.bias_hh_l0"]  # a vector's update does not act on the input


class InPlace(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.act, self.readout = nn.Linear(64, width), nn.ReLU(inplace=True), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.act(self.input(x.flatten(1))))


class Copying(InPlace):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()


def test_an_activation_in_place_does_not_spoil_the_start() -> None:
    one, other = (record(family(make), [16, 32], seeds=range(2), steps=2) for make in (InPlace, Copying))
    pd.testing.assert_frame_equal(one, other)


class Dropping(nn.Module):
    """A module with a parameter of its own that draws a mask."""

    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, 0.5))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.second, self.readout = (
            self.Masked(64, width),
            self.Masked(width, width),
            nn.Linear(width, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.tanh(self.second(self.input(x.flatten(1)))))


@pytest.mark.parametrize("seeds", [1, 2])  # alone, and stacked under vmap
def test_a_mask_is_no_update(seeds: int) -> None:
    found = record(family(Dropping), [16, 32], optimizer="sgd", lr=1e-30, seeds=range(seeds), steps=1)
    assert (found[found["statistic"].isin(["update", "change"])]["value"] == 0).all()


def test_a_tied_matrix_is_measured_in_both_places() -> None:
    found = record(families.transformer(tied=True), [32, 64], steps=1, seeds=[0])
    roles = found[found["statistic"].eq("update")].set_index("module")["role"]
    assert set(roles["embedding.weight"]) == {"input"}
    assert set(roles["readout.weight"]) == {"output"}


def test_a_parameter_without_gradient_is_not_judged() -> None:
    """A bias before a batch norm: its gradient is rounding, of which Adam makes a step."""

    class Normed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.input, self.norm, self.readout = nn.Linear(64, width), nn.BatchNorm1d(width), nn.Linear(width, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.readout(torch.relu(self.norm(self.input(x.flatten(1)))))

    for optimizer in ("adamw", "sgd"):
        left = relative_updates(record(family(Normed), [16, 32], optimizer=optimizer, seeds=range(2), steps=1))
        assert "input.bias" not in set(left["module"])
        assert {"input.weight", "norm.bias", "readout.bias"} <= set(left["module"])


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "sgd"], "adamw"))
@pytest.mark.parametrize("power", [1, 0.5, -0.5, -1])
def test_a_wrong_rate_of_one_matrix_is_caught_and_named(power: float, optimizer: str) -> None:
    made = families.mlp(width=64, depth=4)
    planner = plant_in("hidden.1.weight", power, mt.plan)
    found = judge_coordinates(made, WIDTHS, "mup", optimizer, planner=planner, observation=observe(made)).verdict
    assert (found.status, found.fault) == ("fail", "one-parameter"), found.cause
    off = ("large" if power > 0 else "small") + " by width^" + ("1/2" if abs(power) < 1 else "1")
    assert str(found.cause).startswith(f"the learning rate of hidden.1.weight is too {off}: ")


def test_steps_are_in_units_of_mups_own_rate() -> None:
    """The first step is Adam's rate, or SGD's times the gradient, whatever that is: no seed varies, no width bends."""
    for optimizer in ("adamw", "sgd"):
        found = record(families.mlp(width=16), [16, 32, 64], "mup", optimizer, lr=2**-8, steps=2, seeds=range(2))
        steps = found[found["statistic"].eq("step")]
        few = {
            "hidden.0.weight",
            "hidden.1.weight",
            "readout.weight",
            "readout.bias",
        }  # whose update is not the step itself, or alone
        assert set(steps["module"]) == (
            few if optimizer == "adamw" else set(found[found["statistic"].eq("update")]["module"])
        )
        assert steps[steps["step"].eq(1)]["value"].to_numpy() == pytest.approx(2**-8, rel=1e-3)
    assert record(families.mlp(width=16), [16, 32], optimizer="muon", steps=1, seeds=[0])["statistic"].ne("step").all()


@pytest.mark.parametrize(("power", "size"), [(0, ""), (-0.5, "small"), (0.5, "large")])
def test_many_examples_in_narrow_models_are_not_taken_for_a_small_rate(power: float, size: str) -> None:
    """Their gradients are hardly aligned with the features, and ΔW·x falls; a rate that falls shows in the step itself."""
    made = families.mlp(width=16)
    made = mt.Family(made.build, families.image_batch(256), made.loss, made.base, "mlp")
    planner = plant_in("hidden.1.weight", power, mt.plan) if power else None
    found = verdict(record(made, [16, 32, 64, 128], lr=2**-8, steps=1, seeds=range(4), planner=planner))
    if not power:
        assert found.status in ("pass", "undecided"), found.cause
        return
    assert found.status == "fail"
    assert found.fault == "one-parameter"
    assert f"the learning rate of hidden.1.weight is too {size} by width^1/2" in str(found.cause)


def test_a_wrong_rate_of_one_gain_is_caught_and_named() -> None:
    made = families.transformer(width=32, depth=1, head_dim=8)
    planner = plant_in("blocks.0.norm2.weight", 0.5, mt.plan)
    found = verdict(record(made, [32, 64, 128], seeds=range(3), steps=1, planner=planner))
    assert (found.status, found.fault) == ("fail", "one-parameter"), found.cause
    assert "the learning rate of blocks.0.norm2.weight is too large by width^1/2" in str(found.cause)


def bending(coherent: float, widths: tuple[int, ...] = (32, 64, 128, 256), power: float = 0.0) -> pd.DataFrame:
    """A change of √(c² + 1/width), as in Adam's first steps: a share sums up coherently, the rest is noise that fades."""
    rows = frame(HEALTHY, widths=widths, noise=0.02)
    bent = rows["module"].eq("middle") & rows["statistic"].eq("change")
    size = rows["width"].astype(float)
    rows.loc[bent, "value"] *= np.sqrt(coherent**2 + 1 / size[bent]) * size[bent] ** power
    return rows


def test_a_transient_of_narrow_models_asks_for_wider_ones() -> None:
    found = verdict(bending(0.1))
    narrow = found.slopes.set_index(["module", "step"]).loc[("middle", 1)]
    assert narrow["high"] < -0.15  # what the slope alone would call broken
    assert (found.status, found.widen) == ("undecided", True)
    assert "sooner than more seeds do: add widths above 256" in str(found.cause)
    assert "width^-0." in str(found.cause)
    assert verdict(bending(0.14, (128, 256, 512, 1024))).status == "pass"


@pytest.mark.parametrize("power", [-0.5, 0.5, 1.0, -1.0])
def test_a_fault_beneath_a_transient_still_fails(power: float) -> None:
    assert verdict(bending(0.14, power=power)).status == "fail"


def test_a_slope_that_stays_fails() -> None:
    rows = bending(math.inf)  # no transient
    bent = rows["module"].eq("middle") & rows["statistic"].eq("change")
    rows.loc[bent, "value"] = (rows.loc[bent, "width"].astype(float)) ** -0.2
    assert verdict(rows).status == "fail"


@pytest.mark.parametrize("power", [0.0, -0.5, 0.5])
def test_what_fades_at_rates_that_are_right_waits_for_wider_models(power: float) -> None:
    """Experts' gates even out as models widen: a change that fades as the root of the width, at rates that are right."""
    rows = frame(HEALTHY, noise=0.02)
    bent = rows["module"].eq("middle") & rows["statistic"].eq("change")
    rows.loc[bent, "value"] = rows.loc[bent, "width"].astype(float) ** -0.45
    assert verdict(rows).status == "fail"  # no rate was seen
    steps = rows[bent & rows["step"].eq(1)].assign(statistic="step", role="hidden")
    steps["value"] = 2.0**-8 * steps["width"].astype(float) ** power
    found = verdict(pd.concat([rows, steps]))
    assert (found.status, found.widen) == (("undecided", True) if power == 0 else ("fail", False))


def test_more_seeds_are_not_asked_for_where_they_would_not_tell() -> None:
    rows = frame(HEALTHY, noise=0.02)
    edge = rows["module"].eq("middle") & rows["statistic"].eq("change")
    rows.loc[edge, "value"] *= rows.loc[edge, "width"].astype(float) ** -0.151
    found = verdict(rows)
    row = found.slopes.set_index(["module", "statistic", "step"]).loc[("middle", "change", 1)]
    assert row["low"] < -0.15 < row["high"]
    assert (found.status, found.widen) == ("undecided", True), found.slopes


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.ASGD])
def test_a_first_step_of_sgd_shows_its_rate_whatever_is_done_beside(kind: Any) -> None:
    """Weight decay and momentum take part in a step."""
    made = families.mlp(width=16)
    plan = mt.plan(made, made.base.with_(width=64), optimizer=kind.__name__.lower(), recipe=mt.Recipe(lr=0.25))
    model = made.build(plan.scale)
    plan.initialize(model, 0)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind([group | {"weight_decay": 0.5} for group in plan.param_groups(model)], **options)
    with mt.Recorder(model, optimizer, lambda m: m(made.batch[0]), plan=plan) as recorder:
        made.loss(model, made.batch).backward()
        optimizer.step()
    rows = recorder.frame()
    steps = rows[rows["statistic"].eq("step")].set_index("module")["value"]
    assert set(steps.index) == {row.name for row in plan.rows}
    assert steps.to_numpy() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "nadam", "adamax", "rmsprop", "adagrad"])
def test_a_first_step_shows_its_rate_where_epsilon_is_greater_than_the_gradients(optimizer: str) -> None:
    """As behind ConvNeXt's layer scale of 1e-6, where a step's largest entry grew as width^+0.14."""
    made = families.mlp(width=16)
    small = mt.Family(made.build, made.batch, lambda m, b: 1e-7 * made.loss(m, b), made.base, "mlp")
    found = record(small, [16, 32, 64], "mup", optimizer, lr=2**-8, steps=1, seeds=range(2))
    found = found[found["module"].eq("hidden.1.weight")]
    assert found[found["statistic"].eq("gradient")]["value"].lt(10).all()
    steps = found[found["statistic"].eq("step")]["value"].to_numpy()
    assert steps / steps[0] == pytest.approx(1.0, rel=1e-3)


def test_few_entries_that_do_not_grow_are_judged_by_their_rate() -> None:
    """A regression's one bias follows the mean error, whose size is noise at every width: 20 seeds left it at [-0.29, 0.22]."""
    made = mt.Family(
        lambda s: nn.Sequential(nn.Linear(6, s.width), nn.ReLU(), nn.Linear(s.width, 1)),
        (torch.randn(8, 6), torch.randn(8)),
        lambda m, b: (m(b[0])[:, 0] - b[1]).square().mean(),
        mt.Scale(32),
    )
    for optimizer in ("adamw", "sgd"):
        rows = verdict(record(made, [32, 64, 128], "mup", optimizer, seeds=range(3), steps=2)).slopes.set_index(
            "module"
        )
        (row,) = [row for _, row in rows.loc[["2.bias"]].iterrows() if row["statistic"] in ("step", "update")]
        assert (row["statistic"], row["ok"]) == ("step", True)


class Narrowed(nn.Module):
    """A branch through eight channels at any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.down, self.up = nn.Linear(16, width), nn.Linear(width, 8), nn.Linear(8, width)
        self.last = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.last(x + self.up(torch.tanh(self.down(x))))


@pytest.mark.parametrize("optimizer", extended_but(["adamw", "sgd"], "adamw"))
@pytest.mark.parametrize(
    ("name", "role"),
    [("up", "output"), ("up", "bottleneck"), ("down", "input"), ("first", "output"), ("last", "input")],
)
def test_a_role_that_is_wrong_fails(name: str, role: str, optimizer: str) -> None:
    """Its rate is that role's, exactly, and its first step shows no fault: what it does to the features does.

    What is called an output and is none fades as logits may, and a little more: that is open at times, and never passed.
    """
    made = mt.Family(
        lambda s: Narrowed(s.width), (torch.randn(8, 16), torch.randint(5, (8,))),
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), mt.Scale(64), roles={f"{name}.weight": role},
    )  # fmt: skip
    found = judge_coordinates(made, (64, 128, 256, 512), "mup", optimizer, seeds=5, steps=2).verdict
    open_too = (name, role, optimizer) == ("up", "output", "adamw")
    assert found.status in ("fail", *(["undecided"] if open_too else [])), found.cause


class SharedElsewhere(nn.Module):
    """T5's way: the matrix hangs on a module that never runs itself, and on one that does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared, self.tokens = nn.Embedding(11, width), nn.Embedding(11, width)
        self.tokens.weight = self.shared.weight
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, 11, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.readout(self.norm(self.tokens(x)))


def test_a_parameter_with_a_module_that_runs_is_measured_there_alone() -> None:
    """Else the whole model stood for it: the logits, which start as small as they like, failed T5 and BART."""
    tokens = torch.randint(11, (4, 5))
    made = mt.Family(
        lambda s: SharedElsewhere(s.width), (tokens, tokens),
        lambda m, b: nn.functional.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()), mt.Scale(32),
    )  # fmt: skip
    found = verdict(record(made, [32, 64, 128], seeds=range(4), steps=2))
    assert "(model)" not in set(found.slopes["module"])
    assert found.status != "fail", found.cause
