"""A constructor's operations on one tensor, as a small program that can be saved and run again, for real.

`Recorder` runs under `FakeTensorMode` and links every state of every storage to the operation that made it; `Program` is
what leads to one tensor. Operations are kept with windows (type, size, stride, offset) on numbered storages, so that
views need no steps of their own and tensors that share memory share it again.
"""

from __future__ import annotations

import base64
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .errors import RequestError

__all__ = ["Literal", "Program", "Recorder", "Step", "UnreplayableError", "Version", "Window", "leaves", "steps_to"]

LITERAL = 1 << 16  # numbers of a table read from outside that a plan may carry
# What these write does not depend on what was there. Operations with ``out=`` are of the same kind.
OVERWRITES = frozenset(
    ["normal_", "uniform_", "zero_", "fill_", "copy_", "exponential_", "log_normal_", "cauchy_", "random_"]
)
EMPTY = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])
TRUNCATED = "trunc_normal_"  # the one step that is no aten operation: its rejection loop reads values


class UnreplayableError(Exception):
    """Names the operation that cannot be run again from numbers alone."""


@dataclass(frozen=True, eq=False)
class Version:
    """One state of a storage: what ``step`` left in it, or memory as it was allocated."""

    storage: torch.UntypedStorage  # held: a freed storage's address would be given to the next one
    step: Step | None = None


@dataclass(frozen=True, eq=False)
class Window:
    """A tensor as a look at one version of a storage."""

    version: Version
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def key(self) -> int:
        """The storage's identity."""
        return self.version.storage._cdata

    @property
    def repeats(self) -> bool:
        """Whether one entry of memory is seen in several places."""
        return any(stride == 0 and size > 1 for size, stride in zip(self.size, self.stride, strict=True))

    @property
    def whole(self) -> bool:
        """Whether every byte of the storage is seen."""
        nbytes = math.prod(self.size) * self.dtype.itemsize
        return not self.repeats and nbytes == self.version.storage.nbytes()

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """What two windows on the same entries of one storage have in common."""
        return self.size, self.stride, self.offset


@dataclass(frozen=True)
class Literal:
    """The values of a tensor that was made outside."""

    tensor: torch.Tensor


@dataclass(eq=False)
class Step:
    """One operation; ``results`` are the windows it wrote, in its arguments or its outputs."""

    order: int
    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[Window]

    @property
    def name(self) -> str:
        """The operation without its overload."""
        return self.func if isinstance(self.func, str) else self.func._opname

    @property
    def random(self) -> bool:
        """Whether two runs differ."""
        return self.func == TRUNCATED or torch.Tag.nondeterministic_seeded in self.func.tags


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
        """Return what a constructor asks for with ``item()``: run for real where nothing random is behind it, or None."""
        window = self.window(scalar)
        if isinstance(window, Literal):
            return None
        try:
            program = Program.of(window, steps_to(window.version))
        except UnreplayableError:
            return None
        with _disable_current_modes():
            return None if program.random else program.run(0).item()

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
        written = [tensor for place in places for tensor in _tensors(_argument(place, args, kwargs))]
        results = written or [t for t in _tensors(out) if t.untyped_storage()._cdata not in self._versions]
        if not results:  # a view, or no tensor at all
            return
        blank = [_window(tensor, Version(tensor.untyped_storage())) for tensor in results]
        overwrites = func._opname in OVERWRITES or "out" in kwargs
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


@dataclass(frozen=True)
class Program:
    """Steps that leave a tensor in ``result``, as plain data: ``sizes`` are the storages' bytes."""

    sizes: list[int]
    steps: list[dict[str, Any]]
    result: list[Any]

    @classmethod
    def of(cls, window: Window, steps: list[Step]) -> Program:
        """Write down the ``steps`` that led to ``window``.

        Raises:
            UnreplayableError: an argument that plain data cannot hold.
        """
        numbers: dict[int, int] = {}
        sizes: list[int] = []

        def encode(value: Any) -> Any:
            match value:
                case Window():
                    if numbers.setdefault(value.key, len(numbers)) == len(sizes):
                        sizes.append(value.version.storage.nbytes())
                    place = [_name(value.dtype), list(value.size), list(value.stride), value.offset]
                    return {"at": [numbers[value.key], *place]}
                case Literal():
                    return {"values": _values(value.tensor)}
                case torch.dtype():
                    return {"dtype": _name(value)}
                case torch.memory_format():
                    return {"format": _name(value)}
                case list() | tuple():
                    return [encode(item) for item in value]
                case float() if not math.isfinite(value):
                    return {"float": repr(value)}
                case None | bool() | int() | float() | str():
                    return value
                case _:
                    raise UnreplayableError(type(value).__name__)

        written = []
        for step in steps:
            if not isinstance(step.func, str) and step.func.namespace != "aten":
                raise UnreplayableError(str(step.func))
            kwargs = {k: v for k, v in step.kwargs.items() if k not in ("device", "layout", "pin_memory", "generator")}
            if _takes_dtype(step.func) and kwargs.get("dtype") is None:
                kwargs["dtype"] = step.results[0].dtype  # the default type of then, which a later run need not have
            written.append({
                "op": str(step.func),
                "args": encode([None if isinstance(arg, torch.Generator) else arg for arg in step.args]),
                "kwargs": {key: encode(value) for key, value in kwargs.items()},
                "results": encode(step.results),
            })  # fmt: skip
        return cls(sizes, written, encode(window)["at"])

    @property
    def random(self) -> bool:
        """Whether two runs with different seeds differ."""
        return any(_random(step["op"]) for step in self.steps)

    def run(self, seed: int) -> torch.Tensor:
        """Return a fresh tensor on the CPU, of the type it was made in; the global random numbers are left as they were.

        Raises:
            RequestError: some of its entries were never written.
        """
        storages: list[torch.UntypedStorage | None] = [None] * len(self.sizes)

        def at(number: int, dtype: str, size: list[int], stride: list[int], offset: int) -> torch.Tensor:
            storage = storages[number]
            if storage is None:
                storage = storages[number] = torch.UntypedStorage(self.sizes[number]).fill_(255)  # floats: NaN
            return torch.empty(0, dtype=getattr(torch, dtype), device="cpu").set_(storage, offset, size, stride)  # type: ignore[call-overload, no-any-return]

        def decode(value: Any) -> Any:
            match value:
                case {"at": place}:
                    return at(*place)
                case {"values": [dtype, shape, text]}:
                    data = bytearray(base64.b64decode(text))
                    return torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape)
                case {"dtype": name} | {"format": name}:
                    return getattr(torch, name)
                case {"float": text}:
                    return float(text)
                case list():
                    return [decode(item) for item in value]
                case _:
                    return value

        with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for step in self.steps:
                kwargs = {key: decode(value) for key, value in step["kwargs"].items()}
                out = _operation(step["op"])(*decode(step["args"]), **kwargs)
                fresh = [place["at"] for place in step["results"] if storages[place["at"][0]] is None]
                for (number, dtype, size, stride, offset), tensor in zip(fresh, _tensors(out), strict=False):
                    storage = tensor.untyped_storage()
                    same = (tensor.stride(), tensor.storage_offset()) == (tuple(stride), offset)
                    if same and storage.nbytes() == self.sizes[number]:
                        storages[number] = storage
                    else:
                        at(number, dtype, size, stride, offset).copy_(tensor)
            tensor = at(*self.result)
            if tensor.isnan().any():
                raise RequestError("a constructor leaves some entries as torch.empty gave them: fill the whole tensor.")
            return tensor

    @property
    def std(self) -> float:
        """Standard deviation of all entries, measured over runs until 2¹⁸ of them (or 16 runs) have been seen."""
        return _measured_std(json.dumps(self.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        """Return the program as JSON takes it."""
        return {"sizes": self.sizes, "steps": self.steps, "result": self.result}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Program:
        """Read `as_dict`'s data; a wrong shape of it raises KeyError, TypeError, ValueError or AttributeError."""
        sizes, steps, result = [int(size) for size in data["sizes"]], list(data["steps"]), list(data["result"])
        for step in steps:
            _operation(step["op"])
            if [type(step[key]) for key in ("args", "kwargs", "results")] != [list, dict, list]:
                raise TypeError(f"a step with {step['op']} is damaged")
        return cls(sizes, steps, result)


@functools.lru_cache(maxsize=256)  # the same program comes once per layer
def _measured_std(program: str) -> float:
    own = Program.from_dict(json.loads(program))
    with _disable_current_modes():
        first = own.run(0)
        runs = min(16, math.ceil(2**18 / first.numel())) if own.random else 1
        return torch.stack([first, *(own.run(seed) for seed in range(1, runs))]).double().std(correction=0).item()


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


@functools.cache
def _takes_dtype(func: Any) -> bool:
    return not isinstance(func, str) and any(argument.name == "dtype" for argument in func._schema.arguments)


def _window(tensor: torch.Tensor, version: Version) -> Window:
    return Window(version, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def _argument(place: int | str, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(place, str):
        return kwargs.get(place)
    return args[place] if place < len(args) else None


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _values(tensor: torch.Tensor) -> list[Any]:
    with _disable_current_modes():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnreplayableError("a tensor made before the model was built")
        if tensor.numel() > LITERAL:
            raise UnreplayableError(f"a table of {tensor.numel()} numbers from outside")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [_name(tensor.dtype), list(tensor.shape), base64.b64encode(bytes(flat.tolist())).decode()]


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _operation(name: str) -> Any:
    """Look an aten operation up; a plan from a file must not be able to name anything else."""
    if name == TRUNCATED:
        return torch.nn.init.trunc_normal_
    namespace, packet, overload = name.split(".")
    if namespace != "aten" or packet == "from_file":
        raise ValueError(f"{name} is no aten operation")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _random(name: str) -> bool:
    return name == TRUNCATED or torch.Tag.nondeterministic_seeded in _operation(name).tags
