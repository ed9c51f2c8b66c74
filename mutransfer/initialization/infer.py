"""Infer a parameter's initialization by running its constructor's operations on distributions instead of numbers.

`InitTracer` runs under `FakeTensorMode`, so a model of any size is built without memory. A parameter whose entries are
independent draws becomes a distribution; any other is stored as a program that can be run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._torch_internals import disable_current_modes
from ..errors import InitError
from .init import Init, Part, Program, UnreplayableError
from .record import TRUNCATED, Constant, OperationRecorder, Step, Window, apart, box, steps_to

__all__ = ["DistributionPropagation", "InitTracer", "arguments", "one_number"]

PIECES = 64  # with more parts, a parameter is recorded as a program
COPIES = frozenset(["copy_", "clone", "_to_copy", "lift_fresh", "detach", "lift"])


@dataclass
class DistributionPropagation:
    """Runs recorded steps on distributions; ``layers`` maps each storage to its (window, distribution) writes, latest last."""

    layers: dict[int, list[tuple[Window, Init]]] = field(default_factory=dict)

    def result(self, steps: list[Step], window: Window) -> Init | None:
        """Return the distribution of ``window`` after the steps, or None if its entries are not independent draws.

        Raises:
            UnreplayableError: part of it was never written.
        """
        if not all(len(step.results) == 1 and self._run(step, step.results[0]) for step in steps) or window.repeats:
            return None
        parts: list[Part] = []
        for place, init in reversed(self.layers.get(window.key, [])):
            if place.whole or place.place == window.place:
                return replace(
                    init, parts=tuple(part for part in reversed(parts) if part.init != init or not init.fixed)
                )
            if not apart(place, window):
                where = box(place, window)
                if where is None:
                    return None
                parts.append(Part(where, init))
        return _tiled(parts, window)

    def _run(self, step: Step, target: Window) -> bool:
        if step.name in COPIES:
            source = step.args[step.name == "copy_"]
            layers = self.layers.get(source.key, []) if isinstance(source, Window) else []
            if len(layers) > 1 and source.whole and target.whole and source.place == target.place:
                self.layers[target.key] = [
                    (replace(place, version=target.version, dtype=target.dtype), init) for place, init in layers
                ]
                return True
            return self._write(target, self._read(source))
        values = [self._value(arg) for arg in step.args]
        random = [value for value in values if isinstance(value, Window)]
        if (drawn := _drawn(step, values)) is not None:
            return self._write(target, drawn)
        if not random:
            return self._write(target, self._constant(step, values))
        change = _change(step, values)
        inputs = [arg for arg in step.args if isinstance(arg, Window) and self._value(arg) is arg]
        if len(inputs) != 1 or change is None or math.prod(inputs[0].size) != math.prod(target.size):
            return False
        layers = self.layers.get(target.key, [])
        if len(layers) > 1 and target.whole and inputs[0].key == target.key and inputs[0].place == target.place:
            changed = [(place, change(init)) for place, init in layers]
            self.layers[target.key] = [(place, init) for place, init in changed if init is not None]
            return len(self.layers[target.key]) == len(layers)
        init = self._read(inputs[0])
        return init is not None and self._write(target, change(init))

    def _read(self, source: Window | Constant) -> Init | None:
        if isinstance(source, Constant):
            return one_number(source.tensor)
        for place, init in reversed(self.layers.get(source.key, [])):
            if place.whole or place.place == source.place:
                return None if source.repeats and not init.fixed else init
            if not apart(place, source):
                return None
        return None

    def _write(self, target: Window, init: Init | None) -> bool:
        if init is None or target.repeats:
            return False
        layers = self.layers.setdefault(target.key, [])
        if target.whole:
            layers.clear()
        layers.append((target, init))
        return len(layers) <= PIECES

    def _value(self, arg: Any) -> Any:
        """Return the argument, replacing a tensor by a number if all its entries are that number."""
        if isinstance(arg, Window | Constant):
            init = self._read(arg)
            return float(init.a) if init is not None and init.kind == "constant" else arg
        return float(arg) if isinstance(arg, int | float) and not isinstance(arg, bool) else arg

    def _constant(self, step: Step, values: list[Any]) -> Init | None:
        """Run an entrywise step on tensors that each hold a single number in all entries."""
        if isinstance(step.func, str) or torch.Tag.pointwise not in step.func.tags or step.random:
            return None
        with disable_current_modes():
            args = [
                torch.full((1,), value, dtype=arg.dtype) if isinstance(arg, Window) else arg
                for value, arg in zip(values, step.args, strict=True)
            ]
            if any(isinstance(arg, Constant | list) for arg in args) or any(isinstance(v, Constant) for v in values):
                return None
            return Init("constant", step.func(*args, **step.kwargs).item())


def _drawn(step: Step, values: list[Any]) -> Init | None:
    number = [value for value in values if isinstance(value, float)]
    match step.name:
        case "normal_":
            return Init("normal", *arguments(step, ("mean", 0.0), ("std", 1.0)))
        case "normal" if number and not any(isinstance(value, Window | Constant) for value in values):
            return Init("normal", number[0], number[1] if len(number) > 1 else 1.0)
        case "uniform_":
            return Init("uniform", *arguments(step, ("from", 0.0), ("to", 1.0)))
        case "trunc_normal_":
            return Init.truncated(*map(float, step.args[1:]))
        case "randn" | "randn_like":
            return Init("normal", 0.0, 1.0)
        case "rand" | "rand_like":
            return Init("uniform", 0.0, 1.0)
        case "zero_" | "zeros" | "zeros_like" | "new_zeros":
            return Init("constant", 0.0)
        case "ones" | "ones_like" | "new_ones":
            return Init("constant", 1.0)
        case "fill_" | "fill" | "full" | "full_like" | "new_full" if number:
            return Init("constant", number[-1])
        case _:
            return None


def _change(step: Step, values: list[Any]) -> Callable[[Init], Init | None] | None:
    """Return how a step on one random tensor and numbers changes its distribution, or None if that is not known."""
    alpha = float(step.kwargs.get("alpha", 1))
    match step.name.rstrip("_"), values:
        case ("mul", [float(c), Window()]) | ("mul", [Window(), float(c)]):
            return lambda init: init.scaled(c)
        case "div", [Window(), float(c)] if "rounding_mode" not in step.kwargs and c:
            return lambda init: init.scaled(1 / c)
        case "neg", [Window()]:
            return lambda init: init.scaled(-1)
        case "add", [Window(), float(c)]:
            return lambda init: init.shifted(alpha * c)
        case "add", [float(c), Window()]:
            return lambda init: init.scaled(alpha).shifted(c)
        case "sub", [Window(), float(c)]:
            return lambda init: init.shifted(-alpha * c)
        case ("sub", [float(c), Window()]) | ("rsub", [Window(), float(c)]) if alpha == 1:
            return lambda init: init.scaled(-1).shifted(c)
        case "clamp", [Window(), *_]:
            low, high = (*values[1:], None, None)[:2]
            low, high = step.kwargs.get("min", low), step.kwargs.get("max", high)
            return lambda init: init.clamped(-math.inf if low is None else low, math.inf if high is None else high)
        case "erfinv", [Window()]:
            return _erfinv
        case _:
            return None


def _erfinv(init: Init) -> Init | None:
    """Return the distribution of erfinv on a uniform draw: a truncated normal (`trunc_normal_` until torch 2.12)."""
    if init.kind != "uniform" or init.a < -1 or init.b > 1:
        return None
    with disable_current_modes():
        low, high = torch.tensor([init.a, init.b], dtype=torch.float64).erfinv().tolist()
    return Init.truncated(0.0, math.sqrt(0.5), low, high)


def arguments(step: Step, *named: tuple[str, float]) -> tuple[float, float]:
    """Return the two parameters of a draw, given by position, by name or by default."""
    positional = step.args[1:]
    first, second = (
        float(positional[i] if len(positional) > i else step.kwargs.get(name, default))
        for i, (name, default) in enumerate(named)
    )
    return first, second


def one_number(tensor: torch.Tensor) -> Init | None:
    """Return the constant that a tensor from outside holds in all entries, or None if they differ."""
    with disable_current_modes():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel() or tensor.is_complex():
            return None
        first = tensor.detach().flatten()[0]
        return Init("constant", float(first)) if bool((tensor == first).all()) else None


def _tiled(parts: list[Part], window: Window) -> Init | None:
    """Combine parts that cover the window into one initialization, or return None if they overlap.

    Raises:
        UnreplayableError: the parts leave a gap.
    """
    if any(_meet(a.box, b.box) for i, a in enumerate(parts) for b in parts[:i]):
        return None
    if sum(math.prod(count for _, count, _ in part.box) for part in parts) != math.prod(window.size):
        raise UnreplayableError("torch.empty, only partly filled")
    *rest, first = parts
    return replace(first.init, parts=tuple(reversed(rest)))


def _meet(a: tuple[tuple[int, int, int], ...], b: tuple[tuple[int, int, int], ...]) -> bool:
    return all(
        set(range(f, f + n * s, s)) & set(range(g, g + m * t, t)) for (f, n, s), (g, m, t) in zip(a, b, strict=True)
    )


SMALL = 1 << 20  # bytes up to which a table is computed at once, as it may be a constant


class InitTracer(OperationRecorder):
    """Records a constructor; `find` then returns how one of its tensors was initialized."""

    def find(self, tensor: torch.Tensor) -> Init | str:
        """Return the tensor's initialization, or the name of the operation that cannot be run again."""
        window = self.window(tensor)
        if isinstance(window, Constant):
            return "no operation seen"
        if window.version.step is None:
            return "torch.empty, never filled"
        steps = steps_to(window.version)
        try:
            return DistributionPropagation().result(steps, window) or _recorded(Program.of(window, steps))
        except UnreplayableError as reason:
            return str(reason)

    def named(self, model: torch.nn.Module) -> dict[str, Init]:
        """Return the initialization of every parameter of the model that was built under this recorder.

        Raises:
            InitError: an initialization cannot be determined; the message gives the parameter's name and shape and the
                operation.
        """
        inits = {}
        for name, parameter in model.named_parameters():
            init = self.find(parameter)
            if isinstance(init, str):
                raise InitError(
                    f"cannot tell how {name} {list(parameter.shape)} is initialized ({init}): fill it in the model's "
                    "constructor from torch's own operations, such as normal_, uniform_ or a constant."
                )
            inits[name] = init
        return inits

    def value(self, scalar: torch.Tensor) -> float | bool | None:
        """Return the value of ``scalar``, computed for real, or None if it depends on random numbers or cannot be computed.

        In the rejection loop of `trunc_normal_`, return False: no draw lies outside of the bounds.
        """
        if self._truncates(scalar):
            return False
        window = self.window(scalar)
        if isinstance(window, Constant):
            return None
        try:
            program = Program.of(window, steps_to(window.version))
        except UnreplayableError:
            return None
        with disable_current_modes():
            return None if program.random else program.run(0).item()

    def _truncates(self, condition: torch.Tensor) -> bool:
        """Detect the rejection loop of `torch.nn.init.trunc_normal_` (either implementation) and record its bounds."""
        window = self.window(condition)
        match _behind(window, "any", "bitwise_or", "lt", "normal_"), _behind(window, "any", "gt"):
            case [[_, either, below, draw], _] if above := _behind(either.args[1], "gt"):
                bounds = below.args[1], above[0].args[1]
                mean, std = arguments(draw, ("mean", 0.0), ("std", 1.0))
            case [_, [_, pending]] if chain := _behind(
                pending.args[1], "sub_", "mul_", "pow_", "div_", "sub_", "copy_"
            ):
                *_, divided, shifted, copied = chain
                uniform = _behind(copied.args[1], "uniform_")
                if not uniform:
                    return False
                draw, mean, std = uniform[0], shifted.args[1], divided.args[1]
                bounds = arguments(draw, ("from", 0.0), ("to", 1.0))
            case _:
                return False
        drawn = draw.results[0]
        if self._versions[drawn.key] is not drawn.version:
            return False
        self.put(TRUNCATED, [draw.args[0], mean, std, *bounds], {}, [drawn])
        return True


def _recorded(program: Program) -> Init:
    if not program.random and sum(program.sizes) <= SMALL:
        constant = one_number(program.run(0))
        if constant is not None:
            return constant
    return Init("recorded", 1.0, program=program)


def _behind(value: Any, *names: str) -> list[Step]:
    """Return the last steps that led to a tensor, the latest first, following each step's first argument.

    The list is empty if the names of the steps are not ``names``.
    """
    steps: list[Step] = []
    for name in names:
        step = value.version.step if isinstance(value, Window) else None
        if step is None or step.name != name:
            return []
        steps.append(step)
        value = step.args[0]
    return steps
