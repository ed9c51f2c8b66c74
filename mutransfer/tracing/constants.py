"""Powers of a size in the numbers of a forward pass, from two passes: which parameter each could be written on, if any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .dataflow import Use
from .scales import Factors

__all__ = ["Constant", "common", "constants", "loose"]

Taken = frozenset[tuple[float, float]]


@dataclass(frozen=True)
class Constant:
    """What the forward pass multiplies the result of one use with: a power of the size.

    ``inside`` says that the module which owns the parameter does it; ``torn`` that not all that takes the result in sees
    that number, so that it cannot be written on the parameter.
    """

    power: float = 0.0
    inside: bool = False
    torn: bool = False


def constants(seen: Sequence[Use], larger: Sequence[Use], ratio: float) -> list[Constant]:
    """Return the constant of every use in ``seen``; the model of ``larger`` is ``ratio`` times as large."""
    if len(seen) == len(larger):
        return [_compared(a.taken, b.taken, (a.inner, b.inner), ratio) for a, b in zip(seen, larger, strict=True)]
    # As many uses as a loop has rounds: what they have in common is all that can be compared.
    both = [frozenset().union(*(use.taken for use in uses)) for uses in (seen, larger)]
    inner = [next((use.inner for use in uses), 1.0) for uses in (seen, larger)]
    return [_compared(both[0], both[1], (inner[0], inner[1]), ratio)] * len(seen)


def common(found: Sequence[Constant]) -> Constant:
    """Return what all uses have in common; otherwise nothing, as a parameter has one scale for all of them."""
    return found[0] if found and len(set(found)) == 1 and not found[0].torn else Constant()


def loose(seen: Factors, larger: Factors, ratio: float) -> list[float]:
    """Return the powers of numbers that are on no parameter's result."""
    found = set()
    before, after = seen.loose, larger.loose
    for module, a in before.items():
        b = after.get(module, set())
        if a != b and len(a) == len(b):
            found |= {_power(x, y, ratio) for x, y in zip(sorted(a), sorted(b), strict=True)}
    return sorted(found - {0.0})


def _compared(taken: Taken, larger: Taken, inner: tuple[float, float], ratio: float) -> Constant:
    before, after = _net(taken), _net(larger)
    if before == after:
        return Constant()
    if len(before) != len(after):
        return Constant(torn=True)
    powers = {_power(a, b, ratio) for a, b in zip(before, after, strict=True)}
    if powers == {0.0}:
        return Constant()
    torn = len(powers) > 1 or {residual for _, residual in taken} != {residual for _, residual in larger}
    power = max(powers, key=abs)
    return Constant(power, inside=_power(*inner, ratio) == power, torn=torn)


def _net(taken: Iterable[tuple[float, float]]) -> list[float]:
    return sorted({float(f"{factor * residual:.6g}") for factor, residual in taken})


def _power(before: float, after: float, ratio: float) -> float:
    return round(math.log(after / before, ratio), 4) if before and after / before > 0 else 0.0
