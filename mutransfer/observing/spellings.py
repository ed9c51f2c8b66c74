"""Sums in other words: an operation that adds to an activation on the side, said as a plain sum.

What `UseWatcher` is told are the steps: a residual branch written as ``torch.addcmul(x, scale, y)`` looks like
``x + scale * y``. The values are those of the steps, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .operations import SUMS

__all__ = ["Spellings", "adds"]

aten = torch.ops.aten
Call = Callable[..., Any]
PIECES = 3  # of a stack that is summed: more are time steps or all layers' states


def adds(name: str, args: Any) -> bool:
    """Say whether an operation is a plain sum, of all entries or of some."""
    if name.startswith("index_put"):
        return len(args) > 3 and bool(args[3])  # accumulate
    return name in SUMS or name.startswith(("index_add", "scatter_add"))


class Spellings:
    """Says operations on activations in plain steps; it has to remember what was stacked until that is summed."""

    def __init__(self) -> None:
        self._stacks: list[tuple[torch.Tensor, list[torch.Tensor], int]] = []

    def steps(self, name: str, args: Any, kwargs: dict[str, Any], call: Call, live: Callable[[Any], bool]) -> Any:
        """Return the operation's result by other operations, each run by ``call``, or None where it is plain itself.

        Args:
            name: of the operation.
            args: its arguments as dispatched.
            kwargs: likewise.
            call: runs an aten operation under the watcher.
            live: says of a tensor whether it is an activation that depends on a parameter.
        """
        if "out" in kwargs or not args:
            return None
        match name:
            case "stack" if len(args[0]) <= PIECES and all(map(live, args[0])):
                dim = (args[1] if len(args) > 1 else 0) % (args[0][0].dim() + 1)
                out = call(aten.cat.default, [call(aten.unsqueeze.default, each, dim) for each in args[0]], dim)
                self._stacks.append((out, list(args[0]), dim))
                return out
            case "sum" | "mean" if len(args) > 1 and args[1] is not None and kwargs.get("dtype") is None:
                return self._summed(name == "mean", call, *args)
            case "add" if live(args[0]) and isinstance(args[1], int | float) and args[1] == 0:  # Python's own sum
                return call(aten.clone.default, args[0])
            case "rsub" if live(args[0]) and live(args[1]):
                return call(aten.sub.Tensor, args[1], args[0], **kwargs)
        if not live(args[0]) or not name.startswith(("add", "baddbmm", "lerp")):
            return None
        added = _added(name.removesuffix("_"), args, kwargs, call)
        if added is None:
            return None
        stream, inplace = args[0], name.endswith("_")
        if (beta := kwargs.get("beta", 1)) != 1:
            stream = call((aten.mul_ if inplace else aten.mul).Tensor, stream, beta)
        return call((aten.add_ if inplace else aten.add).Tensor, stream, added)

    def _summed(self, mean: bool, call: Call, stacked: torch.Tensor, dims: Any, keepdim: bool = False) -> Any:
        for out, pieces, dim in self._stacks:
            same = out.untyped_storage()._cdata == stacked.untyped_storage()._cdata and out.stride() == stacked.stride()
            if same and out.shape == stacked.shape and [each % out.dim() for each in dims] == [dim]:
                total = pieces[0]
                for piece in pieces[1:]:
                    total = call(aten.add.Tensor, total, piece)
                total = call(aten.div.Tensor, total, len(pieces)) if mean else total
                return call(aten.unsqueeze.default, total, dim) if keepdim else total
        return None


def _added(name: str, args: Any, kwargs: dict[str, Any], call: Call) -> torch.Tensor | None:
    """Return what the operation adds to its first argument, or None if that does not stay in the sum."""
    factor = kwargs.get("value", kwargs.get("alpha", 1))
    match name:
        case "addcmul":
            added = call(aten.mul.Tensor, *args[1:3])
        case "addcdiv":
            added = call(aten.div.Tensor, *args[1:3])
        case "lerp":
            added = call(aten.mul.Tensor, call(aten.sub.Tensor, args[1], args[0]), args[2])
        case "addmm" | "addmv" | "baddbmm" if kwargs.get("beta", 1) != 0:
            contract = {"addmm": aten.mm, "addmv": aten.mv, "baddbmm": aten.bmm}[name]
            added = call(contract.default, *args[1:3])
        case _:
            return None
    return added if factor == 1 else call(aten.mul.Tensor, added, factor)
