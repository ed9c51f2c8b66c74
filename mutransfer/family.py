"""A model family: the same model at any size, with one batch of its data and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .errors import RequestError, describe
from .printing import once
from .scale import Scale

__all__ = ["Family"]


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
