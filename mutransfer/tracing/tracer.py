"""Trace how one forward pass uses every parameter: which axes are contracted, gathered, or combined entry by entry.

A `TorchDispatchMode` receives every operation after torch has decomposed it, so `nn.Linear`, an einsum and a raw matmul look
the same. A parameter is recognized by its storage and an axis by its stride, so views and transposes need no special rules; a
tensor made from one parameter alone (a cast, a chosen expert, 1 + w) stands for that parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._torch_internals import TorchDispatchMode, tree_leaves
from ..param_names import pattern_of
from . import ops as ops
from .aliases import Aliases, Cuts
from .columns import Joins, Labels
from .dataflow import Flow, Pieces, Scores, Sum, Use, ValueGraph, numeric, storage_key, union
from .ops import Decompositions, adds
from .products import NORMALIZED, SOFTMAX, Attentions, Dots, Gates, Products
from .scales import Scalars, ScaleTracker

__all__ = ["OpTracer", "carried"]


def carried(name: str, flows: Sequence[Flow], with_alias: Sequence[bool]) -> int:
    """Return the parameters that carry a factor into the result of an operation, as bits.

    Args:
        name: name of the operation.
        flows: flows of its inputs.
        with_alias: which of the inputs stand for parameters.
    """
    root_carries = [each.carries for each, is_root in zip(flows, with_alias, strict=True) if is_root]
    if name in ops.CONTRACTIONS and len(flows) > 1 and not any(with_alias):  # such as attention weights times values
        return _product(name, flows[-2:][::-1], [])
    if name in ops.CONTRACTIONS or name in ops.AFFINE_NORMS:
        # A factor on a bias alone is not a factor on the result, if the weight's size is fixed.
        return union(root_carries) if all(root_carries) else 0
    if name in ops.PRODUCTS and flows:
        return _product(name, flows, root_carries)
    if name in ops.WRITES:  # a write into an empty tensor carries what the written values carry
        flows = [each for each in flows if each.depends]
    if name in ops.LINEAR and flows and all(each.carries for each in flows):
        return union(each.carries for each in flows)
    return 0


def _product(name: str, flows: Sequence[Flow], root_carries: list[int]) -> int:
    """Return what one side of a product carries, unless the other side depends on it too (as in x·sigmoid(x)); else 0."""
    if root_carries and not name.startswith("div"):
        return root_carries[0]
    sides = flows[:1] if name.startswith("div") else flows
    for side in sides:
        others = union(other.depends for other in flows if other is not side)
        if side.carries and not side.carries & others:
            return side.carries
    return 0


POWERS = {"pow", "linalg_vector_norm", "norm"}


class OpTracer(TorchDispatchMode):
    """Trace a forward pass of ``model``; call `finish` with the loss, then `uses`.

    Attributes:
        factors: the constants that each use's result is multiplied by.
        dots: all dot products of activations.
        attentions: every softmax over dot products of activations, fused or written out.
        graph: the graph of values.
        sizes: name of the magnitude parameter of a weight under weight norm → name of the parameter that it scales.
        parts: parameters and results of parameters that are cut into pieces.
        joins: the pieces that the axes of activations are joined from.
        draws: whether the pass drew from Python's or numpy's generators, in which case another pass may take another path.
    """

    def __init__(self, model: torch.nn.Module, read: Callable[[torch.Tensor], float | None] | None = None) -> None:
        super().__init__()
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self._names = [name for name, _ in named]
        self._aliases = Aliases([each for _, each in named])
        self._flows: dict[int, Flow] = {}
        self._kept: list[torch.Tensor] = []  # keeps storages alive: the address of a freed one would be reused
        self._seen: list[tuple[int, Use]] = []
        self._features = 0
        self._gates = Gates()
        self._scalars = Scalars(read or (lambda _: None))
        self._modules: list[str] = [""]
        self._products = Products()
        self._model = model
        self._hooks: list[Any] = []
        self.factors = ScaleTracker()
        self.dots = Dots()
        self._attentions = Attentions(self.decode)
        self.attentions = self._attentions.found
        self._sums: list[tuple[Sum, set[Scores]]] = []
        self.sizes: dict[str, str] = {}
        self.graph = ValueGraph()
        self._pieces = Pieces(self.graph)
        self._decompositions = Decompositions()
        self.parts = Cuts()
        self.joins = Joins(self._made_by)
        self._columns: list[tuple[Labels, ...]] = []
        self._used_in: dict[str, set[str]] = {name: set() for name in self._names}
        self.draws = False

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

    def finish(self, loss: torch.Tensor) -> None:
        """End the trace at ``loss``; values that do not lead to it count as unread."""
        self.graph.result = self._flow(loss).node
        self.factors.take(self._flow(loss), self.graph.result, "")
        for scores, scale in self._flow(loss).dots.items():
            self.dots.end(scores, scale, "")
        # Sums on the way to a softmax are left out: an attention bias that all layers share is not a residual stream.
        self.graph.sums = [each for each, dots in self._sums if not dots & {*self._attentions.attended}]
        for scores in self._attentions.attended:  # constants on queries and keys are part of its scale
            self.factors.forget({use for side in scores.sides for use in side.factors}, scores.nodes)

    def uses(self) -> dict[str, list[Use]]:
        """Return every parameter's uses in the order seen: two for a tied matrix, none for an unused parameter."""
        found: dict[str, list[Use]] = {name: [] for name in self._names}
        summed = self._products.contractions()
        features = self._features | union(each.others for each in summed.values())
        for i, (index, use) in enumerate(self._seen):
            if i in summed:
                axes, counts = zip(*summed[i].axes, strict=True)
                use = replace(use, axes=axes, summed=counts)
            feature, logit = bool(features >> i & 1), bool(self._gates.logits >> i & 1)
            taken = frozenset().union(*self.factors.taken[i].values())
            takers = frozenset(self.factors.taken[i])
            found[self._names[index]].append(
                replace(use, feature=feature, logit=logit, taken=taken, takers=takers, inner=self.factors.inner[i])
            )
        return found

    def used(self) -> frozenset[str]:
        """Return the parameters that have at least one use."""
        return frozenset(self._names[index] for index, _ in self._seen)

    def used_by(self, bits: int) -> frozenset[str]:
        """Return the names of the parameters of a set of uses (as bits)."""
        return frozenset(self._names[index] for i, (index, _) in enumerate(self._seen) if bits >> i & 1)

    def shared_queries(self) -> frozenset[str]:
        """Return the parameters that produce queries and whose result is also used elsewhere."""
        uses = frozenset().union(*(each.uses for each in self.attentions))
        return frozenset(self._names[self._seen[use][0]] for use in uses if self.factors.taken[use])

    def _owner(self, use: int) -> str:
        return self._names[self._seen[use][0]].rpartition(".")[0]

    def used_only(self, bits: int, uses: set[int], nodes: set[int]) -> bool:
        """Return whether all uses of a set of parameters (as bits) are in ``uses`` and are consumed by ``nodes`` only."""
        all_of = {use for use, (index, _) in enumerate(self._seen) if bits >> index & 1}
        return all_of <= uses and not any(set(self.factors.taken[use]) - nodes for use in all_of)

    def decode(self, bits: int) -> frozenset[str]:
        """Return the names of a set of parameters (as bits)."""
        return frozenset(name for i, name in enumerate(self._names) if bits >> i & 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if (decomposed := self._decompositions.steps(name, args, kwargs, self._call, self._live)) is not None:
            return decomposed
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._scalars.see(name, func, args, kwargs, outputs)
        if not inputs or not outputs or name in ops.CREATIONS:
            self._kept += outputs  # the constant that a tensor holds is looked up by its storage
            self.joins.made(outputs)
            return out
        known = {storage_key(each) for each in inputs}
        fresh = [each for each in outputs if storage_key(each) not in known]
        if not fresh and not name.endswith("_") and name not in ops.WRITES:
            self._note_parts(inputs[0], outputs)  # a view shares the flow of its base
            return out
        self._kept += fresh
        self.joins.see(name, args, kwargs, inputs, (fresh or outputs)[0], self._modules[-1])
        if fresh and self._derive(name, args, inputs, fresh[0]):
            return out
        first_use = len(self._seen)
        flow = self._through(name, args, kwargs, inputs, outputs[0])
        others = union(self._flow(each).uses for each in inputs)
        flow.direct |= self._products.note(name, args, inputs, (fresh or outputs)[0], self._aliases, first_use, others)
        for each in fresh or outputs[:1]:
            self._flows[storage_key(each)] = flow
        return out

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_dispatch__(func, (), args, kwargs)

    def _live(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor) and self._aliases.get(tensor) is None and bool(self._flow(tensor).depends)
        )

    def _derive(self, name: str, args: Any, inputs: list[torch.Tensor], out: torch.Tensor) -> bool:
        """Register ``out`` as an alias of a parameter if it is computed entrywise from that parameter alone.

        Returns whether it was registered.
        """
        if name == "_weight_norm_interface":  # v keeps its axes; g multiplies the rows
            self._note_uses("weight_norm" if any(args[2:]) else "mul", args, [args[1]], 0)
            sizes, inputs = self._aliases.get(args[1]), inputs[:1]
        with_alias = [(each, alias) for each in inputs if (alias := self._aliases.get(each)) is not None]
        if not with_alias or not numeric(out):
            return False
        tensor, alias = with_alias[0]
        # An index only selects entries: the experts that a router chooses still stand for the parameter.
        if union(self._flow(each).depends for each in inputs if numeric(each)) != 1 << alias.index:
            return False
        number = self._number(args) if name in ops.PRODUCTS else None
        made = self._aliases.derive(name, args, tensor, out, number, alone=len(inputs) == 1)
        if made is not None and name == "_weight_norm_interface" and sizes is not None:
            self._aliases.sized(out, (sizes.index, len(self._seen) - 1))
            self.sizes[self._names[sizes.index]] = self._names[made.index]
        if made is not None and number is not None and not made.linear:
            self.factors.leave(number, 0, self._modules[-1])
        return made is not None

    def _through(
        self, name: str, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> Flow:
        """Return the flow of the operation's result, and record how the operation uses its inputs."""
        floating = [each for each in inputs if numeric(each)]
        flows = [self._flow(each) for each in floating]
        others = [flow for each, flow in zip(floating, flows, strict=True) if self._aliases.get(each) is None]
        contracts = name in ops.CONTRACTIONS
        live = [flow for flow in flows if flow.depends]
        if name in ops.COPIES and len(others) == 1:
            self.dots.copy(floating[0], out)
            return others[0]
        node = self.graph.add(dict.fromkeys(flow.node for flow in others if flow.node)) if live else 0
        first = len(self._seen)
        used = self._note_uses(name, args, inputs, node)
        self._attentions.see(name, args, kwargs, self._flow, self.dots, self._modules[-1])
        result = Flow(union(each.depends for each in flows), uses=union(each.uses for each in flows) | used, node=node)
        with_alias = [self._aliases.get(each) is not None for each in floating]
        result.carries = carried(name, flows, with_alias)
        if used and contracts:
            result.direct = used
        elif not contracts and name not in ops.AFFINE_NORMS and name not in NORMALIZED:
            result.direct = union(each.direct for each in flows)
        activations = [(each, flow) for each, flow in zip(floating, flows, strict=True) if flow.depends]
        activations = [(each, flow) for each, flow in activations if self._aliases.get(each) is None]
        self._gates.see(name, flows, result, activations, self.used_by)
        if adds(name, args) and len(others) == 2 and all(each.depends for each in others):
            a, b = others
            self._sums.append((Sum(node, a.node, b.node, a.carries, b.carries), {*a.dots, *b.dots}))
        aliases = [alias for each in inputs if (alias := self._aliases.get(each)) is not None]
        uses = {
            alias.sizes[1] if alias.sizes else first + i: alias.factor
            for i, alias in enumerate(aliases)
            if alias.linear
        }
        for i, alias in enumerate(aliases):
            if alias.sizes:  # magnitudes under weight norm act where the normalized weight is used
                (index, sizes), (_, place) = self._seen[alias.sizes[1]], self._seen[first + i]
                self._seen[alias.sizes[1]] = index, replace(sizes, node=place.node, operands=place.operands)
        for use, factor in uses.items():
            self.factors.inner[use] *= factor if self._owner(use) == self._modules[-1] else 1.0
        by = self._follow(result, name, args, kwargs, others, uses, inputs[0].numel() / max(1, out.numel()))
        self.dots.follow(name, args, kwargs, activations, result, out, by, self._modules[-1])
        return result

    def _follow(
        self, result: Flow, name: str, args: Any, kwargs: dict[str, Any], others: list[Flow], uses: dict[int, float], count: float
    ) -> float:  # fmt: skip
        """Update the constants multiplied in so far, and return the constant that this operation multiplies by."""
        live, module = [each for each in others if each.depends], self._modules[-1]
        if name in {"mm", "bmm", "baddbmm"} and len(live) >= 2:
            result.product = Scores(int(args[-2].shape[-1]), live[-2], live[-1])
        elif name in ops.LINEAR or name in ops.PRODUCTS or name in ops.UNARY or name == "where":
            result.product = next((each.product for each in live if each.product), None)
        second = kwargs.get("alpha", 1) if name in ops.SUMS else 1
        if second != 1 and self._live(args[1]):  # the second operand, and so the last
            live[-1] = replace(live[-1], factors={use: each * second for use, each in live[-1].factors.items()})
        power = self._scalars.value(args[1]) if name in POWERS and len(args) > 1 else None
        self.factors.follow(name, live, uses, result, module, count=count, power=2.0 if power is None else power)
        if name not in SOFTMAX:
            self.factors.spill(live, result, module)
        scaled = name in {"addmm", "addmv", "addbmm", "baddbmm"}
        number = self._number(args) if name in ops.PRODUCTS else kwargs.get("alpha") if scaled else None
        if name in SOFTMAX:  # n entries that sum to 1 are 1/n each
            result.residual = 1 / max(1, int(args[0].shape[args[1]]))
        if number is None or not result.depends:
            return 1.0
        by = (1 / number if number else float("nan")) if name.startswith("div") else float(number)
        self.factors.multiply(result, by, module, self._owner)
        return by

    def _note_uses(self, name: str, args: Any, inputs: list[torch.Tensor], node: int) -> int:
        others = [self._flow(other) for other in inputs if self._aliases.get(other) is None]
        carried = union(flow.carries for flow in others)
        operands = tuple(flow.node for flow in others if flow.node)
        used = 0
        for tensor in inputs:
            alias = self._aliases.get(tensor)
            if alias is None:
                continue
            axes, summed = self._aliases.axes(name, args, tensor)
            alone = name in ops.CONTRACTIONS and "in" in axes and self._meets_only_parameters(inputs, tensor)
            if alone and any(tensor is each for each in args[-2:-1]):
                # The parameter takes the place of activations: its rows go into the other one, such as learned queries.
                axes, alone = tuple({"in": "out", "out": "gather"}.get(label, label) for label in axes), False
            if "in" in axes:
                self._features |= union(other.uses for other in others)
            on_data = not any(other.depends for other in others)
            used |= 1 << len(self._seen)
            shift = alias.shift if alias.linear else 0.0
            use = Use(name, axes, self.decode(carried), on_data, node, operands, shift, alone=alone, summed=summed)
            self._seen.append((alias.index, use))
            self._used_in[self._names[alias.index]].add(self._modules[-1])
            self._columns.append(self._met_by(name, args, inputs, tensor))
        return used

    def _met_by(self, name: str, args: Any, inputs: list[torch.Tensor], tensor: torch.Tensor) -> tuple[Labels, ...]:
        """Return, for each axis of a parameter, the pieces that the entries it is combined with come from, as `Joins` labels."""
        alias = self._aliases.get(tensor)
        if alias is None or not (name in ops.CONTRACTIONS or name in {"mul", "mul_"}):
            return ()
        found = self.joins.met(name, args, inputs, tensor)
        kind = frozenset().union(*(self._made_by(each) for each in inputs if self._aliases.get(each) is None))
        site = self._names[alias.index], "use", frozenset({kind})
        axes = zip(alias.layout, self._aliases.shape(alias), strict=True)
        return tuple(self.joins.along(axis, size, tensor, found, site, kind) for axis, size in axes)

    def used_in(self, name: str) -> set[str]:
        """Return the modules in whose forward a parameter is used."""
        return self._used_in[name]

    def columns(self) -> dict[str, list[tuple[Labels, ...]]]:
        """Return, by parameter and for each of its `uses` in order, the labels that each axis meets; empty if unknown."""
        found: dict[str, list[tuple[Labels, ...]]] = {name: [] for name in self._names}
        for (index, _), met in zip(self._seen, self._columns, strict=True):
            found[self._names[index]].append(met)
        return found

    def _made_by(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return the parameters that a tensor was computed from, as name patterns."""
        flow = self._flow(tensor)
        return frozenset(map(pattern_of, self.used_by(flow.direct) or self.decode(flow.depends)))

    def _meets_only_parameters(self, inputs: list[torch.Tensor], tensor: torch.Tensor) -> bool:
        met = [each for each in inputs if each is not tensor and numeric(each) and each.dim() > 1]
        return bool(met) and all(self._aliases.get(each) is not None for each in met)

    def _note_parts(self, whole: torch.Tensor, pieces: list[torch.Tensor]) -> None:
        alias, direct = self._aliases.get(whole), self._flow(whole).direct
        if alias is not None or direct:
            self.parts.add(whole, pieces, self.decode(1 << alias.index if alias else 0), direct)

    def _number(self, args: Any) -> float | None:
        return self._scalars.factor(args, lambda each: bool(self._flow(each).depends))

    def _flow(self, tensor: torch.Tensor) -> Flow:
        alias = self._aliases.get(tensor)
        if alias is not None:
            return Flow(1 << alias.index, 1 << alias.carrier if alias.linear else 0)
        flow = self._flows.get(storage_key(tensor)) or Flow()
        node = self._pieces.node(tensor, flow.node)
        return flow if node == flow.node else replace(flow, node=node)
