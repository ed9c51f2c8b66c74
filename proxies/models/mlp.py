"""A multilayer perceptron, written as anyone would."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """ReLU network with ``depth`` hidden layers of ``width`` units and torch's own default initialization.

    Args:
        inputs: features of one example after flattening.
        width: units of each hidden layer.
        depth: hidden layers, at least 1.
        classes: logits.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.readout = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map examples ``[N, ...]`` to logits ``[N, classes]``."""
        h = torch.relu(self.input(x.flatten(1)))
        for layer in self.hidden:
            h = torch.relu(layer(h))
        return self.readout(h)
