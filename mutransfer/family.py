"""A model family: the same model at any size, with an example batch and a loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ._torch_internals import tree_map_only
from .devices import is_out_of_memory
from .errors import BuildError, RequestError, describe
from .printing import once
from .recipe import Scale

__all__ = ["Family", "is_lazy", "unwrapped"]


@dataclass(frozen=True)
class Family:
    """A model at any size.

    Args:
        build: ``Scale`` → a plain `torch.nn.Module`, freshly initialized.
        batch: one example batch (tensor, tuple or dict), in the form that ``loss`` expects. Usually only its shapes are used.
            Its values matter to the coordinate check, which trains on this batch, and to models whose forward pass branches
            on the values of tensors.
        loss: ``(model, batch)`` → a scalar tensor.
        base: the scale at which µP changes nothing; all ratios are relative to it.
        name: its name in reports and messages.
        roles: name pattern (shell-style, with * and ?) → role, for parameters whose role cannot be inferred or is inferred
            incorrectly; the first matching pattern applies.
    """

    build: Callable[[Scale], torch.nn.Module]
    batch: Any
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    base: Scale
    name: str = "model"
    roles: Mapping[str, str] = field(default_factory=dict)

    def with_base(self, base: Scale) -> Family:
        """Return this family with another base scale."""
        return replace(self, base=base)

    def printing_once(self) -> Family:
        """Return a copy of this family for models that print: whatever they print again and again is shown once."""
        return replace(self, loss=once(self.loss, self.name, "loss"))

    def batch_on(self, device: torch.device | str) -> Any:
        """Return the example batch with every tensor on ``device``."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self.batch)

    def built(self, scale: Scale, device: torch.device | str = "cpu") -> torch.nn.Module:
        """Build the model at ``scale`` on ``device``, with lazy parameters materialized.

        Raises:
            BuildError: see `materialize`.
        """
        model = self.build(scale).to(device)
        if is_lazy(model):
            self.materialize(model, self.batch_on(device))
        return model

    def materialize(self, model: torch.nn.Module, batch: Any) -> None:
        """Materialize lazy parameters (`torch.nn.LazyLinear`) with a forward pass of ``batch`` in evaluation mode.

        Raises:
            BuildError: a parameter or buffer has no shape afterwards, because the pass raised or does not use it.
        """
        training = {module: module.training for module in model.modules()}
        why = "the example batch does not use it"
        try:
            with torch.no_grad():
                self.loss(model.eval(), batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = describe(error)
        for module, before in training.items():
            module.training = before
        if (name := is_lazy(model)) is not None:
            raise BuildError(
                f"{name} is lazy, and a forward pass of the example batch did not materialize it ({why}): give its layer "
                "in_features (or in_channels, num_features)."
            )

    def loss_on(self, model: torch.nn.Module, batch: Any, of: str = "its example batch") -> torch.Tensor:
        """Return the loss on ``batch``; ``of`` describes the batch in error messages.

        Raises:
            BuildError: the model or the loss raised, or the loss has no gradient although gradients are enabled.
                An out-of-memory error is raised as it is (`devices.is_out_of_memory`).
        """
        try:
            loss = self.loss(model, batch)
        except RequestError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise BuildError(
                f"the loss of {self.name} raised on {of} ({describe(error)}): check that model, batch and loss fit together."
            ) from error
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise BuildError(
                f"the loss of {self.name} has no gradient: return it without detaching it, and not under torch.no_grad()."
            )
        return loss


def is_lazy(model: torch.nn.Module) -> str | None:
    """Return the name of the first parameter or buffer that has no shape yet, or None."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((name for name, each in named if torch.nn.parameter.is_lazy(each)), None)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that `torch.compile` wrapped, or ``model`` itself if it is not compiled."""
    while type(model).__name__ == "OptimizedModule" and isinstance(model._orig_mod, torch.nn.Module):
        model = model._orig_mod
    return model
