"""Small families that tests share; the same arguments give the same object, which is then observed once (`planned.plan_of`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional as F

from mutransfer import Family, Scale
from mutransfer.proxies.models import MLP, ResNet, Transformer, TransformerShape

VOCABULARY = 17


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def image_batch(size: int = 16) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def token_batch(size: int = 4, length: int = 12) -> Any:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (size, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


# Made here and not on first use, which may be on fake tensors: the families are kept.
IMAGES, TOKENS = image_batch(), token_batch()


@functools.cache
def mlp(width: int = 32, depth: int = 3) -> Family:
    return Family(lambda s: MLP(64, s.width, s.depth, 10), IMAGES, loss, Scale(width, depth), "mlp")


@functools.cache
def resnet(width: int = 16, depth: int = 2) -> Family:
    return Family(lambda s: ResNet(1, s.width, s.depth, 10), IMAGES, loss, Scale(width, depth), "resnet")


@functools.cache
def transformer(width: int = 32, depth: int = 2, **shape: Any) -> Family:
    def build(scale: Scale) -> torch.nn.Module:
        return Transformer(TransformerShape(scale.width, scale.depth, VOCABULARY, **shape))

    return Family(build, TOKENS, loss, Scale(width, depth), "transformer")
