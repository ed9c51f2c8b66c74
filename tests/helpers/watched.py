"""Makes what the tests of recorded initializations share: one seen, one gone through a file, one drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mutransfer.initialization import Init, InitTracer, draw_

N = 64


def seen(build: Callable[[], torch.Tensor]) -> Init | str:
    """What the watcher says of a tensor that ``build`` makes."""
    with FakeTensorMode(allow_non_fake_inputs=True), InitTracer() as watcher:
        tensor = build()
    return watcher.find(tensor)


def saved(init: Init | str) -> Init:
    """The initialization after a trip through a file."""
    assert isinstance(init, Init), init
    return Init.from_dict(json.loads(json.dumps(init.as_dict(), allow_nan=False)))


def drawn(init: Init, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    tensor = torch.full(shape, math.nan)
    draw_(tensor, init, seed, "it")
    return tensor
