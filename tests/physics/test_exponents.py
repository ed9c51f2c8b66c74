"""A claimed exponent is a tested exponent: every table shows the slopes that it declares.

The claims are about large widths and small steps. So the learning rates here are small, the multilayer perceptron has few
inputs (8: with 64 the first layer's incoherent part bends the hidden slopes of SP under SGD down to 0.35), no biases at the
readout (they do not fall with width) and hidden layers that keep the size of their input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer import coordinates
from mutransfer.coordinates import record
from mutransfer.proxies.models import MLP
from mutransfer.scale import Scale
from mutransfer.tables import MUP, TABLES
from mutransfer.verdicts import MARGIN, verdict

from .. import families

WIDTHS = (64, 128, 256, 512, 1024)
LR = {"adamw": 2**-14, "sgd": 2**-10}


def mlp() -> mt.Family:
    """Three He-initialized layers and a small readout; constant biases."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(32, 8, generator=generator), torch.randint(10, (32,), generator=generator)

    def build(scale: Scale) -> nn.Module:
        model = MLP(8, scale.width, scale.depth, 10)
        for layer in (model.input, *model.hidden, model.readout):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if layer is not model.readout else "linear")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            model.readout.weight.mul_(0.3)
        return model

    return mt.Family(build, batch, families.loss, Scale(64, 3), "mlp")


def resnet() -> mt.Family:
    """The built-in one with its readout's bias at 0."""
    plain = families.resnet(width=64)

    def build(scale: Scale) -> nn.Module:
        model: Any = plain.build(scale)
        nn.init.zeros_(model.readout.bias)
        return model

    return mt.Family(build, plain.batch, plain.loss, plain.base, "resnet")


def measured(
    family: mt.Family, widths: tuple[int, ...] = WIDTHS, *args: Any, steps: int = 1, **options: Any
) -> pd.DataFrame:
    """Slopes of all modules that multiply by a matrix: norms only pass on what enters them."""
    slopes = verdict(record(family, widths, *args, steps=steps, **options)).slopes
    matrices = {name.rpartition(".")[0] for name, p in family.build(family.base).named_parameters() if p.dim() > 1}
    tied = {"readout"}
    return slopes[slopes["module"].isin(matrices | tied)]


def outside(slopes: pd.DataFrame) -> list[str]:
    """What lies outside its declared band by more than the margin, interval and all."""
    wrong = []
    for row in slopes.itertuples():
        low, high = map(float, str(row.declared).split(".."))
        if not (low - MARGIN <= row.low and row.high <= high + MARGIN):  # type: ignore[operator]
            wrong.append(
                f"{row.module} {row.statistic} {row.step}: [{row.low:.3f}, {row.high:.3f}], not {row.declared}"
            )
    return wrong


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("parametrization", ["mup", "sp"])
def test_the_mlp_shows_what_the_table_declares(parametrization: str, optimizer: str) -> None:
    slopes = measured(mlp(), WIDTHS, parametrization, optimizer, lr=LR[optimizer], seeds=range(8))
    assert len(slopes) == 8
    assert outside(slopes) == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("parametrization", ["mup", "sp"])
@pytest.mark.parametrize("name", ["transformer", "grouped", "gelu", "resnet"])
def test_larger_models_show_what_the_table_declares(name: str, parametrization: str, optimizer: str) -> None:
    family, widths, seeds = {
        "transformer": (families.transformer(width=128), (128, 256, 512, 1024), 6),
        "grouped": (families.transformer(width=128, kv_share=2), (128, 256, 512, 1024), 6),
        "gelu": (families.transformer(width=128, ffn="gelu", qk_norm=True), (128, 256, 512, 1024), 6),
        # its logits are an average over the image, alike for all examples: few independent numbers, so many seeds. With
        # 8 norm groups widths below 64 are far from the limit (hidden change +0.14 over 32..256 with SGD)
        "resnet": (resnet(), (64, 128, 256, 512), 24),
    }[name]
    slopes = measured(family, widths, parametrization, optimizer, lr=LR[optimizer], seeds=range(seeds))
    assert outside(slopes) == []


def with_large_eps(monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    """Let `record` plan with an epsilon far above the gradients, scaled by the table or left as it is."""
    right = coordinates.plan

    def plan(
        family: mt.Family, scale: Scale, parametrization: str, optimizer: str, recipe: mt.Recipe, **options: Any
    ) -> mt.Plan:
        planned = right(family, scale, parametrization, optimizer, recipe.with_(eps=1e-2), **options)
        if scaled:
            return planned
        return replace(planned, rows=tuple(replace(row, eps=1e-2) for row in planned.rows))

    monkeypatch.setattr(coordinates, "plan", plan)


def hidden_changes(**options: Any) -> pd.Series:
    slopes = measured(mlp(), WIDTHS, "mup", "adamw", seeds=range(4), **options)
    found = slopes[(slopes["statistic"] == "change") & (slopes["role"] == "feature")]
    return found.set_index("module")["slope"]


def test_epsilon_is_scaled_with_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        with_large_eps(patch, scaled=True)
        assert hidden_changes(lr=2**-8).abs().max() <= 0.08
    with_large_eps(monkeypatch, scaled=False)
    assert hidden_changes(lr=2**-8).max() <= -0.4


def multi_query(**options: Any) -> pd.DataFrame:
    """Keys and values of one fixed head: growing fan-in, fixed fan-out, and no logits."""
    family = families.transformer(width=64, depth=1, kv_heads=1)
    slopes = measured(family, (64, 128, 256, 512), "mup", "adamw", lr=2**-12, seeds=range(6), **options)
    return slopes[slopes["module"].str.endswith(("attention.k", "attention.v"))]


def test_a_bottleneck_is_a_feature_not_a_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outside(multi_query()) == []
    as_logits = replace(MUP, rows=MUP.rows | {"bottleneck": MUP.rows["output"]})
    monkeypatch.setitem(TABLES, "mup", as_logits)
    wrong = multi_query()
    assert wrong[wrong["statistic"] == "activation"]["slope"].to_list() == pytest.approx([-0.5, -0.5], abs=0.1)


def test_a_broken_exponent_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden learning rates that do not shrink: the slopes leave the declared band."""
    rows = MUP.rows | {"hidden": replace(MUP.rows["hidden"], adam=TABLES["sp"].rows["hidden"].adam)}
    monkeypatch.setitem(TABLES, "mup", replace(MUP, rows=rows, declared={}))
    slopes = measured(mlp(), WIDTHS, "mup", "adamw", lr=LR["adamw"], seeds=range(4))
    monkeypatch.undo()
    changes = slopes[(slopes["statistic"] == "change") & slopes["module"].str.startswith("hidden")]
    assert (changes["low"] > 0.5).all()
