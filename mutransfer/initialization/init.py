"""Initializations as data: a distribution of independent entries or a program, drawn whole or shard by shard.

The steps of a program act on windows on numbered storages, so tensors that share memory share it again when the program is
run. Draws are made in tiles on a fixed grid, each with its own random numbers. A rank draws the tiles that its shard touches,
so the values are those of the unsharded parameter under any sharding, and replicas agree without communication.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch

from .._torch_internals import argument_schemas, disable_current_modes, local_shape_and_offset
from ..errors import InitError, RequestError
from .record import TRUNCATED, Constant, Step, Window, tensors_in

__all__ = ["Init", "Part", "Program", "UnreplayableError", "draw_"]

FAR = 40.0  # standard deviations beyond which a normal has no mass in double precision


@dataclass(frozen=True)
class Part:
    """A box of a parameter, as (first index, count, step) per axis, whose initialization differs from the rest."""

    box: tuple[tuple[int, int, int], ...]
    init: Init

    def inside(self, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """Return the part's share of a tile that begins at ``start``, as slices of the tile, or None if it has none."""
        slices = []
        for (first, count, step), low, size in zip(self.box, start, shape, strict=True):
            begin = first if first >= low else low + (first - low) % step
            end = min(first + (count - 1) * step + 1, low + size)
            if begin >= end:
                return None
            slices.append(slice(begin - low, end - low, step))
        return tuple(slices)


@dataclass(frozen=True)
class Init:
    """The initialization of one parameter.

    ``normal``: mean ``a``, standard deviation ``b``. ``uniform``: from ``a`` to ``b``. ``trunc_normal``: a normal with mean
    ``a`` and standard deviation ``b``, truncated to the interval from ``low`` to ``high``. ``constant``: ``a`` everywhere.
    ``recorded``: ``a`` times the result of ``program`` or, if ``b`` is not 0, that result scaled to standard deviation ``b``.
    ``parts`` are drawn over it, in their order.
    """

    kind: Literal["normal", "uniform", "trunc_normal", "constant", "recorded"]
    a: float
    b: float = 0.0
    low: float = 0.0
    high: float = 0.0
    parts: tuple[Part, ...] = ()
    program: Program | None = None

    @classmethod
    def truncated(cls, mean: float, std: float, low: float, high: float) -> Self:
        """Return a normal that is truncated to the interval from ``low`` to ``high``."""
        reach = FAR * std
        return cls("trunc_normal", mean, std, max(low, mean - reach), min(high, mean + reach))

    @property
    def fixed(self) -> bool:
        """Whether nothing is random: a constant or a table."""
        body = self.kind == "constant" or (self.program is not None and not self.program.random)
        return body and all(part.init.fixed for part in self.parts)

    @property
    def std(self) -> float:
        """Standard deviation of one entry outside of ``parts``; 0 for constants and tables."""
        match self.kind:
            case "normal":
                return self.b
            case "uniform":
                return (self.b - self.a) / math.sqrt(12)
            case "trunc_normal":
                return self._truncated_std()
            case "recorded":
                assert self.program is not None
                return self.b or (abs(self.a) * self.program.std if self.program.random else 0.0)
            case _:
                return 0.0

    def _truncated_std(self) -> float:
        """Return the standard deviation of a truncated normal.

        Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions 1, section 10.1.
        """
        alpha, beta = (self.low - self.a) / self.b, (self.high - self.a) / self.b
        low, high = (math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (alpha, beta))
        mass = _mass(alpha, beta)
        return self.b * math.sqrt(1 + (alpha * low - beta * high) / mass - ((low - high) / mass) ** 2)

    def scaled(self, factor: float) -> Init:
        """Return the distribution of ``factor`` times a draw."""
        a, b, low, high = (value * factor for value in (self.a, self.b, self.low, self.high))
        if factor < 0:  # mirroring keeps the spread of a normal and swaps bounds
            low, high = high, low
            a, b = (b, a) if self.kind == "uniform" else (a, -b)
        return self._with(lambda init: init.scaled(factor), a, b, low, high)

    def with_columns(self, columns: Sequence[tuple[int, int, int]], shape: Sequence[int], factor: float) -> Init:
        """Return this initialization with the entries (axis, begin, end) of a parameter drawn ``factor`` times as large."""
        parts = []
        for axis, begin, end in columns:
            box = tuple((begin, end - begin, 1) if dim == axis else (0, size, 1) for dim, size in enumerate(shape))
            parts.append(Part(box, self.scaled(factor)))
        return replace(self, parts=tuple(parts))

    def shifted(self, by: float) -> Init:
        """Return the distribution of a draw plus ``by``; not supported for recorded ones."""
        b = self.b + by * (self.kind == "uniform")
        return self._with(lambda init: init.shifted(by), self.a + by, b, self.low + by, self.high + by)

    def _with(self, change: Callable[[Init], Init], a: float, b: float, low: float, high: float) -> Init:
        parts = tuple(replace(part, init=change(part.init)) for part in self.parts)
        low, high = (low, high) if self.kind == "trunc_normal" else (0.0, 0.0)
        return replace(self, a=a, b=b, low=low, high=high, parts=parts)

    def clamped(self, low: float, high: float) -> Init | None:
        """Return the distribution truncated to new bounds, or None where clamping would pile up draws at the bounds."""
        if self.kind not in ("normal", "trunc_normal") or self.b <= 0:
            return None
        mean, reach = self.a, FAR * self.b
        old = (self.low, self.high) if self.kind == "trunc_normal" else (mean - reach, mean + reach)
        inner = max(low, old[0]), min(high, old[1])
        kept, whole = (_mass(*((bound - mean) / self.b for bound in bounds)) for bounds in (inner, old))
        return Init.truncated(mean, self.b, *inner) if kept > (1 - 1e-6) * whole else None

    def carried(self, target: Init, factor: float, gauge: float, matrix: bool) -> Init:
        """Return the target's initialization: this one, as observed at the base, in the layout observed for ``target``.

        Random entries get the base's standard deviation times ``factor``. Recorded ones that do not belong to a ``matrix`` and
        are not centered at 0 (norms, logarithms of time steps) get the target's own values times ``factor``. Constants and
        tables are only multiplied by ``gauge``, except for a matrix of numbers from outside, which gets the base's size times
        ``factor``.

        Raises:
            InitError: the two consist of different pieces.
        """
        if matrix and self.program and target.program and self.program.outside and target.program.outside:
            sizes = [math.hypot(program.mean, program.std) for program in (self.program, target.program)]
            return replace(target, b=target.program.std * factor * sizes[0] / sizes[1]) if sizes[1] else target
        if (self.fixed and target.fixed and (target.parts or target.program)) or (target.program and target.fixed):
            return target.scaled(gauge)
        if target.program is not None:
            centred = abs(target.program.mean) < target.program.std
            return replace(target, b=self.std * factor) if matrix or centred else target.scaled(factor)
        if self.program is not None:
            return target.scaled(gauge if target.fixed else self.std * factor / target.std)
        if len(self.parts) != len(target.parts):
            raise InitError(
                f"is initialized in {1 + len(self.parts)} pieces in the base and {1 + len(target.parts)} in the target: let the "
                "constructor initialize the same pieces at every size."
            )
        body = replace(self, parts=()).scaled(gauge if self.kind == "constant" else factor)
        pairs = zip(self.parts, target.parts, strict=True)
        return replace(
            body, parts=tuple(Part(at.box, base.init.carried(at.init, factor, gauge, matrix)) for base, at in pairs)
        )

    @torch.no_grad()
    def fill_(self, tensor: torch.Tensor, generator: torch.Generator, start: tuple[int, ...] | None = None) -> None:
        """Overwrite ``tensor`` with a draw; with ``start``, it is the tile of a larger parameter that begins there."""
        match self.kind:
            case "normal":
                tensor.normal_(self.a, self.b, generator=generator)
            case "uniform":
                tensor.uniform_(self.a, self.b, generator=generator)
            case "trunc_normal":
                tensor.normal_(self.a, self.b, generator=generator)
                outside = (tensor < self.low) | (tensor > self.high)
                if outside.any():  # trunc_normal_ on the whole tensor would redraw all of it in every round
                    again = tensor.new_empty(int(outside.sum()))
                    numbers = self.a, self.b, self.low, self.high
                    tensor[outside] = torch.nn.init.trunc_normal_(again, *numbers, generator=generator)
            case "constant":
                tensor.fill_(self.a)
            case "recorded":
                tensor.copy_(self._replayed(generator))
        start = start or (0,) * tensor.dim()
        for part in self.parts:
            slices = part.inside(start, tuple(tensor.shape))
            if slices is not None:
                part.init.fill_(tensor[slices], generator)

    def _replayed(self, generator: torch.Generator) -> torch.Tensor:
        assert self.program is not None
        made = self.program.run(int(torch.randint(2**62, (), generator=generator))).float()
        spread = made.double().std(correction=0).item() if self.b else 0.0
        return made.mul_(math.copysign(self.b / spread, self.a) if spread else self.a)

    def as_dict(self) -> dict[str, Any]:
        """Return the initialization as JSON data, without empty keys."""
        data: dict[str, Any] = {"kind": self.kind, "a": self.a, "b": self.b}
        if self.kind == "trunc_normal":
            data |= {"low": self.low, "high": self.high}
        if self.parts:
            data["parts"] = [{"box": [list(axis) for axis in p.box], "init": p.init.as_dict()} for p in self.parts]
        return data if self.program is None else data | {"program": self.program.as_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Init:
        """Read `as_dict`'s data; damaged data raises AttributeError, KeyError, TypeError or ValueError."""
        if data["kind"] not in ("normal", "uniform", "trunc_normal", "constant", "recorded"):
            raise ValueError(f"unknown initialization {data['kind']!r}")
        parts = tuple(
            Part(
                tuple((int(first), int(count), int(step)) for first, count, step in part["box"]),
                cls.from_dict(part["init"]),
            )
            for part in data.get("parts", ())
        )
        program = Program.from_dict(data["program"]) if data["kind"] == "recorded" else None
        fields = {key: value for key, value in data.items() if key not in ("parts", "program")}
        init = cls(**fields, parts=parts, program=program)
        if not all(math.isfinite(value) for value in (init.a, init.b, init.low, init.high)):
            raise ValueError(f"a number of a {init.kind} initialization is not finite")
        return init


def _mass(alpha: float, beta: float) -> float:
    """Return the probability of a standard normal between the two bounds.

    If both bounds are on one side, it is computed from the tails, which is more accurate there.
    """
    if alpha > 0:
        return (math.erfc(alpha / math.sqrt(2)) - math.erfc(beta / math.sqrt(2))) / 2
    if beta < 0:
        return _mass(-beta, -alpha)
    return (math.erf(beta / math.sqrt(2)) - math.erf(alpha / math.sqrt(2))) / 2


LITERAL = 1 << 16  # largest number of entries of a table from outside that a plan may store


class UnreplayableError(Exception):
    """An operation cannot be run again from numbers alone; the message names it."""


@dataclass(frozen=True)
class Program:
    """Steps that compute the tensor at ``result``, as plain data; ``sizes`` are the sizes of the storages in bytes."""

    sizes: list[int]
    steps: list[dict[str, Any]]
    result: list[Any]

    @classmethod
    def of(cls, window: Window, steps: list[Step]) -> Program:
        """Encode the ``steps`` that led to ``window``.

        Raises:
            UnreplayableError: an argument cannot be stored as plain data.
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
                case Constant():
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
                kwargs["dtype"] = step.results[0].dtype  # the default dtype at recording; a later run may have another
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
        """Return a new CPU tensor of the recorded dtype; the global random state is left unchanged.

        Raises:
            InitError: some of its entries were never written.
        """
        storages: list[torch.UntypedStorage | None] = [None] * len(self.sizes)

        def at(number: int, dtype: str, size: list[int], stride: list[int], offset: int) -> torch.Tensor:
            storage = storages[number]
            if storage is None:
                fresh = torch.full((self.sizes[number],), 255, dtype=torch.uint8, device="cpu")  # NaN as any float
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

        with disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
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
                raise InitError("a constructor leaves some entries of torch.empty unfilled: fill the whole tensor.")
            return tensor

    @property
    def outside(self) -> bool:
        """Whether it is a table of numbers created outside of torch, such as numpy's draws."""
        return not self.random and any(_table(step["args"]) for step in self.steps)

    @property
    def mean(self) -> float:
        """Mean of all entries, measured in the same way as `std`."""
        return _measured(json.dumps(self.as_dict()))[0]

    @property
    def std(self) -> float:
        """Standard deviation of all entries, measured over runs until 2¹⁸ of them (or 16 runs) have been seen."""
        return _measured(json.dumps(self.as_dict()))[1]

    def as_dict(self) -> dict[str, Any]:
        """Return the program as JSON data."""
        return {"sizes": self.sizes, "steps": self.steps, "result": self.result}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Program:
        """Read `as_dict`'s data; malformed data raises KeyError, TypeError, ValueError or AttributeError."""
        sizes, steps, result = [int(size) for size in data["sizes"]], list(data["steps"]), list(data["result"])
        for step in steps:
            _operation(step["op"])
            if [type(step[key]) for key in ("args", "kwargs", "results")] != [list, dict, list]:
                raise TypeError(f"a step with {step['op']} is damaged")
        return cls(sizes, steps, result)


@functools.lru_cache(maxsize=256)  # every layer may have the same program
def _measured(program: str) -> tuple[float, float]:
    decoded = Program.from_dict(json.loads(program))
    with disable_current_modes():
        first = decoded.run(0)
        runs = min(16, math.ceil(2**18 / first.numel())) if decoded.random else 1
        seen = torch.stack([first, *(decoded.run(seed) for seed in range(1, runs))]).double()
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
    return not isinstance(func, str) and any(argument.name == "dtype" for argument in argument_schemas(func))


def _values(tensor: torch.Tensor) -> list[Any]:
    with disable_current_modes():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnreplayableError("a tensor made before the model was built")
        if tensor.numel() > LITERAL:
            raise UnreplayableError(f"a table of {tensor.numel()} numbers from outside")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [_name(tensor.dtype), list(tensor.shape), base64.b64encode(bytes(flat.tolist())).decode()]


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _operation(name: str) -> Any:
    """Return an aten operation by name, and nothing else: the name may come from a plan's file."""
    if name == TRUNCATED:
        return torch.nn.init.trunc_normal_
    namespace, packet, overload = name.split(".")
    if namespace != "aten" or packet == "from_file":
        raise ValueError(f"{name} is not an aten operation")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _random(name: str) -> bool:
    return name == TRUNCATED or torch.Tag.nondeterministic_seeded in _operation(name).tags


# Tile size: large enough to draw at full speed, small enough to waste little on a thin shard; wide, because most
# sharding splits rows.
COLUMNS, ENTRIES = 4096, 1 << 16


@torch.no_grad()
def draw_(parameter: torch.Tensor, init: Init, seed: int, name: str) -> None:
    """Overwrite ``parameter``, or this rank's shard of it (a DTensor), with a draw that depends only on seed and name.

    Values are drawn in float32 on the CPU and copied, so they are the same on every device. A recorded ``init`` needs memory
    for the whole parameter on every rank.

    Raises:
        RequestError: the parameter has no memory yet, or its sharding gives a rank something other than a box of it.
    """
    if parameter.is_meta:
        raise RequestError(f"{name} is on the meta device: call model.to_empty(device=...) before initialize.")
    shape, local, start = tuple(parameter.shape), parameter, (0,) * parameter.dim()
    if hasattr(parameter, "placements"):
        local, start = _shard(parameter, name)
    if init.program is not None:
        whole = torch.empty(shape, dtype=torch.float32, device="cpu")
        _draw(init, whole, (0,) * len(shape), f"{seed}/{name}")
        local.copy_(whole[_box(start, tuple(local.shape))])
        return
    direct = local.dtype == torch.float32 and local.device.type == "cpu"
    region = local.detach() if direct else torch.empty(local.shape, dtype=torch.float32, device="cpu")
    _fill(init, region, shape, start, f"{seed}/{name}")
    if not direct:
        local.copy_(region)


def _fill(init: Init, region: torch.Tensor, shape: tuple[int, ...], start: tuple[int, ...], seed: str) -> None:
    """Draw ``region``, the box that begins at ``start`` in a parameter of ``shape``, tile by tile."""
    size, tile = tuple(region.shape), _tile_shape(shape)
    if not region.numel():
        return
    memory = torch.empty(math.prod(tile), dtype=torch.float32, device="cpu")
    grid = (range(low // step, -(-(low + n) // step)) for low, n, step in zip(start, size, tile, strict=True))
    for index in itertools.product(*grid):
        corner = tuple(i * step for i, step in zip(index, tile, strict=True))
        extent = tuple(min(step, whole - low) for step, whole, low in zip(tile, shape, corner, strict=True))
        low = tuple(map(max, corner, start))
        high = tuple(min(c + e, s + n) for c, e, s, n in zip(corner, extent, start, size, strict=True))
        count = tuple(h - b for h, b in zip(high, low, strict=True))
        share = region[_box(tuple(b - s for b, s in zip(low, start, strict=True)), count)]
        whole = count == extent and share.is_contiguous()
        drawn = share if whole else memory[: math.prod(extent)].view(extent)
        _draw(init, drawn, corner, f"{seed}/{index}")
        if not whole:
            share.copy_(drawn[_box(tuple(b - c for b, c in zip(low, corner, strict=True)), count)])


def _draw(init: Init, tensor: torch.Tensor, start: tuple[int, ...], seed: str) -> None:
    digest = hashlib.sha256(seed.encode()).digest()
    init.fill_(tensor, torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63), start)


def _tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tile, which depends only on the whole parameter.

    Tiles extend over columns first, then rows, then the leading axes.
    """
    tile: list[int] = []
    left = ENTRIES
    for axis, size in enumerate(reversed(shape)):
        limit = min(left, COLUMNS) if axis == 0 and len(shape) > 1 else left
        tile.append(max(1, min(size, limit)))
        left //= tile[-1]
    return tuple(reversed(tile))


def _box(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(low, low + count) for low, count in zip(start, size, strict=True))


def _shard(parameter: Any, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    local = parameter.to_local()
    size, start = local_shape_and_offset(parameter)
    if any(placement.is_partial() for placement in parameter.placements) or tuple(size) != tuple(local.shape):
        raise RequestError(
            f"{name} has the placements {parameter.placements}, but initialize fills only shards and replicas: "
            "redistribute it first."
        )
    return local, tuple(start)
