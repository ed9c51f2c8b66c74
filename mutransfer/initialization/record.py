"""Record the operations of a constructor that runs under `FakeTensorMode`, linked backwards from every storage.

A tensor is a window (dtype, size, stride, offset) on one version of its storage, so views need no special rules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._torch_internals import DataDependentOutputException, TorchDispatchMode, argument_schemas, storage_id

__all__ = [
    "Constant",
    "OperationRecorder",
    "Step",
    "TRUNCATED",
    "Version",
    "Window",
    "apart",
    "box",
    "leaves",
    "steps_to",
    "tensors_in",
]

TRUNCATED = "trunc_normal_"  # the only step that is not an aten operation: its rejection loop reads values


@dataclass(frozen=True, eq=False)
class Version:
    """One state of a storage: what ``step`` wrote into it, or freshly allocated memory."""

    storage: torch.UntypedStorage  # a reference, because the address of a freed storage would be reused
    step: Step | None = None


@dataclass(frozen=True, eq=False)
class Window:
    """A tensor as a view of one version of a storage."""

    version: Version
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def key(self) -> int:
        """Identity of the storage."""
        return storage_id(self.version.storage)

    @property
    def repeats(self) -> bool:
        """Whether one entry of memory appears at several indices."""
        return any(stride == 0 and size > 1 for size, stride in zip(self.size, self.stride, strict=True))

    @property
    def whole(self) -> bool:
        """Whether the window covers every byte of the storage."""
        nbytes = math.prod(self.size) * self.dtype.itemsize
        return not self.repeats and nbytes == self.version.storage.nbytes()

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Size, stride and offset, which are equal for windows on the same entries of a storage."""
        return self.size, self.stride, self.offset


@dataclass(eq=False)
class Step:
    """One recorded operation; ``results`` are the windows that it wrote, in its arguments or its outputs."""

    order: int
    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[Window]

    @property
    def name(self) -> str:
        """Name of the operation without its overload."""
        return self.func if isinstance(self.func, str) else self.func._opname

    @property
    def random(self) -> bool:
        """Whether the result differs between two runs."""
        return self.func == TRUNCATED or torch.Tag.nondeterministic_seeded in self.func.tags


@dataclass(frozen=True)
class Constant:
    """The values of a tensor that was created outside of the recording."""

    tensor: torch.Tensor


def apart(a: Window, b: Window) -> bool:
    """Return whether two windows on one storage have no entry in common, judged only by where they begin and end."""
    return _end(a) < b.offset or _end(b) < a.offset


def _end(window: Window) -> int:
    return window.offset + sum((size - 1) * stride for size, stride in zip(window.size, window.stride, strict=True))


def box(place: Window, window: Window) -> tuple[tuple[int, int, int], ...] | None:
    """Return where ``place`` lies in ``window`` as (first index, count, step) per axis, or None if it is not a box."""
    rest = place.offset - window.offset
    if rest < 0 or place.dtype != window.dtype:
        return None
    found = [(0, 1, 1)] * len(window.size)
    axes = sorted((axis for axis, size in enumerate(window.size) if size > 1), key=lambda axis: -window.stride[axis])
    for axis in axes:
        first, rest = divmod(rest, window.stride[axis])
        found[axis] = (first, 1, 1)
    for size, stride in zip(place.size, place.stride, strict=True):
        if size == 1:
            continue
        along = [axis for axis in axes if stride >= window.stride[axis]]
        if not along or stride % window.stride[along[0]] or found[along[0]][1] > 1:
            return None
        found[along[0]] = (found[along[0]][0], size, stride // window.stride[along[0]])
    ends = [first + (count - 1) * step for first, count, step in found]
    return tuple(found) if not rest and all(map(int.__lt__, ends, window.size)) else None


# In-place operations whose result does not depend on the previous contents, like that of operations with ``out=``.
OVERWRITES = frozenset(
    ["normal_", "uniform_", "zero_", "fill_", "copy_", "exponential_", "log_normal_", "cauchy_", "random_"]
)
EMPTY = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])


class OperationRecorder(TorchDispatchMode):
    """Dispatch mode that records, per storage, the last operation that wrote to it and, through its arguments, all before."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[int, Version] = {}
        self._order = 0

    def window(self, tensor: torch.Tensor) -> Window | Constant:
        """Return the tensor's current window, or a `Constant` if it was created outside of this recording."""
        version = self._versions.get(storage_id(tensor))
        return Constant(tensor) if version is None else _window(tensor, version)

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
        """Return the value of ``scalar.item()`` for a constructor that asks for it, or None if it cannot be known."""
        return None

    def put(self, func: Any, args: list[Any], kwargs: dict[str, Any], results: list[Window]) -> None:
        """Record that ``results`` now hold the result of ``func`` on ``args``."""
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
        results = written or [t for t in tensors_in(out) if storage_id(t) not in self._versions]
        if not results:  # a view, or no tensor at all
            return
        blank = [_window(tensor, Version(tensor.untyped_storage())) for tensor in results]
        read = {storage_id(tensor) for tensor in tensors_in(args[1:])}
        overwrites = (func._opname in OVERWRITES or "out" in kwargs) and not read & {window.key for window in blank}
        for window in blank:
            if func._opname in EMPTY or (overwrites and window.whole):
                self._versions[window.key] = window.version  # the previous contents do not matter
        if func._opname not in EMPTY:
            kept = {key: self._kept(value) for key, value in kwargs.items()}
            self.put(func, [self._kept(value) for value in args], kept, blank)

    def _kept(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.window(value)
        return [self._kept(item) for item in value] if isinstance(value, list | tuple) else value


def leaves(value: Any) -> Iterator[Window | Constant]:
    """Yield the tensors among an operation's arguments."""
    if isinstance(value, Window | Constant):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def steps_to(version: Version) -> list[Step]:
    """Return the operations that led to a storage's state, in the order in which they ran."""
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
    """Return the arguments that an operation writes to, or None if it only changes the view."""
    if torch.Tag.inplace_view in func.tags:
        return None
    places: list[int | str] = []
    for i, argument in enumerate(argument_schemas(func)):
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
    """Return the tensors of an argument or an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []
