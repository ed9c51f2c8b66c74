"""A distribution is recognized however it is written, and drawn again with its mean, std and ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from mutransfer.initialization import Init

from ..helpers.watched import N, drawn, saved, seen


def old_trunc_normal(mean: float, std: float, a: float, b: float) -> torch.Tensor:
    """`trunc_normal_` as torch had it until 2.12."""
    low, high = ((1 + math.erf((bound - mean) / std / math.sqrt(2))) / 2 for bound in (a, b))
    tensor = torch.empty(N).uniform_(2 * low - 1, 2 * high - 1).erfinv_()
    return tensor.mul_(std * math.sqrt(2)).add_(mean).clamp_(min=a, max=b)


RECOGNIZED: dict[str, tuple[Callable[[int], torch.Tensor], Init]] = {
    "normal_": (lambda n: torch.empty(n).normal_(0.5, 0.02), Init("normal", 0.5, 0.02)),
    "empty, normal_": (lambda n: torch.empty(n).normal_(), Init("normal", 0, 1)),
    "nn.init.normal_": (lambda n: nn.init.normal_(torch.zeros(n), std=0.02), Init("normal", 0, 0.02)),
    "torch.normal": (lambda n: torch.normal(0.1, 0.3, (n,)), Init("normal", 0.1, 0.3)),
    "torch.normal of tensors": (lambda n: torch.normal(torch.ones(n), 0.3), Init("normal", 1, 0.3)),
    "uniform_": (lambda n: nn.init.uniform_(torch.empty(n), -0.1, 0.3), Init("uniform", -0.1, 0.3)),
    "randn * s": (lambda n: torch.randn(n) * 0.02, Init("normal", 0, 0.02)),
    "s * randn": (lambda n: 0.02 * torch.randn(n), Init("normal", 0, 0.02)),
    "tensor * randn": (lambda n: torch.tensor(0.25) * torch.randn(n) + torch.ones(n), Init("normal", 1, 0.25)),
    "randn / s": (lambda n: torch.randn(n) / 4, Init("normal", 0, 0.25)),
    "s - randn": (lambda n: 1 - 2 * torch.randn(n), Init("normal", 1, 2)),
    "s - rand": (lambda n: 1 - torch.rand(n), Init("uniform", 0, 1)),
    "-s * randn": (lambda n: -0.5 * torch.randn(n), Init("normal", 0, 0.5)),
    "-s * rand": (lambda n: -0.5 * torch.rand(n), Init("uniform", -0.5, 0)),
    "shifted rand": (lambda n: (torch.rand(n) - 0.5) * 2, Init("uniform", -1, 1)),
    "alpha": (lambda n: torch.randn(n).add_(torch.ones(n), alpha=3), Init("normal", 3, 1)),
    "mul_ in place": (lambda n: torch.randn(n).mul_(3), Init("normal", 0, 3)),
    "kaiming_normal_": (lambda n: nn.init.kaiming_normal_(torch.empty(n, 8))[:, 0].clone(), Init("normal", 0, 0.5)),
    "a clamp that clips nothing": (
        lambda n: (torch.randn(n) / 9).clamp(-1, 1),
        Init("trunc_normal", 0, 1 / 9, -1, 1),
    ),
    "trunc_normal_": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), std=0.02, a=-0.01, b=0.03125),
        Init("trunc_normal", 0, 0.02, -0.01, 0.03125),
    ),
    "trunc_normal_, far bounds": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), std=0.02),
        Init("trunc_normal", 0, 0.02, -0.8, 0.8),
    ),
    "trunc_normal_, near bounds": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), mean=0.1, std=2, a=-0.25, b=0.25),
        Init("trunc_normal", 0.1, 2, -0.25, 0.25),
    ),
    "trunc_normal_, copied to bfloat16": (
        lambda n: nn.init.trunc_normal_(torch.empty(n, dtype=torch.bfloat16).float()).to(torch.bfloat16),
        Init("trunc_normal", 0, 1, -2, 2),
    ),
    "trunc_normal_, scaled": (
        lambda n: nn.init.trunc_normal_(torch.empty(n), a=-1).mul_(-0.5),
        Init("trunc_normal", 0, 0.5, -1, 0.5),
    ),
    "zeros": (torch.zeros, Init("constant", 0)),
    "ones": (torch.ones, Init("constant", 1)),
    "full": (lambda n: torch.full((n,), 0.1), Init("constant", 0.1)),
    "ones * s": (lambda n: torch.ones(n) * 1e-4, Init("constant", 1e-4)),
    "a function of a constant": (lambda n: torch.full((n,), 4.0).sqrt_().neg(), Init("constant", -2)),
    "padded": (lambda n: nn.functional.pad(torch.zeros(n - 1), (0, 1)), Init("constant", 0)),
    "torch.tensor": (lambda n: torch.tensor(3.0).expand(n).clone(), Init("constant", 3)),
    "numpy": (lambda n: torch.from_numpy(np.full(n, 3.0)), Init("constant", 3)),
    "fill_": (lambda n: torch.randn(n).fill_(2), Init("constant", 2)),
    "zero_": (lambda n: torch.randn(n).zero_(), Init("constant", 0)),
    "copied": (lambda n: torch.empty(n).copy_(torch.randn(n)), Init("normal", 0, 1)),
    "another dtype": (lambda n: torch.randn(n, dtype=torch.float64).float(), Init("normal", 0, 1)),
    "a slice of a stack": (lambda n: torch.randn(3, n)[1], Init("normal", 0, 1)),
    "all slices": (lambda n: torch.stack([torch.zeros(n)] * 2).normal_()[0], Init("normal", 0, 1)),
}


@pytest.mark.parametrize("way", RECOGNIZED)
def test_a_distribution_is_recognized_and_drawn(way: str) -> None:
    draw, expected = RECOGNIZED[way]
    found = saved(seen(lambda: draw(N)))
    assert (found.kind, found.parts, found.program) == (expected.kind, (), None)
    numbers = [(init.a, init.b, init.low, init.high) for init in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-8)
    own, again = draw(20_000).double(), drawn(found, (20_000,))
    assert found.std == pytest.approx(own.std().item(), rel=0.03, abs=1e-6)
    assert again.std().item() == pytest.approx(own.std().item(), rel=0.03, abs=1e-6)
    assert again.mean().item() == pytest.approx(own.mean().item(), abs=0.05 * expected.std + 1e-6)
    assert own.amin().item() == pytest.approx(again.amin().item(), abs=1.5 * expected.std + 1e-9)


@pytest.mark.parametrize(
    ("mean", "std", "a", "b"), [(0.0, 1.0, -2.0, 2.0), (0.01, 0.02, -2.0, 2.0), (1.0, 2.0, 1.0, 2.0)]
)
def test_the_truncated_normal_of_older_torch(mean: float, std: float, a: float, b: float) -> None:
    found = seen(lambda: old_trunc_normal(mean, std, a, b))
    expected = Init.truncated(mean, std, a, b)
    assert isinstance(found, Init)
    assert (found.a, found.b, found.low, found.high) == pytest.approx(
        (mean, std, expected.low, expected.high), rel=1e-6
    )


@pytest.mark.parametrize(("a", "b"), [(-2, 2), (-0.5, 3), (1, 2), (6, 7), (-7, -6), (-40, 40)])
def test_the_std_of_a_truncated_normal_is_scipys(a: float, b: float) -> None:
    from scipy.stats import truncnorm

    assert Init.truncated(3.0, 2.0, 3 + 2 * a, 3 + 2 * b).std == pytest.approx(2 * truncnorm(a, b).std(), rel=1e-4)
