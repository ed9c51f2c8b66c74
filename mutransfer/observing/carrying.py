"""Which parameters carry a factor through an operation: multiplying all of them by c multiplies its result by c."""

from __future__ import annotations

from collections.abc import Sequence

from . import operations as ops
from .flows import Flow, union

__all__ = ["carried"]


def carried(name: str, flows: Sequence[Flow], rooted: Sequence[bool]) -> int:
    """Return the parameters that carry a factor into the result of an operation, as bits.

    Args:
        name: of the operation.
        flows: of its inputs.
        rooted: which of them are parameters.
    """
    own = [each.carries for each, is_root in zip(flows, rooted, strict=True) if is_root]
    if name in ops.CONTRACTIONS and len(flows) > 1 and not any(rooted):  # weights and the values that they weight
        return _product(name, flows[-2:][::-1], [])
    if name in ops.CONTRACTIONS or name in ops.AFFINE_NORMS:
        return union(own) if all(own) else 0  # a bias alone does not carry what a weight of fixed size makes
    if name in ops.PRODUCTS and flows:
        return _product(name, flows, own)
    if name in ops.WRITES:  # into a blank tensor, what is written
        flows = [each for each in flows if each.depends]
    if name in ops.LINEAR and flows and all(each.carries for each in flows):
        return union(each.carries for each in flows)
    return 0


def _product(name: str, flows: Sequence[Flow], own: list[int]) -> int:
    """A product carries what one side carries, if the other side does not depend on it (as in x·sigmoid(x))."""
    if own and not name.startswith("div"):
        return own[0]
    sides = flows[:1] if name.startswith("div") else flows
    for side in sides:
        others = union(other.depends for other in flows if other is not side)
        if side.carries and not side.carries & others:
            return side.carries
    return 0
