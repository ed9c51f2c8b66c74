"""A model's own initialization: read off its constructor's operations, then drawn again at any size.

`watch_inits` runs under `FakeTensorMode`, so that a model of any size is "built" without memory; the last random or fill
operation on each parameter's storage is what the model starts from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Init", "InitWatcher"]


@dataclass(frozen=True)
class Init:
    """One distribution of independent entries.

    ``normal``: mean ``a``, standard deviation ``b``. ``uniform``: from ``a`` to ``b``. ``constant``: ``a`` everywhere.
    """

    kind: Literal["normal", "uniform", "constant"]
    a: float
    b: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of one entry; 0 for constants."""
        return {"normal": self.b, "uniform": (self.b - self.a) / math.sqrt(12), "constant": 0.0}[self.kind]

    def scaled(self, factor: float) -> Init:
        """Return the distribution of ``factor`` times a draw."""
        a, b = self.a * factor, self.b * factor
        if factor < 0:  # a mirrored normal keeps its spread, a mirrored uniform swaps its ends
            a, b = (b, a) if self.kind == "uniform" else (a, -b)
        return replace(self, a=a, b=b)

    def shifted(self, shift: float) -> Init:
        """Return the distribution of a draw plus ``shift``."""
        return replace(self, a=self.a + shift, b=self.b + shift * (self.kind == "uniform"))

    @torch.no_grad()
    def fill_(self, tensor: torch.Tensor, generator: torch.Generator) -> None:
        """Overwrite ``tensor`` with a draw."""
        if self.kind == "normal":
            tensor.normal_(self.a, self.b, generator=generator)
        elif self.kind == "uniform":
            tensor.uniform_(self.a, self.b, generator=generator)
        else:
            tensor.fill_(self.a)


class InitWatcher(TorchDispatchMode):
    """Records, per storage, the distribution its entries were last drawn from; `find` asks for one tensor's.

    An operation that is none of draw, fill, copy or rescale leaves its name instead, so that a refusal can show it.
    """

    def __init__(self) -> None:
        super().__init__()
        # The tensor is kept beside its record: a freed storage's address would be given to the next one.
        self._seen: dict[int, tuple[torch.Tensor, Init | str]] = {}

    def find(self, tensor: torch.Tensor) -> Init | str:
        """Return the tensor's distribution, or the name of the operation that hid it."""
        return self._seen.get(_key(tensor), (tensor, "none seen"))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: torch.Tensor) -> None:
        name = func.overloadpacket.__name__
        record = self._record(name, args, kwargs)
        written = any(info is not None and info.is_write for info in _aliases(func))
        fresh = _key(out) not in self._seen
        if written or fresh:
            kept = out if fresh else self._seen[_key(out)][0]
            # Zeroing a part (a padding row) leaves the draw; another value there is a special init that must not be lost.
            if fresh or out.numel() == kept.numel():
                self._seen[_key(out)] = (kept, record)
            elif record != Init("constant", 0.0):
                self._seen[_key(out)] = (kept, f"{name} of a part")

    def _record(self, name: str, args: Any, kwargs: dict[str, Any]) -> Init | str:
        number = [value for value in args[1:] if isinstance(value, (int, float))]
        before = self.find(args[0]) if args and isinstance(args[0], torch.Tensor) else "none seen"
        match name:
            case "normal_":
                return Init("normal", *_two(number, kwargs, ("mean", 0.0), ("std", 1.0)))
            case "uniform_":
                return Init("uniform", *_two(number, kwargs, ("from", 0.0), ("to", 1.0)))
            case "randn" | "randn_like":
                return Init("normal", 0.0, 1.0)
            case "rand" | "rand_like":
                return Init("uniform", 0.0, 1.0)
            case "zero_" | "zeros" | "zeros_like" | "new_zeros":
                return Init("constant", 0.0)
            case "ones" | "ones_like" | "new_ones":
                return Init("constant", 1.0)
            case "fill_" | "fill" | "full" | "full_like" | "new_full" if number:
                return Init("constant", float(number[-1]))
            case "mul_" | "mul" | "div_" | "div" if number and isinstance(before, Init):
                return before.scaled(number[0] if name.startswith("mul") else 1 / number[0])
            case "add_" | "add" | "sub_" | "sub" if number and isinstance(before, Init):
                return before.shifted(number[0] if name.startswith("add") else -number[0])
            case "copy_":
                return self.find(args[1])
            case "clone" | "_to_copy" | "detach" | "contiguous":
                return before
            case _:
                return name


def _two(given: list[float], kwargs: dict[str, Any], *named: tuple[str, float]) -> tuple[float, float]:
    first, second = (
        float(given[i] if len(given) > i else kwargs.get(name, default)) for i, (name, default) in enumerate(named)
    )
    return first, second


def _aliases(func: Any) -> list[Any]:
    return [argument.alias_info for argument in func._schema.arguments]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
