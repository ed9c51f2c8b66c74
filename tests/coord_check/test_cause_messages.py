"""What cannot be measured or judged gets an answer in words, never a slope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.coord_check import record, verdict
from mutransfer.coord_check.diagnosis import cause

from ..helpers import families

WIDTHS = [16, 32, 64]


def family(make: Any, **options: Any) -> mt.Family:
    return mt.Family(lambda s: make(s.width), families.image_batch(4), families.loss, mt.Scale(16), "odd", **options)


class Idle(nn.Module):
    """A layer that the example batch does not reach."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.unused, self.readout = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.relu(self.input(x.flatten(1))))


def test_a_module_that_never_runs_is_named() -> None:
    with pytest.warns(UserWarning, match="unused of odd gave no floating-point output on the example batch"):
        frame = record(
            family(Idle, roles={"unused.weight": "hidden", "unused.bias": "vector"}), WIDTHS, seeds=[0], steps=1
        )
    assert "unused" not in set(frame["module"])


class Borrowed(Idle):
    """A layer that is never called: its weight is used by the forward of the whole, as in Mamba's fused projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(nn.functional.linear(torch.relu(self.input(x.flatten(1))), self.unused.weight))


def test_a_module_whose_weight_is_used_elsewhere_is_not_called_idle() -> None:
    # warnings are errors here
    frame = record(family(Borrowed, roles={"unused.bias": "vector"}), WIDTHS, seeds=[0], steps=1)
    assert "unused.weight" in set(frame["module"])


class Boxed(nn.Module):
    """Modules that return a dictionary and a tuple; the sizes are those of the first floating tensor in it."""

    class Dict(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return {"ids": torch.arange(3), "hidden": super().forward(x)}

    class Pair(nn.Linear):
        def forward(self, x: Any) -> Any:
            return (None, super().forward(x["hidden"])), 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.readout = self.Dict(64, width), self.Pair(width, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.tanh(self.second(self.first(x.flatten(1)))[0][1]))


class Plain(Boxed):
    """The same without boxes."""

    class Dict(nn.Linear):
        pass

    class Pair(nn.Linear):
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.tanh(self.second(self.first(x.flatten(1)))))


def test_outputs_in_dictionaries_and_tuples_are_measured() -> None:
    boxed, plain = (record(family(make), WIDTHS, seeds=range(2), steps=2) for make in (Boxed, Plain))
    assert boxed["value"].to_numpy() == pytest.approx(plain["value"].to_numpy(), rel=1e-6)
    assert list(boxed["module"]) == list(plain["module"])


class Constant(nn.Module):
    """A layer whose gradient is cut off: its output never changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.readout = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.relu(self.input(x.flatten(1)).detach()))


def test_an_activation_that_never_changes_is_undecided_and_says_why() -> None:
    found = verdict(record(family(Constant), [16, 32, 64, 128], seeds=range(5)))
    assert found.status == "undecided"
    assert "no slope for the change of input: it is exactly 0" in str(found.cause)
    assert "gets no gradient" in str(found.cause)
    assert (
        found.slopes[found.slopes["module"].eq("input") & found.slopes["statistic"].eq("change")]["slope"].isna().all()
    )


class Exploding(nn.Module):
    """Infinite from width 64 on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.readout, self.width = nn.Linear(64, width), nn.Linear(width, 10), width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.input(x.flatten(1)))
        return self.readout(h / (0.0 if self.width == 64 else 1.0))


def test_nan_activations_fail_and_are_named() -> None:
    found = verdict(record(family(Exploding), WIDTHS, seeds=range(3), planner=_unfolded))
    assert found.status == "fail"
    assert "readout is not finite at some width" in str(found.cause)


def _unfolded(family: mt.Family, scale: mt.Scale, *given: Any, **options: Any) -> mt.Plan:
    return mt.plan(family, scale, *given, **options)


def test_one_seed_says_what_to_add() -> None:
    found = verdict(record(families.mlp(width=16), [16, 32], seeds=[0], steps=1))
    assert found.status == "undecided"
    assert "add seeds (now 1) or widths (now 2)" in str(found.cause)


def test_widths_out_of_order_and_twice_are_sorted_out() -> None:
    frames = [
        record(families.mlp(width=16), widths, seeds=[0, 1], steps=1) for widths in ([64, 16, 32, 16], [16, 32, 64])
    ]
    assert frames[0].equals(frames[1])
    with pytest.raises(mt.RequestError, match="a slope needs at least two widths"):
        record(families.mlp(width=16), [16, 16])


def test_the_assertion_passes_and_explains() -> None:
    check = mt.assert_coordinates_hold(families.mlp(width=64), seeds=5)
    assert check.verdict.status == "pass"
    assert set(check.coordinates["width"]) == {64, 128, 256, 512}
    with pytest.raises(AssertionError) as caught:
        mt.assert_coordinates_hold(families.mlp(width=64), parametrization="sp")
    text = str(caught.value)
    assert text.startswith("the verdict of the coordinate check of mlp is fail: the standard parametrization")
    assert "readout" in text.splitlines()[-1] + text.splitlines()[-2]
    with pytest.raises(AssertionError, match="is undecided: not enough evidence"):
        mt.assert_coordinates_hold(families.mlp(width=16), [16, 32], seeds=1, patience=1, steps=1)


def test_a_fixed_rank_is_named_beside_the_learning_rate() -> None:
    """Its updates do not average out in the first steps, which looks like a rate that is too large."""
    frame = record(families.mlp(), WIDTHS, seeds=[0, 1, 2], steps=1)
    slopes = verdict(frame).slopes.assign(ok=True)
    row = slopes[slopes["statistic"].eq("change") & slopes["module"].eq("input")].index[0]
    slopes.loc[row, ["role", "slope", "ok"]] = ["bottleneck", 0.18, False]
    said, fault = cause(slopes, frame, "width")
    assert "its fixed number of outputs is the cause" in said
    assert fault is None
    slopes.loc[row, "role"] = "hidden"
    assert "so its learning rate does not shrink with width" in cause(slopes, frame, "width")[0]
