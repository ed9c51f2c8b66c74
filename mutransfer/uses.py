"""How one forward pass uses every parameter: which axis is contracted, gathered, or met entry by entry.

A `TorchDispatchMode` sees every operation after torch has broken it down, so `nn.Linear`, an einsum and a raw matmul look
alike. A parameter is known by its storage and an axis by its stride, so views and transposes need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .operations import AFFINE_NORMS, CONTRACTIONS, ENTRYWISE, LINEAR, PRODUCTS, TRANSPOSED_CONVOLUTION

__all__ = ["Use", "UseWatcher"]


@dataclass(frozen=True)
class Use:
    """One use of one parameter: the operation, what became of each axis, and what it met.

    ``carriers`` are the parameters that jointly carry a factor into this use's other operand: multiplying all of
    them by c multiplies that operand by c. It is where a multiplier before a shared matrix can be folded.
    ``on_data`` says that the other operand depends on no parameter at all: this is where data enters the model.
    ``feature`` says that the result meets another contracted parameter downstream, so that it is no logit.
    """

    op: str
    axes: tuple[str, ...]
    carriers: frozenset[str]
    on_data: bool
    feature: bool = False


@dataclass
class Flow:
    """What a tensor depends on: parameters and uses of them at all, and the parameters that carry a factor into it.

    Sets as bits: bit i is parameter i, or use i in the order seen. ``factor`` collects the constants multiplied in since
    the last parameter; ``product`` is set on the product of two activations: the size summed over, and the parameters
    that carry a factor into the first and into the second of them.
    """

    depends: int = 0
    carries: int = 0
    uses: int = 0
    factor: float = 1.0
    product: tuple[int, int, int] | None = None


@dataclass
class Attention:
    """One softmax over scaled dot products: head dim, scale, and the parameters that carry a factor into the queries.

    ``others`` are the parameters that the keys and, where the operation is fused, the values depend on through them alone.
    """

    head_dim: int
    scale: float
    others: frozenset[str]
    queries: frozenset[str] = field(default_factory=frozenset)


class UseWatcher(TorchDispatchMode):
    """Watch a forward pass of ``model``; ask `uses` afterwards.

    Attributes:
        attentions: every softmax over dot products of activations, fused or written out.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._index = {_key(parameter): i for i, parameter in enumerate(self._parameters)}
        self._flows = WeakIdKeyDictionary()
        self._seen: list[tuple[int, Use]] = []
        self._features = 0
        self.attentions: list[Attention] = []

    def uses(self) -> dict[str, list[Use]]:
        """Return every parameter's uses in the order seen; a tied matrix has two, an unused parameter none."""
        found: dict[str, list[Use]] = {name: [] for name in self._names}
        for i, (index, use) in enumerate(self._seen):
            found[self._names[index]].append(replace(use, feature=bool(self._features >> i & 1)))
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not inputs or not outputs:
            return out
        if all(self._parameter(output) is not None for output in outputs):
            return out  # a view of a parameter is still the parameter
        noted = self._note_uses(name, args, inputs)
        self._note_attention(name, args, kwargs or {})
        flow = self._through(name, inputs)
        flow.uses |= noted
        self._follow_product(flow, name, args, inputs)
        for output in outputs:
            self._flows[output] = flow
        return out

    def _note_uses(self, name: str, args: Any, inputs: list[torch.Tensor]) -> int:
        others = [self._flow(other) for other in inputs if self._parameter(other) is None]
        carried = _union(flow.carries for flow in others)
        noted = 0
        for tensor in inputs:
            index = self._parameter(tensor)
            if index is None:
                continue
            axes = self._axes(name, args, tensor, self._parameters[index])
            if "in" in axes:
                self._features |= _union(other.uses for other in others)
            on_data = not any(other.depends for other in others)
            noted |= 1 << len(self._seen)
            self._seen.append((index, Use(name, axes, self._decode(carried), on_data)))
        return noted

    def _note_attention(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name.startswith("_scaled_dot_product"):
            head_dim, queries = int(args[0].shape[-1]), self._flow(args[0])
            scale = kwargs.get("scale") or head_dim**-0.5
            others = self._decode(self._flow(args[1]).carries | self._flow(args[2]).carries)
            self.attentions.append(Attention(head_dim, scale * queries.factor, others, self._decode(queries.carries)))
        elif name in {"_softmax", "_safe_softmax"} and (flow := self._flow(args[0])).product is not None:
            head_dim, carriers, second = flow.product
            self.attentions.append(Attention(head_dim, flow.factor, self._decode(second), self._decode(carriers)))

    def _follow_product(self, flow: Flow, name: str, args: Any, inputs: list[torch.Tensor]) -> None:
        """Keep track of dot products of activations on their way to a softmax, and of the constants that scale them."""
        before = [self._flow(tensor) for tensor in inputs if self._parameter(tensor) is None]
        if name in {"mm", "bmm"} and len(before) == 2 and all(each.depends for each in before):
            flow.product = (int(args[0].shape[-1]), before[0].carries, before[1].carries)
            flow.factor = before[0].factor * before[1].factor
        elif name in LINEAR or name in PRODUCTS or name in {"where", "masked_fill"}:
            flow.product = next((each.product for each in before if each.product), None)
            source = next((each for each in before if each.product), before[0] if before else flow)
            constant = (
                next((arg for arg in args[1:] if isinstance(arg, (int, float))), 1.0) if name in PRODUCTS else 1.0
            )
            flow.factor = source.factor / constant if name.startswith("div") else source.factor * constant

    def _axes(self, name: str, args: Any, tensor: torch.Tensor, parameter: torch.Tensor) -> tuple[str, ...]:
        """Labels of the parameter's own axes, found in the view that the operation met."""
        labels = CONTRACTIONS.get(name)
        if name == "convolution" and args[6]:
            labels = TRANSPOSED_CONVOLUTION
        if labels is not None:
            position = next(i for i, argument in enumerate(args) if argument is tensor)
            seen = (
                labels.get(position, ())[-tensor.dim() :] if name != "convolution" else labels[position][: tensor.dim()]
            )
        elif name in ENTRYWISE or name in AFFINE_NORMS:
            seen = ("each",) * tensor.dim()
        else:
            seen = ()
        by_stride = {s: label for s, n, label in zip(tensor.stride(), tensor.shape, seen, strict=False) if n > 1}
        # An axis of size 1 has no telling stride; it cannot be the one that grows either, unless nothing else says.
        layout = zip(parameter.stride(), parameter.shape, strict=True)
        return tuple("each" if n == 1 else by_stride.get(s, "unknown") for s, n in layout)

    def _through(self, name: str, inputs: list[torch.Tensor]) -> Flow:
        flows = [(tensor, self._flow(tensor)) for tensor in inputs if tensor.is_floating_point()]
        own = [flow.carries for tensor, flow in flows if self._parameter(tensor) is not None]
        result = Flow(_union(flow.depends for _, flow in flows), uses=_union(flow.uses for _, flow in flows))
        if name in CONTRACTIONS or name in AFFINE_NORMS:
            result.carries = _union(own)
        elif name in LINEAR and all(flow.carries for _, flow in flows):
            result.carries = _union(flow.carries for _, flow in flows)
        elif name in PRODUCTS and flows:
            result.carries = self._product(name, flows, own)
        return result

    def _product(self, name: str, flows: list[tuple[torch.Tensor, Flow]], own: list[int]) -> int:
        """A product carries what one side carries, if the other side does not depend on it (as in x·sigmoid(x))."""
        if own and not name.startswith("div"):
            return own[0]
        sides = flows[:1] if name.startswith("div") else flows
        for tensor, flow in sides:
            others = _union(other.depends for t, other in flows if t is not tensor)
            if flow.carries and not flow.carries & others:
                return flow.carries
        return 0

    def _flow(self, tensor: torch.Tensor) -> Flow:
        index = self._parameter(tensor)
        if index is not None:
            return Flow(1 << index, 1 << index)
        return self._flows.get(tensor) or Flow()

    def _parameter(self, tensor: torch.Tensor) -> int | None:
        return self._index.get(_key(tensor))

    def _decode(self, bits: int) -> frozenset[str]:
        return frozenset(name for i, name in enumerate(self._names) if bits >> i & 1)


def _union(bits: Iterator[int] | list[int]) -> int:
    total = 0
    for each in bits:
        total |= each
    return total


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
