"""The coordinate check over depths: what is measured, what is drawn, and the claim about the built-in transformer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt
from mutransfer.cli import run
from mutransfer.coord_check import record
from mutransfer.coord_check.measure import places
from mutransfer.coord_check.verdicts import verdict
from mutransfer.reports.coord_check_figure import CoordinateFigure
from mutransfer.schemas import varying

from .helpers import families
from .helpers.sets import extended_but


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run(["check", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inside_of_layers_the_first_and_the_middle_are_compared() -> None:
    """What enters the middle has half of the branches in it at every even depth."""
    for depth in (2, 4, 8):
        family = families.transformer(depth=depth)
        model = family.build(family.base)
        shown = places(model, {f"blocks.{i}.norm1" for i in range(depth)} | {"norm"}, {"blocks": depth})
        assert shown == {
            "blocks.0": "blocks.first", "blocks.0.norm1": "blocks.first.norm1", f"blocks.{depth - 1}": "blocks.last",
            f"blocks.{depth // 2}.norm1": "blocks.middle.norm1", "norm": "norm",
        }  # fmt: skip


class Numbered(nn.Module):
    """Residual layers whose inside is numbered as well."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.input, self.readout = nn.Linear(64, width), nn.Linear(width, 10)
        inside = lambda: nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))  # noqa: E731
        self.blocks = nn.ModuleList(inside() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.readout(x)


class Layer(nn.Module):
    """A branch behind a norm, in one of the ways in which people end it."""

    def __init__(self, width: int, end: str) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.end = end
        if end == "zero":
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)
        if end == "gain":
            self.gain = nn.Parameter(torch.ones(width))
        if end == "parallel":
            self.other = nn.Linear(width, width)
        if end == "weight norm":
            nn.utils.parametrizations.weight_norm(self.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        made = self.down(F.gelu(self.up(h)))
        match self.end:
            case "dropout":
                return F.dropout(made, 0.1)
            case "factor":
                return 0.5 * made
            case "gain":
                return self.gain * made
            case "parallel":
                return made + self.other(h)
            case "transposed":
                return made.transpose(0, 1)
            case "in place":  # the same tensor as the branch was
                made += x
        return made


class Attending(nn.MultiheadAttention):
    """Attention as a layer of its own, whose last projection is never called as a module."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width // 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        h = F.layer_norm(x, x.shape[-1:])
        return super().forward(h, h, h, need_weights=False)[0]


class Outside(nn.Module):
    """Layers that return their branch, which the model adds to the stream, or that add it themselves."""

    def __init__(self, width: int, depth: int, end: str) -> None:
        super().__init__()
        self.embedding, self.norm, self.readout = nn.Embedding(11, width), nn.LayerNorm(width), nn.Linear(width, 11)
        make = Attending if end == "attention" else lambda width: Layer(width, end)
        self.layers = nn.ModuleList(make(width) for _ in range(depth))
        self.end = end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            if self.end == "in place":
                x = layer(x)
            else:
                branch = layer(x)
                x = x + (branch.transpose(0, 1) if self.end == "transposed" else branch)
        return self.readout(self.norm(x))


def tokens(end: str) -> mt.Family:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    batch = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    return mt.Family(lambda s: Outside(s.width, s.depth, end), batch, loss, mt.Scale(16, 2))


ENDS = ["", "dropout", "factor", "gain", "zero", "parallel", "transposed", "attention", "weight norm"]


@pytest.mark.parametrize("end", extended_but(ENDS, "", "attention"))
def test_a_layer_that_returns_its_branch_is_not_the_stream(end: str) -> None:
    """Its output falls as 1/depth, as CompleteP wants, and had failed healthy models."""
    frame = record(tokens(end), [], "completep", depths=[2, 4, 8, 16], seeds=range(5), steps=2)
    assert not {"layers.first", "layers.last"} & set(frame["module"])
    found = verdict(frame)
    assert found.status != "fail", found.cause
    if end != "zero":  # whose branches add nothing at first, at any depth
        assert verdict(record(tokens(end), [], "mup", depths=[2, 4, 8, 16], seeds=range(5), steps=2)).status == "fail"


class Matrices(nn.Module):
    """A feed-forward layer whose matrices are parameters of its own, as those of fused experts are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(2 * width, width) * (2 * width) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ self.up) @ self.down


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(width), Matrices(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.norm(x))


def test_a_module_that_owns_the_end_of_a_branch_is_compared_without_its_multiplier() -> None:
    build = lambda s: nn.Sequential(  # noqa: E731
        nn.Embedding(11, s.width), nn.Sequential(*(Block(s.width) for _ in range(s.depth))), nn.LayerNorm(s.width),
        nn.Linear(s.width, 11),
    )  # fmt: skip
    family = mt.Family(build, tokens("").batch, tokens("").loss, mt.Scale(16, 2))
    frame = record(family, [], "completep", depths=[2, 4, 8, 16], seeds=range(5), steps=2)
    assert {"1.first", "1.last", "1.first.ffn", "1.middle.ffn"} < set(frame["module"])
    found = verdict(frame)
    assert found.status != "fail", found.cause


def test_a_layer_that_adds_its_branch_is_the_stream() -> None:
    frame = record(tokens("in place"), [], "completep", depths=[2, 4, 8], seeds=[0], steps=1)
    assert {"layers.first", "layers.last"} < set(frame["module"])


def test_what_is_numbered_inside_of_a_layer_keeps_its_number() -> None:
    build = lambda s: Numbered(s.width, s.depth)  # noqa: E731
    family = mt.Family(build, families.image_batch(), families.loss, mt.Scale(16, 2), "numbered")
    frame = record(family, [], "completep", depths=[2, 4, 8], seeds=[0], steps=1)
    found = frame[frame["statistic"] == "activation"].groupby("module")["depth"].apply(set)
    assert {"blocks.first.0", "blocks.first.2", "blocks.middle.0", "blocks.middle.2"} <= set(found.index)
    assert found.map(lambda depths: depths == {2, 4, 8}).all()


def test_the_figure_has_the_depth_on_its_axis() -> None:
    frame = record(families.transformer(width=16, head_dim=8), [], "completep", depths=[2, 4], seeds=[0], steps=1)
    assert varying(frame) == "depth"
    figure = CoordinateFigure(frame, verdict(frame).slopes)
    drawn = figure.draw()
    assert drawn.get_supxlabel() == "depth"
    assert [text.get_text() for text in drawn.axes[-1].get_xticklabels()] == ["2", "4"]
    assert "against depth" in figure.caption


@pytest.mark.extended
def test_the_command_compares_depths_at_one_width(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = asked(
        capsys, "transformer", "--widths", "16", "--depths", "2,4,8", "--parametrization", "completep", "--control", "mup",
        "--data", "markov", "--seeds", "3", "--steps", "2",
    )  # fmt: skip
    assert (code == 0) == (found["verdict"] == "pass")
    assert found["control"]["verdict"] == "fail"
    assert "residual branches are not scaled with the depth" in found["control"]["cause"]
    assert {"blocks.first", "blocks.last", "blocks.middle.norm1"} <= {row["module"] for row in found["modules"]}
    assert set(found["modules"][0]) == {
        "parametrization", "module", "role", "statistic", "step", "slope", "low", "high", "expected", "declared", "ok",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "resnet"])
@pytest.mark.parametrize(("parametrization", "code"), [("completep", 0), ("mup", 1)])
def test_completep_passes_and_mup_fails(
    model: str, parametrization: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = asked(capsys, model, "--depths", "2,4,8,16,32", "--parametrization", parametrization)
    assert found[0] == code, found[1]["cause"]
