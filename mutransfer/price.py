"""What a run costs in floating point operations, counted on the operations themselves and before anything is built."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .family import Family
from .scale import Scale

__all__ = ["step_flops"]


def step_flops(family: Family, scale: Scale, batch: Any) -> float:
    """Return the floating point operations of one training step (forward and backward) on ``batch``.

    Counted by torch on fake tensors: matrix products, convolutions and attention, 2 per multiply-add; entrywise work and
    the optimizer are left out, as in the usual 6·N·D.
    """
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = family.build(scale)
        fake = tree_map_only(torch.Tensor, mode.from_tensor, batch)
        with counter:
            family.loss(model, fake).backward()
    return float(counter.get_total_flops())
