"""Numbers that stand in tensors: of one entry, or the same in every entry, however they were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ..initialization import Init, InitWatcher
from . import operations as ops
from .flows import storage_key

__all__ = ["Scalars", "of_buffers"]

# Where the number stands among the arguments, or the number itself.
FILLS: dict[str, int | float] = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1, "fill_": 1}
ONES = {"ones", "ones_like", "new_ones"}
ARITHMETIC = ops.PRODUCTS | ops.SUMS | ops.COPIES | {"sqrt", "rsqrt", "pow", "reciprocal", "neg", "exp", "log", "rsub"}


class Scalars:
    """Which tensors of a watched forward pass hold one number; fake tensors do not say."""

    def __init__(self, find: Callable[[torch.Tensor], float | None] = lambda _: None) -> None:
        self._find = find
        self._known: dict[int, float] = {}

    def value(self, each: Any) -> float | None:
        """Return the number that ``each`` is, or holds in all its entries."""
        if isinstance(each, (int, float)) and not isinstance(each, bool):
            return float(each)
        if not isinstance(each, torch.Tensor) or not each.is_floating_point():
            return None
        key = storage_key(each)
        return self._known[key] if key in self._known else self._read(each)

    def factor(self, args: Any, depends: Callable[[torch.Tensor], bool]) -> float | None:
        """Return the number that a product has as one of its two factors, if it does; ``depends`` says what is none."""
        for each in args[:2]:
            if isinstance(each, torch.Tensor) and depends(each):
                continue
            if (value := self.value(each)) is not None:
                return value
        return None

    def see(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], outputs: list[torch.Tensor]) -> None:
        """Follow an operation that makes a number of numbers."""
        if not outputs or not outputs[0].is_floating_point():
            return
        made = None
        if name in FILLS:
            made = self.value(args[FILLS[name]]) if len(args) > FILLS[name] else None
        elif name in ONES:
            made = 1.0
        elif name in ARITHMETIC:
            made = self._computed(func, args, kwargs)
        elif not name.endswith("_"):
            return
        self._known.pop(storage_key(outputs[0]), None)
        if made is not None:
            self._known[storage_key(outputs[0])] = made

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> float | None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not tensors or any(self._known.get(storage_key(each)) is None for each in tensors):
            return None
        with _disable_current_modes():
            real = tree_map_only(torch.Tensor, lambda each: torch.tensor(self.value(each), dtype=torch.float64), args)
            return float(func(*real, **{key: each for key, each in kwargs.items() if key == "alpha"}))

    def _read(self, each: torch.Tensor) -> float | None:
        if each.numel() != 1:
            return self._find(each)
        known = getattr(each, "constant", each if type(each) is torch.Tensor else None)
        return self._find(each) if known is None or known.is_meta else float(known)


def of_buffers(model: torch.nn.Module, inits: InitWatcher | None) -> Callable[[torch.Tensor], float | None]:
    """Return what reads a buffer: from its constructor's operations, or from its values where it is real."""
    buffers = {storage_key(each): each for each in model.buffers() if each.is_floating_point() and each.numel()}

    def find(tensor: torch.Tensor) -> float | None:
        buffer = buffers.get(storage_key(tensor))
        if inits is None:
            if buffer is None or type(buffer) is not torch.Tensor:
                return None
            first = buffer.flatten()[0]
            return float(first) if bool((buffer == first).all()) else None
        if tensor.numel() == 1:
            number = inits.value(tensor)
            return None if number is None else float(number)
        init = None if buffer is None else inits.find(buffer)
        return init.a if isinstance(init, Init) and init.kind == "constant" and not init.parts else None

    return find
