"""How one forward pass uses every parameter: which axis is contracted, gathered, or combined entry by entry.

A `TorchDispatchMode` sees every operation after torch has decomposed it, so `nn.Linear`, an einsum and a raw matmul look
alike. A parameter is recognized by its storage and an axis by its stride, so views and transposes need no rules of their own;
a tensor made from one parameter alone (a cast, a chosen expert, 1 + w) stands for that parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._torch_internals import TorchDispatchMode, tree_leaves
from ..param_names import pattern_of
from . import ops as ops
from .aliases import Cuts, Roots
from .columns import Joins, Labels
from .dataflow import Flow, Pieces, Scores, Sum, Use, ValueGraph, numeric, storage_key, union
from .ops import Decompositions, adds
from .products import NORMALIZED, SOFTMAX, Attentions, Dots, Gates, Products
from .scales import Scalars, ScaleTracker

__all__ = ["OpTracer", "carried"]


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


POWERS = {"pow", "linalg_vector_norm", "norm"}


class OpTracer(TorchDispatchMode):
    """Watch a forward pass of ``model``; ask `uses` and `constants` afterwards.

    Attributes:
        attentions: every softmax over dot products of activations, fused or written out.
        graph: the order of values.
        sizes: name of the parameter that sets the sizes of a normalized weight → name of the weight's own.
        parts: parameters and results of parameters that are cut into pieces.
        joins: from which pieces the axes of activations are joined.
        draws: whether the pass drew from Python's or numpy's generators, so that another may go another way.
    """

    def __init__(self, model: torch.nn.Module, read: Callable[[torch.Tensor], float | None] | None = None) -> None:
        super().__init__()
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self._names = [name for name, _ in named]
        self._roots = Roots([each for _, each in named])
        self._flows: dict[int, Flow] = {}
        self._kept: list[torch.Tensor] = []  # a freed storage's address would be given to the next one
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
        """Say what the pass was for; values that do not lead there are not read."""
        self.graph.result = self._flow(loss).node
        self.factors.take(self._flow(loss), self.graph.result, "")
        for scores, scale in self._flow(loss).dots.items():
            self.dots.end(scores, scale, "")
        # Not on the way to a softmax: a bias that all layers add to their attention is no stream.
        self.graph.sums = [each for each, dots in self._sums if not dots & {*self._attentions.attended}]
        for scores in self._attentions.attended:  # numbers on the sides are in the attention's scale
            self.factors.forget({use for side in scores.sides for use in side.factors}, scores.nodes)

    def uses(self) -> dict[str, list[Use]]:
        """Return every parameter's uses in the order seen; a tied matrix has two, an unused parameter none."""
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
        """Return the parameters that have a use."""
        return frozenset(self._names[index] for index, _ in self._seen)

    def used_by(self, bits: int) -> frozenset[str]:
        """Return the parameters of a set of uses."""
        return frozenset(self._names[index] for i, (index, _) in enumerate(self._seen) if bits >> i & 1)

    def shared_queries(self) -> frozenset[str]:
        """Return the parameters that make queries and whose result goes elsewhere too."""
        uses = frozenset().union(*(each.uses for each in self.attentions))
        return frozenset(self._names[self._seen[use][0]] for use in uses if self.factors.taken[use])

    def _owner(self, use: int) -> str:
        return self._names[self._seen[use][0]].rpartition(".")[0]

    def used_only(self, bits: int, uses: set[int], nodes: set[int]) -> bool:
        """Say whether a set of parameters has no other ``uses``, and nothing but ``nodes`` takes these in."""
        all_of = {use for use, (index, _) in enumerate(self._seen) if bits >> index & 1}
        return all_of <= uses and not any(set(self.factors.taken[use]) - nodes for use in all_of)

    def decode(self, bits: int) -> frozenset[str]:
        """Return the names of a set of parameters."""
        return frozenset(name for i, name in enumerate(self._names) if bits >> i & 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if (said := self._decompositions.steps(name, args, kwargs, self._call, self._live)) is not None:
            return said
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._scalars.see(name, func, args, kwargs, outputs)
        if not inputs or not outputs or name in ops.CREATIONS:
            self._kept += outputs  # the number that it holds is known by its storage
            self.joins.made(outputs)
            return out
        known = {storage_key(each) for each in inputs}
        fresh = [each for each in outputs if storage_key(each) not in known]
        if not fresh and not name.endswith("_") and name not in ops.WRITES:
            self._note_parts(inputs[0], outputs)  # a view is what it views
            return out
        self._kept += fresh
        self.joins.see(name, args, kwargs, inputs, (fresh or outputs)[0], self._modules[-1])
        if fresh and self._derive(name, args, inputs, fresh[0]):
            return out
        begun = len(self._seen)
        flow = self._through(name, args, kwargs, inputs, outputs[0])
        others = union(self._flow(each).uses for each in inputs)
        flow.direct |= self._products.note(name, args, inputs, (fresh or outputs)[0], self._roots, begun, others)
        for each in fresh or outputs[:1]:
            self._flows[storage_key(each)] = flow
        return out

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_dispatch__(func, (), args, kwargs)

    def _live(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and self._roots.get(tensor) is None and bool(self._flow(tensor).depends)

    def _derive(self, name: str, args: Any, inputs: list[torch.Tensor], out: torch.Tensor) -> bool:
        """Let ``out`` stand for the one parameter that it is made of, if it is made of one by entries."""
        if name == "_weight_norm_interface":  # v keeps its axes; g multiplies the rows
            self._note_uses("weight_norm" if any(args[2:]) else "mul", args, [args[1]], 0)
            sizes, inputs = self._roots.get(args[1]), inputs[:1]
        rooted = [(each, root) for each in inputs if (root := self._roots.get(each)) is not None]
        if not rooted or not numeric(out):
            return False
        tensor, root = rooted[0]
        # An index says which entries, not what they are: the experts that a router chooses are still the parameter.
        if union(self._flow(each).depends for each in inputs if numeric(each)) != 1 << root.index:
            return False
        number = self._number(args) if name in ops.PRODUCTS else None
        made = self._roots.derive(name, args, tensor, out, number, alone=len(inputs) == 1)
        if made is not None and name == "_weight_norm_interface" and sizes is not None:
            self._roots.sized(out, (sizes.index, len(self._seen) - 1))
            self.sizes[self._names[sizes.index]] = self._names[made.index]
        if made is not None and number is not None and not made.linear:
            self.factors.leave(number, 0, self._modules[-1])
        return made is not None

    def _through(
        self, name: str, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor], out: torch.Tensor
    ) -> Flow:
        """Return what the operation's result depends on, and note on the way what it tells about its inputs."""
        floating = [each for each in inputs if numeric(each)]
        flows = [self._flow(each) for each in floating]
        others = [flow for each, flow in zip(floating, flows, strict=True) if self._roots.get(each) is None]
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
        rooted = [self._roots.get(each) is not None for each in floating]
        result.carries = carried(name, flows, rooted)
        if used and contracts:
            result.direct = used
        elif not contracts and name not in ops.AFFINE_NORMS and name not in NORMALIZED:
            result.direct = union(each.direct for each in flows)
        met = [(each, flow) for each, flow in zip(floating, flows, strict=True) if flow.depends]
        met = [(each, flow) for each, flow in met if self._roots.get(each) is None]
        self._gates.see(name, flows, result, met, self.used_by)
        if adds(name, args) and len(others) == 2 and all(each.depends for each in others):
            a, b = others
            self._sums.append((Sum(node, a.node, b.node, a.carries, b.carries), {*a.dots, *b.dots}))
        roots = [root for each in inputs if (root := self._roots.get(each)) is not None]
        own = {root.sizes[1] if root.sizes else first + i: root.factor for i, root in enumerate(roots) if root.linear}
        for i, root in enumerate(roots):
            if root.sizes:  # they act where the weight that they size does
                (index, sizes), (_, place) = self._seen[root.sizes[1]], self._seen[first + i]
                self._seen[root.sizes[1]] = index, replace(sizes, node=place.node, operands=place.operands)
        for use, factor in own.items():
            self.factors.inner[use] *= factor if self._owner(use) == self._modules[-1] else 1.0
        by = self._follow(result, name, args, kwargs, others, own, inputs[0].numel() / max(1, out.numel()))
        self.dots.follow(name, args, kwargs, met, result, out, by, self._modules[-1])
        return result

    def _follow(
        self, result: Flow, name: str, args: Any, kwargs: dict[str, Any], others: list[Flow], own: dict[int, float], count: float
    ) -> float:  # fmt: skip
        """Keep track of numbers multiplied in, and return this operation's."""
        live, module = [each for each in others if each.depends], self._modules[-1]
        if name in {"mm", "bmm", "baddbmm"} and len(live) >= 2:
            result.product = Scores(int(args[-2].shape[-1]), live[-2], live[-1])
        elif name in ops.LINEAR or name in ops.PRODUCTS or name in ops.UNARY or name == "where":
            result.product = next((each.product for each in live if each.product), None)
        second = kwargs.get("alpha", 1) if name in ops.SUMS else 1
        if second != 1 and self._live(args[1]):  # the second operand, and so the last
            live[-1] = replace(live[-1], factors={use: each * second for use, each in live[-1].factors.items()})
        power = self._scalars.value(args[1]) if name in POWERS and len(args) > 1 else None
        self.factors.follow(name, live, own, result, module, count=count, power=2.0 if power is None else power)
        if name not in SOFTMAX:
            self.factors.spill(live, result, module)
        scaled = name in {"addmm", "addmv", "addbmm", "baddbmm"}
        number = self._number(args) if name in ops.PRODUCTS else kwargs.get("alpha") if scaled else None
        if name in SOFTMAX:  # of n entries that sum up to 1, each is 1/n
            result.residual = 1 / max(1, int(args[0].shape[args[1]]))
        if number is None or not result.depends:
            return 1.0
        by = (1 / number if number else float("nan")) if name.startswith("div") else float(number)
        self.factors.multiply(result, by, module, self._owner)
        return by

    def _note_uses(self, name: str, args: Any, inputs: list[torch.Tensor], node: int) -> int:
        others = [self._flow(other) for other in inputs if self._roots.get(other) is None]
        carried = union(flow.carries for flow in others)
        operands = tuple(flow.node for flow in others if flow.node)
        used = 0
        for tensor in inputs:
            root = self._roots.get(tensor)
            if root is None:
                continue
            axes, summed = self._roots.axes(name, args, tensor)
            alone = name in ops.CONTRACTIONS and "in" in axes and self._meets_only_parameters(inputs, tensor)
            if alone and any(tensor is each for each in args[-2:-1]):
                # It stands where activations do: rows that go into the other, such as learned queries.
                axes, alone = tuple({"in": "out", "out": "gather"}.get(label, label) for label in axes), False
            if "in" in axes:
                self._features |= union(other.uses for other in others)
            on_data = not any(other.depends for other in others)
            used |= 1 << len(self._seen)
            shift = root.shift if root.linear else 0.0
            use = Use(name, axes, self.decode(carried), on_data, node, operands, shift, alone=alone, summed=summed)
            self._seen.append((root.index, use))
            self._used_in[self._names[root.index]].add(self._modules[-1])
            self._columns.append(self._met_by(name, args, inputs, tensor))
        return used

    def _met_by(self, name: str, args: Any, inputs: list[torch.Tensor], tensor: torch.Tensor) -> tuple[Labels, ...]:
        """Return from which pieces the entries come that each axis of a parameter meets, as `Joins` numbers them."""
        root = self._roots.get(tensor)
        if root is None or not (name in ops.CONTRACTIONS or name in {"mul", "mul_"}):
            return ()
        found = self.joins.met(name, args, inputs, tensor)
        kind = frozenset().union(*(self._made_by(each) for each in inputs if self._roots.get(each) is None))
        site = self._names[root.index], "use", frozenset({kind})
        axes = zip(root.layout, self._roots.shape(root), strict=True)
        return tuple(self.joins.along(axis, size, tensor, found, site, kind) for axis, size in axes)

    def used_in(self, name: str) -> set[str]:
        """Return the modules in whose forward a parameter is used."""
        return self._used_in[name]

    def columns(self) -> dict[str, list[tuple[Labels, ...]]]:
        """Return for every use of a parameter, in the order of `uses`, what each axis meets; nothing where that is unknown."""
        found: dict[str, list[tuple[Labels, ...]]] = {name: [] for name in self._names}
        for (index, _), met in zip(self._seen, self._columns, strict=True):
            found[self._names[index]].append(met)
        return found

    def _made_by(self, tensor: torch.Tensor) -> frozenset[str]:
        """Return the parameters that made a tensor, as patterns of their names."""
        flow = self._flow(tensor)
        return frozenset(map(pattern_of, self.used_by(flow.direct) or self.decode(flow.depends)))

    def _meets_only_parameters(self, inputs: list[torch.Tensor], tensor: torch.Tensor) -> bool:
        met = [each for each in inputs if each is not tensor and numeric(each) and each.dim() > 1]
        return bool(met) and all(self._roots.get(each) is not None for each in met)

    def _note_parts(self, whole: torch.Tensor, pieces: list[torch.Tensor]) -> None:
        root, direct = self._roots.get(whole), self._flow(whole).direct
        if root is not None or direct:
            self.parts.add(whole, pieces, self.decode(1 << root.index if root else 0), direct)

    def _number(self, args: Any) -> float | None:
        return self._scalars.factor(args, lambda each: bool(self._flow(each).depends))

    def _flow(self, tensor: torch.Tensor) -> Flow:
        root = self._roots.get(tensor)
        if root is not None:
            return Flow(1 << root.index, 1 << root.carrier if root.linear else 0)
        flow = self._flows.get(storage_key(tensor)) or Flow()
        node = self._pieces.node(tensor, flow.node)
        return flow if node == flow.node else replace(flow, node=node)
