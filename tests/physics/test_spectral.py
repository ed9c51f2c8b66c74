"""Gradients behind a readout are as large as its weights, and epsilon under the spectral table follows them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mutransfer as mt

WIDTHS = (64, 128, 256, 512)


def family(vocabulary: int) -> mt.Family:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(64, 16, generator=generator).double(), torch.randint(vocabulary, (64,), generator=generator)

    def build(scale: mt.Scale) -> nn.Module:
        n = scale.width
        sizes = [16, n, n, 2 * n, n, vocabulary]
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
        for layer in layers[:-1]:
            nn.init.kaiming_normal_(layer.weight)
        parts: list[nn.Module] = [part for layer in layers for part in (layer, nn.ReLU())][:-1]
        return nn.Sequential(*parts).double()

    return mt.Family(build, batch, lambda model, b: F.cross_entropy(model(b[0]), b[1]), mt.Scale(64))


@pytest.mark.parametrize("vocabulary", [32, 200, 2048], ids=["below the widths", "between them", "above them"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_gradients_keep_their_size_against_epsilon(vocabulary: int, optimizer: str) -> None:
    """With SGD, in place of gradient / epsilon, the change of a layer's result by the first step: lr · |gradient| · fan-in."""
    of = family(vocabulary)
    sizes: dict[str, list[float]] = {}
    for width in WIDTHS:
        plan, found = mt.plan(of, mt.Scale(width), "spectral", optimizer), dict[str, float]()
        for seed in range(4):
            model = of.build(plan.scale)
            plan.initialize(model, seed)
            of.loss(model, of.batch).backward()
            for row in plan.rows[:-1]:
                gradient = model.get_parameter(row.name).grad.abs().mean().item()  # type: ignore[union-attr]
                step = gradient / row.eps if row.eps else gradient * row.lr * row.shape[1]
                found[row.name] = found.get(row.name, 0.0) + math.log2(step)
        for name, value in found.items():
            sizes.setdefault(name, []).append(value / 4)
    slopes = {name: np.polyfit(np.log2(WIDTHS), values, 1)[0] for name, values in sizes.items()}
    assert all(abs(each) < 0.1 for each in slopes.values()), slopes
