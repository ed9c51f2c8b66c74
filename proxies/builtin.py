"""The built-in models as families over a data source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from mutransfer.errors import RequestError, nearest
from mutransfer.family import Family
from mutransfer.scale import Scale

from .data.base import Data

__all__ = ["BUILTIN", "DEFAULT_DATA", "builtin"]

DEFAULT_DATA = {"mlp": "digits", "resnet": "digits", "transformer": "bytes"}
DEFAULT_DEPTH = {"mlp": 4, "resnet": 2, "transformer": 2}


def cross_entropy(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean cross-entropy in nats of ``(inputs, targets)``, targets of any shape."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def _mlp(data: Data, **options: Any) -> Callable[[Scale], torch.nn.Module]:
    from .models.mlp import MLP

    inputs = data.batch(0, 1, 0)[0].numel()
    return lambda scale: MLP(inputs, scale.width, scale.depth, data.classes, **options)


def _resnet(data: Data, **options: Any) -> Callable[[Scale], torch.nn.Module]:
    from .models.resnet import ResNet

    return lambda scale: ResNet(data.inputs, scale.width, scale.depth, data.classes, **options)


def _transformer(data: Data, **options: Any) -> Callable[[Scale], torch.nn.Module]:
    from .models.transformer import Transformer, TransformerShape

    return lambda scale: Transformer(TransformerShape(scale.width, scale.depth, data.classes, **options))


BUILTIN = {"mlp": (_mlp, "images"), "resnet": (_resnet, "images"), "transformer": (_transformer, "tokens")}


def builtin(name: str, data: Data, base: Scale, batch_size: int = 32, **options: Any) -> Family:
    """Return the built-in model ``name`` as a family over ``data``.

    Args:
        name: mlp, resnet or transformer.
        data: where its examples come from; it also says how many classes or tokens there are.
        base: the scale at which µP changes nothing.
        batch_size: examples in the family's example batch.
        options: further arguments of the model (a transformer's ``head_dim``, ``tied``, …).

    Raises:
        RequestError: unknown model, data of another kind, an unknown option, or a base that the model cannot have.
    """
    if name not in BUILTIN:
        raise RequestError(f"unknown model {name!r}: {nearest(name, BUILTIN)}")
    make, kind = BUILTIN[name]
    if data.kind != kind:
        raise RequestError(
            f"{name} reads {kind} and the data {data.name!r} holds {data.kind}: choose data of that kind."
        )
    build = make(data, **options)
    try:
        with torch.device("meta"):
            build(base)
    except TypeError as error:
        raise RequestError(
            f"{name} does not take these options ({error}): see its class in mutransfer.proxies.models."
        ) from None
    return Family(build, data.batch(0, batch_size, 0), cross_entropy, base, name)
