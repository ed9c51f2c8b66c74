"""Which operations led to a tensor: a constructor's run under `FakeTensorMode`, linked backwards from every storage."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from .windows import Literal, Step, Version, Window

__all__ = ["Recorder", "leaves", "steps_to", "tensors_in"]

# What these write does not depend on what was there. Operations with ``out=`` are of the same kind.
OVERWRITES = frozenset(
    ["normal_", "uniform_", "zero_", "fill_", "copy_", "exponential_", "log_normal_", "cauchy_", "random_"]
)
EMPTY = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])


class Recorder(TorchDispatchMode):
    """Records, per storage, the operation that last wrote to it, and through its arguments all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[int, Version] = {}
        self._order = 0

    def window(self, tensor: torch.Tensor) -> Window | Literal:
        """Return the tensor as it is now; one made outside of this recording is taken by value."""
        version = self._versions.get(tensor.untyped_storage()._cdata)
        return Literal(tensor) if version is None else _window(tensor, version)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            if (known := self.value(args[0])) is None:
                raise
            return known
        self._note(func, args, kwargs, out)
        return out

    def value(self, scalar: torch.Tensor) -> float | bool | None:
        """Return what a constructor that asks for ``scalar.item()`` shall see; None where it cannot be known."""
        return None

    def put(self, func: Any, args: list[Any], kwargs: dict[str, Any], results: list[Window]) -> None:
        """Record that ``results`` now hold what ``func`` made of ``args``."""
        step = Step(self._order, func, args, kwargs, [])
        self._order += 1
        for window in results:
            version = self._versions[window.key] = Version(window.version.storage, step)
            step.results.append(replace(window, version=version))

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        places = _writes(func)
        if places is None:
            return
        written = [tensor for place in places for tensor in tensors_in(_argument(place, args, kwargs))]
        results = written or [t for t in tensors_in(out) if t.untyped_storage()._cdata not in self._versions]
        if not results:  # a view, or no tensor at all
            return
        blank = [_window(tensor, Version(tensor.untyped_storage())) for tensor in results]
        read = {tensor.untyped_storage()._cdata for tensor in tensors_in(args[1:])}
        overwrites = (func._opname in OVERWRITES or "out" in kwargs) and not read & {window.key for window in blank}
        for window in blank:
            if func._opname in EMPTY or (overwrites and window.whole):
                self._versions[window.key] = window.version  # what was there is of no consequence
        if func._opname not in EMPTY:
            kept = {key: self._kept(value) for key, value in kwargs.items()}
            self.put(func, [self._kept(value) for value in args], kept, blank)

    def _kept(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.window(value)
        return [self._kept(item) for item in value] if isinstance(value, list | tuple) else value


def leaves(value: Any) -> Iterator[Window | Literal]:
    """The tensors among an operation's arguments."""
    if isinstance(value, Window | Literal):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def steps_to(version: Version) -> list[Step]:
    """Return the operations behind a storage's state, in the order in which they ran."""
    found: dict[int, Step] = {}
    waiting = [version.step]
    while waiting:
        step = waiting.pop()
        if step is not None and step.order not in found:
            found[step.order] = step
            waiting += [leaf.version.step for leaf in leaves([step.args, step.kwargs]) if isinstance(leaf, Window)]
    return [found[order] for order in sorted(found)]


@functools.cache
def _writes(func: Any) -> tuple[int | str, ...] | None:
    """The arguments that an operation writes to; None if it only turns the view."""
    if torch.Tag.inplace_view in func.tags:
        return None
    places: list[int | str] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            places.append(argument.name if argument.kwarg_only else i)
    return tuple(places)


def _window(tensor: torch.Tensor, version: Version) -> Window:
    return Window(version, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _argument(place: int | str, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(place, str):
        return kwargs.get(place)
    return args[place] if place < len(args) else None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of an argument or an output, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []
