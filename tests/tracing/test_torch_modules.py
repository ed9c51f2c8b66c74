"""torch's own composite modules as they come: copied layers, fused kernels, whole transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mutransfer as mt
from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.tracing.observe import observe

TOKENS = torch.zeros(2, 5, dtype=torch.long)


class Around(nn.Module):
    """Embedding, ``middle``, readout."""

    def __init__(self, width: int, middle: nn.Module, apply: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.middle = middle
        self.readout = nn.Linear(width, 11, bias=False)
        self.apply_middle = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.apply_middle(self.middle, self.embedding(x)))


def family(make: Callable[[int], nn.Module], apply: Callable[..., torch.Tensor] = lambda m, x: m(x)) -> Family:
    return Family(
        lambda s: Around(s.width, make(s.width), apply), TOKENS, lambda model, x: model(x).square().mean(), Scale(16)
    )


def by_shape(of: Family) -> dict[str, set[tuple[int, str]]]:
    """(Number of axes, role) of everything in the middle, by the last part of the name."""
    found: dict[str, set[tuple[int, str]]] = {}
    for name, spec in observe(of).specs.items():
        if name.startswith("middle"):
            found.setdefault(name.rpartition(".")[2], set()).add((len(spec.shape), spec.role))
    return found


def layer(n: int, **more: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(n, n // 4, 2 * n, batch_first=True, **more)


TRANSFORMER = {
    "in_proj_weight": {(2, "hidden")},
    "in_proj_bias": {(1, "vector")},
    "weight": {(2, "hidden"), (1, "vector")},
    "bias": {(1, "vector")},
}


@pytest.mark.parametrize(
    ("make", "apply"),
    [
        (lambda n: nn.TransformerEncoder(layer(n), 2), lambda m, x: m(x)),
        (
            lambda n: nn.TransformerEncoder(layer(n, norm_first=True), 3, nn.LayerNorm(n), enable_nested_tensor=False),
            lambda m, x: m(x),
        ),
        (lambda n: nn.Transformer(n, n // 4, 2, 2, 2 * n, batch_first=True), lambda m, x: m(x, x)),
    ],
    ids=["encoder", "pre-norm encoder", "transformer"],
)
def test_whole_transformers(make: Callable[[int], nn.Module], apply: Callable[..., torch.Tensor]) -> None:
    """They deepcopy their layer in the constructor, and so does each of its copies get its own settings."""
    of = family(make, apply)
    assert by_shape(of) == TRANSFORMER
    rows = {row.name: row for row in mt.plan(of, Scale(64)).rows if "in_proj_weight" in row.name}
    assert len(rows) >= 2
    assert {(row.m_in, row.m_out, row.init_factor, row.lr_factor) for row in rows.values()} == {(4, 4, 0.5, 0.25)}


def test_a_copied_layer_starts_as_its_original_was_drawn() -> None:
    def make(n: int) -> nn.Module:
        first = nn.Linear(n, n)
        nn.init.normal_(first.weight, std=0.25)
        second = copy.deepcopy(first)
        nn.init.normal_(second.bias, std=0.5)
        return nn.Sequential(first, second)

    specs = observe(family(make)).specs
    assert specs["middle.1.weight"].init.std == specs["middle.0.weight"].init.std == 0.25
    assert specs["middle.1.bias"].init.std == 0.5 != specs["middle.0.bias"].init.std


def test_a_copy_keeps_ties_and_what_hangs_on_its_parameters() -> None:
    def make(n: int) -> nn.Module:
        tied = nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False))
        tied[1].weight = tied[0].weight
        tied[0].weight.frozen = True
        tied[1].requires_grad_(False)
        both = copy.deepcopy(nn.ModuleList([tied, nn.Linear(n, n)]))
        assert both[0][0].weight is both[0][1].weight is not tied[0].weight
        assert both[0][0].weight.frozen
        assert isinstance(both[0][0].weight, nn.Parameter)
        return both

    specs = observe(family(make, lambda m, x: m[1](m[0](x)))).specs
    assert {name for name in specs if name.startswith("middle")} == {"middle.1.weight", "middle.1.bias"}


def test_an_encoder_that_is_evaluated() -> None:
    """Without gradients it would run as one kernel; and the kernel's switch is left as it was."""
    assert by_shape(family(lambda n: nn.TransformerEncoder(layer(n), 2).eval())) == TRANSFORMER
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled
    weights = {"in_proj_weight": {(2, "hidden")}, "in_proj_bias": {(1, "vector")}}
    attention = family(lambda n: nn.MultiheadAttention(n, n // 4, batch_first=True).eval(), lambda m, x: m(x, x, x)[0])
    assert by_shape(attention) == weights | {"weight": {(2, "hidden")}, "bias": {(1, "vector")}}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrences(kind: Callable[..., nn.Module]) -> None:
    of = family(lambda n: kind(n, n, batch_first=True), lambda m, x: m(x)[0])
    matrix, bias = {(2, "hidden")}, {(1, "vector")}
    assert by_shape(of) == {"weight_ih_l0": matrix, "weight_hh_l0": matrix, "bias_ih_l0": bias, "bias_hh_l0": bias}


class Scaled(nn.Module):
    """Applies a function of the activations and one number per channel."""

    def __init__(self, width: int, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.gain, self.function = nn.Parameter(torch.ones(width)), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.gain)


def over_channels(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("make", "apply", "roles"),
    [
        (nn.PReLU, over_channels, {"weight": {(1, "vector")}}),
        (lambda n: nn.PReLU(), lambda m, x: m(x), {"weight": {(1, "finite")}}),
        (
            lambda n: nn.InstanceNorm1d(n, affine=True),
            over_channels,
            {"weight": {(1, "vector")}, "bias": {(1, "vector")}},
        ),
        (
            lambda n: nn.MultiheadAttention(n, 4, batch_first=True, add_bias_kv=True),
            lambda m, x: m(x, x, x)[0],
            TRANSFORMER | {"weight": {(2, "hidden")}, "bias_k": {(3, "vector")}, "bias_v": {(3, "vector")}},
        ),
        *(
            (lambda n, f=f: Scaled(n, f), lambda m, x: m(x), {"gain": {(1, "vector")}})
            for f in (torch.hypot, torch.logaddexp, torch.fmax, torch.fmod, torch.copysign, torch.atan2)
        ),
    ],
    ids=[
        "PReLU", "one slope", "InstanceNorm", "bias_k", "hypot", "logaddexp", "fmax", "fmod", "copysign", "atan2"
    ],
)  # fmt: skip
def test_one_number_per_channel(
    make: Callable[[int], nn.Module], apply: Callable[..., torch.Tensor], roles: dict[str, set[tuple[int, str]]]
) -> None:
    assert by_shape(family(make, apply)) == roles


def test_adaptive_softmax_whose_last_cluster_has_rank_one_at_the_base() -> None:
    class Adaptive(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(5, width), nn.AdaptiveLogSoftmaxWithLoss(width, 20, [5, 10])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.first(x), torch.arange(6) * 3).loss

    of = Family(lambda s: Adaptive(s.width), torch.randn(6, 5), lambda model, x: model(x), Scale(16))
    row = next(row for row in mt.plan(of, Scale(64)).rows if row.name == "out.tail.1.1.weight")
    assert (row.role, row.m_in, row.shape) == ("output", 4, (10, 4))
