"""A model family: the same model at any size, with one batch of its data and its loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ._torch_internals import tree_map_only
from .errors import RequestError, describe
from .printing import once
from .scale import Scale

__all__ = ["Family", "is_lazy", "unwrapped"]


@dataclass(frozen=True)
class Family:
    """A model at any size.

    Args:
        build: ``Scale`` → a plain `torch.nn.Module`, freshly initialized.
        batch: one example batch (tensor, tuple or dict), as ``loss`` takes it; only its shapes are looked at, except by
            the coordinate check, which trains on it.
        loss: ``(model, batch)`` → a scalar tensor.
        base: the scale at which µP changes nothing, the anchor of all ratios.
        name: how reports call it.
        roles: name pattern (as in a shell: * and ?) → role, for parameters whose use cannot be told or is told wrong; the
            first pattern that fits counts.
    """

    build: Callable[[Scale], torch.nn.Module]
    batch: Any
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    base: Scale
    name: str = "model"
    roles: Mapping[str, str] = field(default_factory=dict)

    def with_base(self, base: Scale) -> Family:
        """Return the same family anchored at another base."""
        return replace(self, base=base)

    def printing_once(self) -> Family:
        """Return the same family; what its loss, and the model in it, prints again and again is shown once per command."""
        return replace(self, loss=once(self.loss, self.name, "loss"))

    def batch_on(self, device: torch.device | str) -> Any:
        """Return the example batch with every tensor on ``device``."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self.batch)

    def built(self, scale: Scale, device: torch.device | str = "cpu") -> torch.nn.Module:
        """Return the model at ``scale`` for real, on ``device``, with lazy parameters in place.

        Raises:
            RequestError: as `materialize`.
        """
        model = self.build(scale).to(device)
        if is_lazy(model):
            self.materialize(model, self.batch_on(device))
        return model

    def materialize(self, model: torch.nn.Module, batch: Any) -> None:
        """Give lazy parameters (`torch.nn.LazyLinear`) their shapes, by a forward pass of ``batch`` in evaluation mode.

        Raises:
            RequestError: the pass raised, or left some of them without a shape.
        """
        training = {module: module.training for module in model.modules()}
        why = "the example batch does not use it"
        try:
            with torch.no_grad():
                self.loss(model.eval(), batch)
        except Exception as error:
            why = describe(error)
        for module, before in training.items():
            module.training = before
        if (name := is_lazy(model)) is not None:
            raise RequestError(
                f"{name} is lazy, and a forward pass of the example batch does not give it a shape ({why}): give its layer "
                "in_features (or in_channels, num_features)."
            )

    def loss_on(self, model: torch.nn.Module, batch: Any, of: str = "its example batch") -> torch.Tensor:
        """Return the loss on ``batch``; ``of`` says whose the batch is.

        Raises:
            RequestError: the model or the loss raised, or there is no gradient where one is wanted.
        """
        try:
            loss = self.loss(model, batch)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(
                f"the loss of {self.name} raised on {of} ({describe(error)}): check that model, batch and loss fit together."
            ) from error
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RequestError(
                f"the loss of {self.name} has no gradient: return it as computed, not detached nor under torch.no_grad()."
            )
        return loss


def is_lazy(model: torch.nn.Module) -> str | None:
    """Return the name of a parameter or buffer that has no shape before a first forward pass, if there is one."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((name for name, each in named if torch.nn.parameter.is_lazy(each)), None)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return what `torch.compile` has wrapped."""
    while type(model).__name__ == "OptimizedModule" and isinstance(model._orig_mod, torch.nn.Module):
        model = model._orig_mod
    return model
