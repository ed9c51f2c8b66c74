"""One training step of K models: forward, backward, clipping and update, as a function of tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from mutransfer.planning.plan import parted

from .attention import FoldedAttention
from .stack import Stack, Tensors
from .updates import Clock, Kind, Settings, State, stepped

__all__ = ["Moving", "Program", "losses_of"]

Precision = torch.dtype | None


@dataclass(frozen=True)
class Moving:
    """All that a step changes: parameters, buffers that training changes, and the optimizer's state."""

    trained: Tensors
    buffers: Tensors
    states: dict[str, State]


register_dataclass(Moving)


class Program:
    """The step of one stack's shape.

    Args:
        stack: the models; only its structure is kept.
        kinds: each trained parameter's update.
        clips: whether any model clips its gradients.
        precision: of matrix products, under `torch.autocast`; the tensors' own if None.
    """

    def __init__(self, stack: Stack, kinds: dict[str, Kind], clips: bool, precision: Precision) -> None:
        self.stack, self.kinds, self.clips, self.precision = stack, kinds, clips, precision

    def __call__(
        self, now: Moving, resting: Tensors, settings: dict[str, Settings], limit: Tensor, clock: Clock, batch: Any
    ) -> tuple[Tensor, Moving]:
        """Return the losses ``[K]`` before the step, and what it makes of ``now``.

        Args:
            now: as it stands; not changed.
            resting: the stack's parameters that are not trained.
            settings: of each trained parameter, [K, 1, ...] each.
            limit: the largest norm of the gradient, infinite for a model that does not clip; [K] in float64.
            clock: where each model is.
            batch: every model's own, [K, N, ...].
        """
        leaves = {name: each.detach().requires_grad_() for name, each in now.trained.items()}
        losses, buffers = losses_of(self.stack, {**resting, **leaves}, now.buffers, batch, self.precision)
        # A mean inside of each model and a sum over them: what is not finite stays where it is.
        found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        # As the weights lie in memory: a layer's gradient comes transposed, and what is made of it would be as well.
        gradients = {name: each.contiguous() for name, each in zip(leaves, found, strict=True)}
        with torch.no_grad():
            if self.clips:
                gradients = clipped(gradients, self.kinds, settings, limit)
            after = {
                name: stepped(self.kinds[name], each.detach(), gradients[name], now.states[name], settings[name], clock)
                for name, each in leaves.items()
            }
        return losses.detach(), Moving(
            {name: parameter for name, (parameter, _) in after.items()},
            buffers,
            {name: state for name, (_, state) in after.items()},
        )


def losses_of(
    stack: Stack, tensors: Tensors, buffers: Tensors, batch: Any, precision: Precision
) -> tuple[Tensor, Tensors]:
    """Return the losses ``[K]`` of a stack with these tensors on each model's own batch, and its buffers afterwards."""

    def one(tensors: Tensors, buffers: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        buffers = {name: each.clone() for name, each in buffers.items()}
        return stack.loss({**tensors, **buffers}, batch), buffers

    run = torch.vmap(one, randomness="different")
    with FoldedAttention(), _casting(tensors, precision), warnings.catch_warnings():
        # An operation without a rule runs model by model: slower, and as right.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return run(tensors, buffers, batch)


def clipped(gradients: Tensors, kinds: dict[str, Kind], settings: dict[str, Settings], limit: Tensor) -> Tensors:
    """Return gradients ``[K, ...]`` of which each model's norm is at most its ``limit`` (`Plan.clip_grad_norm_`)."""
    norms = [
        torch.linalg.vector_norm(piece.flatten(1), dim=1) * more * settings[name]["gauge"].flatten().to(each.dtype)
        for name, each in gradients.items()
        for more, piece in parted(each, kinds[name].columns, leading=1)
    ]
    total = torch.linalg.vector_norm(torch.stack([each.to(norms[0].dtype) for each in norms]), dim=0)
    scale = torch.clamp(limit.to(total.dtype) / (total + 1e-6), max=1.0)
    scale = torch.where(limit.isfinite(), scale, 1.0)  # who does not clip keeps even what is not finite
    return {name: each * scale.to(each.dtype).view(-1, *[1] * (each.dim() - 1)) for name, each in gradients.items()}


@contextlib.contextmanager
def _casting(tensors: Tensors, precision: Precision) -> Iterator[None]:
    if precision is None:
        yield
        return
    device = next(iter(tensors.values())).device.type
    # Casts are not kept between passes: the cache would hold those of weights that have been replaced.
    with torch.autocast(device, precision, cache_enabled=False):
        yield
