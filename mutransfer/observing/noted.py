"""What is noted of one forward pass: uses of parameters, attentions, and numbers multiplied in."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Attention", "Constant", "Use"]


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
    and ``operands`` are the result's and the other operands' places in the graph.
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


@dataclass
class Attention:
    """One softmax over scaled dot products: head dim, scale, and the parameters that carry a factor into the queries.

    ``others`` are the parameters that the keys and, where the operation is fused, the values depend on through them alone.
    """

    head_dim: int
    scale: float
    others: frozenset[str]
    queries: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Constant:
    """A number that the forward pass multiplies with a tensor that depends on parameters.

    ``carriers`` are the parameters on which the number could as well be written; ``module`` does the multiplication.
    """

    value: float
    carriers: frozenset[str]
    module: str
