"""Recorded operations as a small program of plain data, which is saved with a plan and run again for real.

Arguments are windows on numbered storages: views need no steps, and tensors that share memory share it again.
"""

from __future__ import annotations

import base64
import functools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import RequestError
from .recorder import tensors_in
from .windows import TRUNCATED, Literal, Step, Window

__all__ = ["Program", "UnreplayableError"]

LITERAL = 1 << 16  # numbers of a table from outside that a plan may carry


class UnreplayableError(Exception):
    """Names the operation that cannot be run again from numbers alone."""


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
                fresh = torch.full((self.sizes[number],), 255, dtype=torch.uint8, device="cpu")  # NaN, to any float
                storage = storages[number] = fresh.untyped_storage()
            return torch.empty(0, dtype=getattr(torch, dtype), device="cpu").set_(storage, offset, size, stride)

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
                for (number, dtype, size, stride, offset), tensor in zip(fresh, tensors_in(out), strict=False):
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
    def outside(self) -> bool:
        """Whether it is a table of numbers that were made outside of torch, such as numpy's draws."""
        return not self.random and any(_table(step["args"]) for step in self.steps)

    @property
    def mean(self) -> float:
        """Mean of all entries, measured as `std` is."""
        return _measured(json.dumps(self.as_dict()))[0]

    @property
    def std(self) -> float:
        """Standard deviation of all entries, measured over runs until 2¹⁸ of them (or 16 runs) have been seen."""
        return _measured(json.dumps(self.as_dict()))[1]

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
def _measured(program: str) -> tuple[float, float]:
    own = Program.from_dict(json.loads(program))
    with _disable_current_modes():
        first = own.run(0)
        runs = min(16, math.ceil(2**18 / first.numel())) if own.random else 1
        seen = torch.stack([first, *(own.run(seed) for seed in range(1, runs))]).double()
        return seen.mean().item(), seen.std(correction=0).item()


def _table(value: Any) -> bool:
    match value:
        case {"values": [_, shape, _]}:
            return math.prod(shape) > 1
        case list():
            return any(map(_table, value))
        case _:
            return False


@functools.cache
def _takes_dtype(func: Any) -> bool:
    return not isinstance(func, str) and any(argument.name == "dtype" for argument in func._schema.arguments)


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
