"""K models of equal shape as one: their tensors side by side, and one of them to lend its structure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mutransfer.family import Family

__all__ = ["Stack", "Tensors", "moving_parts"]

Tensors = dict[str, Tensor]


class _Loss(nn.Module):
    """The loss as a module's output, so that `functional_call` can put other tensors under the model."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family, self.model = family, model

    def forward(self, batch: Any) -> Tensor:
        return self.family.loss(self.model, batch)  # mapped, a loss does not tell whether it has a gradient


class Stack:
    """Tensors ``[K, ...]`` by name, of models that have the same names and shapes.

    Attributes:
        trained: parameters with a gradient.
        resting: parameters that the loss does not use or that want no gradient: an optimizer leaves them alone.
        buffers: those that a pass in training changes, such as running averages; all others are the first model's.

    Args:
        family: the loss.
        model: lends its structure, and may be used for nothing else.
        size: K.
        trained: names, from `moving_parts`.
        moving: names of buffers, from `moving_parts`.
    """

    def __init__(self, family: Family, model: nn.Module, size: int, trained: set[str], moving: set[str]) -> None:
        self.size, self.model, self.program = size, model, _Loss(family, model)
        own, held = dict(model.named_parameters()), dict(model.named_buffers())
        self.trained = {name: _room(each, size) for name, each in own.items() if name in trained}
        self.resting = {name: _room(each, size) for name, each in own.items() if name not in trained}
        self.buffers = {name: _room(held[name], size) for name in held if name in moving}

    @torch.no_grad()
    def put(self, place: int, model: nn.Module) -> None:
        """Copy ``model`` to one place."""
        source = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, stack in self.tensors():
            stack[place].copy_(source[name])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Go through all stacks."""
        for part in (self.trained, self.resting, self.buffers):
            yield from part.items()

    def loss(self, tensors: Tensors, batch: Any) -> Tensor:
        """Return the loss of one model with these tensors; a buffer among them is changed in place by training."""
        return functional_call(self.program, {f"model.{name}": each for name, each in tensors.items()}, (batch,))


def moving_parts(family: Family, model: nn.Module, batch: Any) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that have a gradient, and of the buffers that a pass in training changes.

    Raises:
        RequestError: the model or its loss raised.
    """
    model.train()
    before = {name: each.clone() for name, each in model.named_buffers()}
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    devices = sorted({each.get_device() for each in parameters.values() if each.is_cuda})
    with torch.random.fork_rng(devices):
        loss = family.loss_on(model, batch, "a batch (inputs, targets) of the data")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    # By value: a kernel that updates running averages does not always count as a change of the tensor.
    moving = {name for name, each in model.named_buffers() if not torch.equal(each, before[name])}
    with torch.no_grad():
        for name, each in model.named_buffers():
            each.copy_(before[name])
    return {name for name, each in zip(parameters, gradients, strict=True) if each is not None}, moving


def _room(tensor: Tensor, size: int) -> Tensor:
    return tensor.detach().new_empty((size, *tensor.shape))
