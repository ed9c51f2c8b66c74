"""What is noted of one forward pass: uses of parameters, and attentions."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Attention", "Use"]


@dataclass(frozen=True)
class Use:
    """One use of one parameter: the operation, what became of each axis, and what it met.

    ``carriers`` are the parameters that jointly carry a factor into this use's other operand: multiplying all of
    them by c multiplies that operand by c. It is where a multiplier before a shared matrix can be folded.
    ``on_data`` says that the other operand depends on no parameter at all: this is where data enters the model.
    ``feature`` says that the result meets another contracted parameter downstream, ``logit`` that it is first normalized
    over its entries (softmax, topk), as a router's is, or weights other values through a sigmoid, as a gate's does.
    ``alone`` says that it acts on a parameter, not on activations. ``shift`` is s for a gain used as s + w. ``summed`` is
    how many entries of each axis are summed over: of an axis labelled "in", perhaps only a part (see `settled`). ``node``
    and ``operands`` are the result's and the other operands' places in the graph. ``taken`` are the numbers (and residuals,
    `factors`) that the result has been multiplied with where the nodes ``takers`` take it in, ``inner`` what the
    parameter's own module multiplied in.
    """

    op: str
    axes: tuple[str, ...]
    carriers: frozenset[str]
    on_data: bool
    node: int
    operands: tuple[int, ...]
    shift: float = 0.0
    feature: bool = False
    logit: bool = False
    alone: bool = False
    summed: tuple[int, ...] = ()
    taken: frozenset[tuple[float, float]] = frozenset()
    takers: frozenset[int] = frozenset()
    inner: float = 1.0


@dataclass(frozen=True)
class Attention:
    """One softmax over scaled dot products: head dim, scale, and the parameters that carry a factor into the queries.

    ``others`` are the parameters that the keys and, where the operation is fused, the values depend on through them alone;
    ``uses`` those whose results the queries are; ``keys`` carry a factor into the keys.
    """

    head_dim: int
    scale: float
    others: frozenset[str]
    queries: frozenset[str]
    uses: frozenset[int]
    keys: frozenset[str] = frozenset()
