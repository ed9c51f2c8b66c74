"""Masks of pruned weights, as parametrizations: they are saved in the state dict, and what they remove gets no gradient."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import RequestError
from ..initialization.init import Init, draw_

__all__ = ["Mask", "density_of", "drawn_mask", "masks_of", "register_mask"]


class Mask(nn.Module):
    """Parametrization with weight = mask · original.

    Where the mask is 0, `set` makes the original 0, and no optimizer step changes it: its gradient is 0, and so are the momentum
    and the decay of a weight that is 0. (Muon's update mixes all entries; `planning.build.plan` refuses it.)

    Attributes:
        mask: a buffer of the weight's shape and type, of zeros and ones.
    """

    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False))

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        """Return the weight that the model uses."""
        return original * self.mask

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the trained tensor for a weight that the model should use."""
        return weight

    @torch.no_grad()
    def set(self, mask: torch.Tensor, original: torch.Tensor) -> None:
        """Use another mask, and set the entries of ``original`` that it removes to 0."""
        self.mask.copy_(mask)
        original.mul_(self.mask)


def register_mask(module: nn.Module, key: str, name: str) -> None:
    """Register a mask of ones on the parameter ``key`` of ``module``, which `masks_of` then finds.

    Raises:
        RequestError: the parameter is sharded; ``name`` is its name in the message.
    """
    weight = getattr(module, key)
    if hasattr(weight, "placements"):
        raise RequestError(
            f"{name} is sharded, but pruned models are trained on one device: attach the plan before sharding."
        )
    parametrize.register_parametrization(module, key, Mask(weight))


def masks_of(model: nn.Module) -> dict[int, list[Mask]]:
    """Return the masks of ``model`` by the id of the parameter that they apply to, several if modules share it."""
    found: dict[int, list[Mask]] = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for each in module:
                if isinstance(each, Mask):
                    found.setdefault(id(module.original), []).append(each)
    return found


@torch.no_grad()
def drawn_mask(shape: tuple[int, ...], density: float, seed: int, name: str) -> torch.Tensor:
    """Return a random mask with round(density · size) ones, which depends only on seed and name (float32, on the CPU)."""
    uniform = torch.empty(shape)
    draw_(uniform, Init("uniform", 0.0, 1.0), seed, f"{name}/mask")
    kept = uniform.flatten().argsort(stable=True)[: round(density * uniform.numel())]
    return torch.zeros(uniform.numel()).index_fill_(0, kept, 1.0).view(shape)


def density_of(mask: torch.Tensor) -> float:
    """Return the fraction of ones."""
    return float(mask.double().mean())
