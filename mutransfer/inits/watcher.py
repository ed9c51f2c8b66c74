"""A model's own initialization, read off its constructor's operations.

`InitWatcher` runs under `FakeTensorMode`, so that a model of any size is "built" without memory. What led to a parameter
is folded into a distribution of independent entries where it is one; anything else is kept as a program to run again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import RequestError
from .distributions import Folding, arguments, one_number
from .draws import Init
from .recorder import Recorder, steps_to
from .replay import Program, UnreplayableError
from .windows import TRUNCATED, Literal, Step, Window

__all__ = ["InitWatcher"]

SMALL = 1 << 20  # bytes of a table that is looked at right away: it may be a constant after all


class InitWatcher(Recorder):
    """Watches a constructor; `find` then tells what one of its tensors starts from."""

    def find(self, tensor: torch.Tensor) -> Init | str:
        """Return the tensor's initialization, or the name of the operation that cannot be run again."""
        window = self.window(tensor)
        if isinstance(window, Literal):
            return "none seen"
        if window.version.step is None:
            return "torch.empty, never filled"
        steps = steps_to(window.version)
        try:
            return Folding().result(steps, window) or _recorded(Program.of(window, steps))
        except UnreplayableError as reason:
            return str(reason)

    def named(self, model: torch.nn.Module) -> dict[str, Init]:
        """Return the initialization of every parameter of the model that was built under this watcher.

        Raises:
            RequestError: one of them cannot be told, with its name, shape and the operation seen.
        """
        inits = {}
        for name, parameter in model.named_parameters():
            init = self.find(parameter)
            if isinstance(init, str):
                raise RequestError(
                    f"cannot tell how {name} {list(parameter.shape)} is initialized ({init}): fill it in the model's "
                    "constructor from torch's own operations, such as normal_, uniform_ or a constant."
                )
            inits[name] = init
        return inits

    def value(self, scalar: torch.Tensor) -> float | bool | None:
        """Run what is not random for real, and tell `trunc_normal_` that nothing it drew lies outside of its bounds."""
        if self._truncates(scalar):
            return False
        window = self.window(scalar)
        if isinstance(window, Literal):
            return None
        try:
            program = Program.of(window, steps_to(window.version))
        except UnreplayableError:
            return None
        with _disable_current_modes():
            return None if program.random else program.run(0).item()

    def _truncates(self, condition: torch.Tensor) -> bool:
        """See the rejection loop of `torch.nn.init.trunc_normal_` (both of its ways), and note its bounds."""
        asked = self.window(condition)
        match _behind(asked, "any", "bitwise_or", "lt", "normal_"), _behind(asked, "any", "gt"):
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
    """Return the last steps behind a tensor, each on the first argument of the one before; empty if they are others."""
    steps: list[Step] = []
    for name in names:
        step = value.version.step if isinstance(value, Window) else None
        if step is None or step.name != name:
            return []
        steps.append(step)
        value = step.args[0]
    return steps
