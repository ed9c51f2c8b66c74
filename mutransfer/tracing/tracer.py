"""Trace how one forward pass uses every parameter: which axes are contracted, gathered, or combined entry by entry.

`OpTracer` records every operation after torch has decomposed it, so `nn.Linear`, an einsum and a raw matmul look the same.
`ForwardPass` analyses the record in passes, each of which reads the operations and the results of earlier passes:

1. `Aliases`: which values stand for a parameter, and which parameters a value depends on. A parameter is recognized by its
   storage and an axis by its stride, so views and transposes need no special rules; a tensor made from one parameter alone (a
   cast, a chosen expert, 1 + w) stands for that parameter.
2. `ValueGraph`: the graph of values.
3. `Carriers`: which parameters carry a factor into a value.
4. `Uses`: the uses of parameters.
5. `Scales`: the constants that the results of uses are multiplied by.
6. `Dots` and `gates`: dot products of activations, attention, gates and logits.
7. `Joins` and `cuts`: which pieces activations are joined from and cut into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._torch_internals import TorchDispatchMode, storage_id, tree_leaves
from . import ops as ops
from .aliases import Aliases, cuts, union
from .columns import Joins, Labels
from .dataflow import Carriers, Sum, Use, Uses, ValueGraph
from .ops import Operation, Value, adds
from .products import Dots, gates
from .scales import POWERS, Scalars, Scales

__all__ = ["ForwardPass", "OpTracer"]

# Operations of which the numbers among the arguments are needed.
NUMBERED = ops.PRODUCTS | POWERS | {"addcmul", "addcmul_", "addcdiv", "addcdiv_", "lerp", "lerp_"}


class OpTracer(TorchDispatchMode):
    """Record the operations of a forward pass of ``model``; call `finish` with the loss.

    Args:
        model: the model.
        read: returns the number that all entries of a buffer hold, or None.
    """

    def __init__(self, model: torch.nn.Module, read: Callable[[torch.Tensor], float | None] | None = None) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self._parameters = [Value.of(each) for _, each in self._named]
        self._kept: list[torch.Tensor] = []  # keeps storages alive: the address of a freed one would be reused
        self._versions: dict[int, int] = {}
        self._scalars = Scalars(read or (lambda _: None))
        self._modules: list[str] = [""]
        self._model = model
        self._hooks: list[Any] = []

    def __enter__(self) -> OpTracer:
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
            self._hooks.append(
                module.register_forward_hook(lambda *_: (self._modules.pop(), None)[1], always_call=True)
            )
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def finish(self, loss: torch.Tensor, draws: bool = False) -> ForwardPass:
        """Return the analysis of the pass that ended at ``loss``; see `ForwardPass` for ``draws``."""
        return ForwardPass(
            [name for name, _ in self._named], self._parameters, self.operations, self._value(loss, {}), draws
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        read: dict[int, Value] = {}
        recorded = self._values(args, read), {key: self._values(each, read) for key, each in kwargs.items()}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._scalars.see(name, func, args, kwargs, outputs)
        created = not read or not outputs or name in ops.CREATIONS
        known = {each.storage for each in read.values()}
        fresh = outputs if created else [each for each in outputs if storage_id(each) not in known]
        view = not fresh and not created and not name.endswith("_") and name not in ops.WRITES
        self._kept += fresh
        written = outputs if view else fresh or outputs[:1]
        if not view:
            for each in written:
                self._versions[storage_id(each)] = len(self.operations) + 1
        numbers = tuple(map(self._scalars.value, args[:3])) if name in NUMBERED else ()
        values = tuple(self._value(each, {}) for each in written)
        if values:
            op = Operation(name, *recorded, values, self._modules[-1], bool(fresh), view, created, numbers=numbers)
            self.operations.append(op)
        return out

    def _value(self, tensor: torch.Tensor, read: dict[int, Value]) -> Value:
        if id(tensor) not in read:
            read[id(tensor)] = Value.of(tensor, self._versions.get(storage_id(tensor), 0))
        return read[id(tensor)]

    def _values(self, args: Any, read: dict[int, Value]) -> Any:
        """Return ``args`` with values in place of tensors; the same tensor has the same value."""
        if isinstance(args, torch.Tensor):
            return self._value(args, read)
        if isinstance(args, list | tuple):
            return tuple(self._values(each, read) for each in args)
        return args


class ForwardPass:
    """Analysis of one forward pass. Sets of parameters and of uses are stored as bits.

    Attributes:
        graph: the graph of values.
        scales: the constants that each use's result is multiplied by.
        dots: all dot products of activations, and all attention.
        cuts: parameters and results of parameters that are cut into pieces.
        joins: the pieces that the axes of activations are joined from.
        magnitudes: name of the magnitude parameter of a weight under weight norm → name of the parameter that it scales.
        draws: whether the pass drew from Python's or numpy's generators, in which case another pass may take another path.
    """

    def __init__(
        self, names: Sequence[str], parameters: Sequence[Value], operations: Sequence[Operation], loss: Value,
        draws: bool = False,
    ) -> None:  # fmt: skip
        self.draws = draws
        self._names = names
        self._aliases = aliases = Aliases(parameters, operations)
        self.graph = ValueGraph.of(aliases)
        self._carriers = Carriers(aliases)
        self._uses = Uses(aliases, self.graph, self._carriers, names)
        self.scales = Scales(aliases, self.graph, self._carriers, self._uses)
        self.dots = Dots(aliases, self.graph, self._carriers, self.scales, self.decode)
        self._gates = gates(aliases, self._uses)
        self.joins = Joins(aliases, self._uses, names)
        self.cuts = cuts(aliases.operations, aliases, self._uses.direct)
        self.magnitudes = {names[magnitude]: names[index] for magnitude, index in aliases.magnitudes.items()}
        self._finish(loss)

    def _finish(self, loss: Value) -> None:
        self.graph.result = self.graph.node(loss) if self._aliases.get(loss) is None else 0
        self.scales.consume(self.scales.of(loss), self.graph.result, "")
        self.dots.end(loss)
        self.graph.sums = self._sums()
        for product in self.dots.attended:  # constants on queries and keys are part of its scale
            uses = {use for side in product.sides for use in self.scales.of(side).factors}
            self.scales.discard(uses, product.nodes)

    def _sums(self) -> list[Sum]:
        """Return the sums of two activations.

        Sums on the way to a softmax are left out: an attention bias that all layers share is not a residual stream.
        """
        found = []
        attended = {*self.dots.attended}
        for op in self._aliases.operations:
            sides = self._aliases.activations(op) if op.computes and adds(op.name, op.args) else []
            if len(sides) != 2 or not all(map(self._aliases.depends, sides)):
                continue
            a, b = sides
            if not attended & {*self.dots.of(a), *self.dots.of(b)}:
                node, left, right = self.graph.made(op), self.graph.node(a), self.graph.node(b)
                found.append(Sum(node, left, right, self._carriers.of(a), self._carriers.of(b), op.module))
        return found

    def uses(self) -> dict[str, list[Use]]:
        """Return every parameter's uses in the order seen: two for a tied matrix, none for an unused parameter."""
        found: dict[str, list[Use]] = {name: [] for name in self._names}
        for i, (index, use) in enumerate(self._uses.found):
            taken = self.scales.taken[i]
            found[self._names[index]].append(
                replace(
                    use,
                    feature=bool(self._uses.features >> i & 1),
                    logit=bool(self._gates >> i & 1),
                    taken=frozenset().union(*taken.values()),
                    takers=frozenset(taken),
                    inner=self.scales.inner[i],
                )
            )
        return found

    def used(self) -> frozenset[str]:
        """Return the parameters that have at least one use."""
        return frozenset(self._names[index] for index, _ in self._uses.found)

    def used_in(self, name: str) -> set[str]:
        """Return the modules in whose forward a parameter is used."""
        sites = zip(self._uses.found, self._uses.sites, strict=True)
        return {op.module for (index, _), (op, _) in sites if self._names[index] == name}

    def shared_queries(self) -> frozenset[str]:
        """Return the parameters that produce queries and whose result is also used elsewhere."""
        uses = frozenset().union(*(each.uses for each in self.dots.attentions))
        return frozenset(self._names[self._uses.found[use][0]] for use in uses if self.scales.taken[use])

    def used_only(self, bits: int, uses: set[int], nodes: set[int]) -> bool:
        """Return whether all uses of a set of parameters are in ``uses`` and are consumed by ``nodes`` only."""
        all_of = {use for use, (index, _) in enumerate(self._uses.found) if bits >> index & 1}
        return all_of <= uses and not any(set(self.scales.taken[use]) - nodes for use in all_of)

    def columns(self) -> dict[str, list[tuple[Labels, ...]]]:
        """Return, by parameter and for each of its `uses` in order, the labels that each axis meets; empty if unknown."""
        found: dict[str, list[tuple[Labels, ...]]] = {name: [] for name in self._names}
        for (index, _), met in zip(self._uses.found, self.joins.met, strict=True):
            found[self._names[index]].append(met)
        return found

    def decode(self, bits: int) -> frozenset[str]:
        """Return the names of a set of parameters."""
        return frozenset(name for i, name in enumerate(self._names) if bits >> i & 1)

    def carries(self, value: Value) -> int:
        """Return the parameters that carry a factor into ``value``."""
        return self._carriers.of(value)

    def depends(self, value: Value) -> int:
        """Return the parameters that ``value`` depends on."""
        return self._aliases.depends(value)

    def made_by(self, value: Value) -> frozenset[str]:
        """Return the parameters that ``value`` is the result of, or that carry a factor into it, or that it depends on."""
        uses = self._uses
        return (
            uses.parameters(uses.direct(value)) or self.decode(self.carries(value)) or uses.parameters(uses.of(value))
        )

    def results_of(self, bits: int) -> frozenset[str]:
        """Return the names of the parameters of a set of uses."""
        return self._uses.parameters(bits)

    def dotted(self) -> frozenset[str]:
        """Return the parameters with a use that a side of a dot product depends on, other than the logits of attention."""
        sides = [side for each in self.dots.ended for side in each.product.sides]
        return self._uses.parameters(union(map(self._uses.of, sides)))
