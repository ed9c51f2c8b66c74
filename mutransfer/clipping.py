"""Clipping by a norm that does not depend on where multipliers are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .gauges import Columns

__all__ = ["clip_grad_norm_", "parted"]


@torch.no_grad()
def clip_grad_norm_(gauged: Iterable[tuple[float, torch.Tensor, tuple[Columns, ...]]], max_norm: float) -> torch.Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``; return the norm before (a scalar tensor).

    Args:
        gauged: (gauge, parameter, columns): the gradient counts ``gauge`` times, and that of columns as often again as their
            own gauge. DTensors count whole on every process.
        max_norm: in units of the gradient's norm.
    """
    live: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for gauge, parameter, columns in gauged:
        if parameter.grad is None:
            continue
        for more, grad in parted(parameter.grad, columns):  # sharded gradients meet only those of their own mesh
            live.setdefault((getattr(grad, "device_mesh", None), grad.device, gauge * more), []).append(grad)
    if not live:
        return torch.zeros(())
    norms = [_whole(torch.nn.utils.get_total_norm(grads)) * key[-1] for key, grads in live.items()]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for (_, device, _), grads in live.items():
        torch._foreach_mul_(grads, scale.to(device))
    return total


def parted(tensor: torch.Tensor, columns: tuple[Columns, ...], *, leading: int = 0) -> list[tuple[float, torch.Tensor]]:
    """Return a parameter's gradient in pieces, with the gauge of each against the whole's; ``leading`` axes come first."""
    if not columns:
        return [(1.0, tensor)]
    end, pieces, dim = 0, [], columns[0].axis + leading
    for each in columns:
        pieces.append((1.0, tensor.narrow(dim, end, each.begin - end)))
        pieces.append((each.gauge, tensor.narrow(dim, each.begin, each.end - each.begin)))
        end = each.end
    pieces.append((1.0, tensor.narrow(dim, end, tensor.shape[dim] - end)))
    return [(gauge, each) for gauge, each in pieces if each.numel()]


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's value on every process; `full_tensor` is what a DTensor has and a plain tensor has not."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
