"""Clipping by a norm that does not depend on where multipliers are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(gauged: Iterable[tuple[float, torch.Tensor]], max_norm: float) -> torch.Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``; return the norm before (a scalar tensor).

    Args:
        gauged: (gauge, parameter): the gradient counts ``gauge`` times. DTensors count whole on every process.
        max_norm: in units of the gradient's norm.
    """
    live: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for gauge, parameter in gauged:
        grad = parameter.grad
        if grad is not None:  # sharded gradients meet only those of their own mesh
            live.setdefault((getattr(grad, "device_mesh", None), grad.device, gauge), []).append(grad)
    if not live:
        return torch.zeros(())
    norms = [_whole(torch.nn.utils.get_total_norm(grads)) * key[-1] for key, grads in live.items()]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for (_, device, _), grads in live.items():
        torch._foreach_mul_(grads, scale.to(device))
    return total


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's value on every process; `full_tensor` is what a DTensor has and a plain tensor has not."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
