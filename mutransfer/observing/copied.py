"""`copy.deepcopy` of fake tensors, as `nn.TransformerEncoder` copies its layer: a copy is a clone, in the same mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

__all__ = ["CopiedAsValues"]


class CopiedAsValues(TorchFunctionMode):
    """While active, a fake tensor's deep copy is a clone of it.

    torch's own would copy the fake mode along with the tensor, and a tensor of another mode has views that do not share
    its storage.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            return _cloned(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cloned(tensor: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in memo:
        clone: torch.Tensor = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            clone = torch.nn.Parameter(clone, tensor.requires_grad)
        memo[id(tensor)] = clone.requires_grad_(tensor.requires_grad)
        for name in tensor.__dict__.keys() - clone.__dict__.keys():  # what the user hung on it
            setattr(clone, name, copy.deepcopy(tensor.__dict__[name], memo))
    return memo[id(tensor)]
