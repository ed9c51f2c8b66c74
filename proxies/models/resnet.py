"""A residual network of convolutions and group norms, pre-activation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mutransfer.errors import RequestError

__all__ = ["ResNet"]

GROUPS = 8


class Block(nn.Module):
    """norm → relu → conv → norm → relu → conv, added to the residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the residual stream ``[N, C, H, W]`` to itself."""
        h = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(h)))


class ResNet(nn.Module):
    """Pre-activation residual network (He et al. 1603.05027) with GroupNorm and one resolution per half.

    Args:
        inputs: channels of the image.
        width: channels of every block, a multiple of the 8 normalization groups.
        depth: residual blocks; the image is halved once, in the middle.
        classes: logits.

    Raises:
        RequestError: the width is not a multiple of the normalization groups.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        if width % GROUPS:
            raise RequestError(
                f"resnet's width {width} is not a multiple of its {GROUPS} norm groups: try {_up(width)}."
            )
        self.stem = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.GroupNorm(GROUPS, width)
        self.readout = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[N, inputs, H, W]`` to logits ``[N, classes]``."""
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) // 2:
                x = F.avg_pool2d(x, 2)
            x = block(x)
        x = torch.relu(self.norm(x))
        return self.readout(x.mean((2, 3)))


def _up(width: int) -> int:
    return -(-width // GROUPS) * GROUPS
