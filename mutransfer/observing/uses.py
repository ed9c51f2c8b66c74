"""How one forward pass uses every parameter: which axis is contracted, gathered, or met entry by entry.

A `TorchDispatchMode` sees every operation after torch has broken it down, so `nn.Linear`, an einsum and a raw matmul look
alike. A parameter is known by its storage and an axis by its stride, so views and transposes need no rules of their own;
a tensor made of one parameter alone (a cast, a chosen expert, 1 + w) stands for that parameter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import operations as ops
from .cuts import Cuts
from .flows import Flow, Graph, Sum, storage_key, union
from .noted import Attention, Constant, Use
from .products import Products
from .roots import Roots

__all__ = ["UseWatcher"]


class UseWatcher(TorchDispatchMode):
    """Watch a forward pass of ``model``; ask `uses` and `constants` afterwards.

    Attributes:
        attentions: every softmax over dot products of activations, fused or written out.
        graph: the order of values.
        parts: parameters and results of parameters that are cut into pieces.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self._names = [name for name, _ in named]
        self._roots = Roots([each for _, each in named])
        self._flows: dict[int, Flow] = {}
        self._kept: list[torch.Tensor] = []  # a freed storage's address would be given to the next one
        self._seen: list[tuple[int, Use]] = []
        self._features = self._logits = self._gates = self._claimed = 0
        self._constants: list[tuple[float, int, str]] = []
        self._modules: list[str] = [""]
        self._products = Products()
        self._model = model
        self._hooks: list[Any] = []
        self.attentions: list[Attention] = []
        self.graph = Graph()
        self.parts = Cuts()

    def __enter__(self) -> UseWatcher:
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

    def uses(self) -> dict[str, list[Use]]:
        """Return every parameter's uses in the order seen; a tied matrix has two, an unused parameter none."""
        found: dict[str, list[Use]] = {name: [] for name in self._names}
        summed = self._products.contractions()
        features = self._features | union(each.others for each in summed.values())
        for i, (index, use) in enumerate(self._seen):
            if i in summed:
                axes, counts = zip(*summed[i].axes, strict=True)
                use = replace(use, axes=axes, summed=counts)
            feature, logit = bool(features >> i & 1), bool(self._logits >> i & 1)
            found[self._names[index]].append(replace(use, feature=feature, logit=logit))
        return found

    def used_by(self, bits: int) -> frozenset[str]:
        """Return the parameters of a set of uses."""
        return frozenset(self._names[index] for i, (index, _) in enumerate(self._seen) if bits >> i & 1)

    def constants(self) -> list[Constant]:
        """Return the numbers multiplied in, in the order seen, but for those that scale attention."""
        return [
            Constant(value, self.decode(carries), module)
            for i, (value, carries, module) in enumerate(self._constants)
            if not self._claimed >> i & 1
        ]

    def decode(self, bits: int) -> frozenset[str]:
        """Return the names of a set of parameters."""
        return frozenset(name for i, name in enumerate(self._names) if bits >> i & 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not inputs or not outputs or name in ops.CREATIONS:
            return out
        known = {storage_key(each) for each in inputs}
        fresh = [each for each in outputs if storage_key(each) not in known]
        if not fresh and not name.endswith("_") and name not in ops.WRITES:
            self._note_parts(inputs[0], outputs)  # a view is what it views
            return out
        self._kept += fresh
        if fresh and self._derive(name, args, inputs, fresh[0]):
            return out
        begun = len(self._seen)
        flow = self._through(name, args, kwargs, inputs)
        others = union(self._flow(each).uses for each in inputs)
        flow.direct |= self._products.note(name, args, inputs, (fresh or outputs)[0], self._roots, begun, others)
        for each in fresh or outputs[:1]:
            self._flows[storage_key(each)] = flow
        return out

    def _derive(self, name: str, args: Any, inputs: list[torch.Tensor], out: torch.Tensor) -> bool:
        """Let ``out`` stand for the one parameter that it is made of, if it is made of one by entries."""
        if name == "_weight_norm_interface":  # v keeps its axes; g multiplies the rows
            self._note_uses("weight_norm" if any(args[2:]) else "mul", args, [args[1]], 0)
            inputs = inputs[:1]
        rooted = [(each, root) for each in inputs if (root := self._roots.get(each)) is not None]
        if not rooted or not out.is_floating_point():
            return False
        tensor, root = rooted[0]
        # An index says which entries, not what they are: the experts that a router chooses are still the parameter.
        if union(self._flow(each).depends for each in inputs if each.is_floating_point()) != 1 << root.index:
            return False
        number = self._number(args) if name in ops.PRODUCTS else None
        made = self._roots.derive(name, args, tensor, out, number, alone=len(inputs) == 1)
        if made is not None and number is not None:
            value = 1 / number if name.startswith("div") else number
            self._constants.append((value, 1 << root.index if made.linear else 0, self._modules[-1]))
        return made is not None

    def _through(self, name: str, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> Flow:
        """Return what the operation's result depends on, and note on the way what it tells about its inputs."""
        floating = [each for each in inputs if each.is_floating_point()]
        flows = [self._flow(each) for each in floating]
        others = [flow for each, flow in zip(floating, flows, strict=True) if self._roots.get(each) is None]
        contracts = name in ops.CONTRACTIONS
        live = [flow for flow in flows if flow.depends]
        if name in ops.COPIES and len(others) == 1:
            return others[0]
        node = self.graph.add(dict.fromkeys(flow.node for flow in others if flow.node)) if live else 0
        noted = self._note_uses(name, args, inputs, node)
        self._note_attention(name, args, kwargs)
        result = Flow(union(each.depends for each in flows), uses=union(each.uses for each in flows) | noted, node=node)
        result.carries = self._carried(name, floating, flows)
        if name in {"_softmax", "_safe_softmax", "_log_softmax", "topk", "sort"}:
            self._logits |= union(each.direct for each in flows)
        elif noted and contracts:
            result.direct = noted
        elif not contracts and name not in ops.AFFINE_NORMS:
            result.direct = union(each.direct for each in flows)
        if name == "sigmoid":
            self._gates |= result.direct
        if name in ops.WEIGHTINGS:
            self._note_gates([each for each in others if each.depends])
        # Not on the way to a softmax: a bias that all layers add to their attention is no stream.
        if name in ops.SUMS and len(others) == 2 and all(each.depends and not each.product for each in others):
            a, b = others
            self.graph.sums.append(Sum(node, a.node, b.node, a.carries, b.carries))
        self._follow(result, name, args, kwargs, others)
        return result

    def _follow(self, result: Flow, name: str, args: Any, kwargs: dict[str, Any], others: list[Flow]) -> None:
        """Keep track of numbers multiplied in, and of dot products of activations on their way to a softmax."""
        live = [each for each in others if each.depends]
        if name in {"mm", "bmm", "baddbmm"} and len(live) >= 2:
            result.product = (int(args[-2].shape[-1]), live[-2].carries, live[-1].carries)
            result.constants = live[-2].constants | live[-1].constants
        elif name in ops.LINEAR or name in ops.PRODUCTS or name in ops.UNARY or name == "where":
            result.product = next((each.product for each in live if each.product), None)
            result.constants = union(each.constants for each in live if not result.product or each.product)
        value = self._number(args) if name in ops.PRODUCTS else kwargs.get("alpha") if name.endswith("addbmm") else None
        if value is not None and result.depends:
            if name.startswith("div"):
                value = 1 / value if value else float("nan")
            result.constants |= 1 << len(self._constants)
            self._constants.append((float(value), result.carries, self._modules[-1]))

    def _note_uses(self, name: str, args: Any, inputs: list[torch.Tensor], node: int) -> int:
        others = [self._flow(other) for other in inputs if self._roots.get(other) is None]
        carried = union(flow.carries for flow in others)
        operands = tuple(flow.node for flow in others if flow.node)
        noted = 0
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
            noted |= 1 << len(self._seen)
            shift = root.shift if root.linear else 0.0
            use = Use(name, axes, self.decode(carried), on_data, node, operands, shift, alone=alone, summed=summed)
            self._seen.append((root.index, use))
        return noted

    def _note_gates(self, live: list[Flow]) -> None:
        """Tell of activations that meet: a sigmoid that weights what is not its own is a gate, otherwise a nonlinearity."""
        for each in live:
            gates = each.direct & self._gates
            own = self.used_by(gates)
            if any(not own & self.used_by(other.direct) for other in live if other is not each):
                self._logits |= gates

    def _meets_only_parameters(self, inputs: list[torch.Tensor], tensor: torch.Tensor) -> bool:
        met = [each for each in inputs if each is not tensor and each.is_floating_point() and each.dim() > 1]
        return bool(met) and all(self._roots.get(each) is not None for each in met)

    def _note_attention(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name.startswith("_scaled_dot_product"):
            head_dim, queries, keys = int(args[0].shape[-1]), self._flow(args[0]), self._flow(args[1])
            scale, constants = kwargs.get("scale") or head_dim**-0.5, queries.constants | keys.constants
            carries, others = queries.carries, keys.carries | self._flow(args[2]).carries
        elif name in {"_softmax", "_safe_softmax"} and (flow := self._flow(args[0])).product is not None:
            (head_dim, carries, others), scale, constants = flow.product, 1.0, flow.constants
        else:
            return
        self._claimed |= constants
        for i, (value, *_) in enumerate(self._constants):
            scale *= value if constants >> i & 1 else 1.0
        self.attentions.append(Attention(head_dim, scale, self.decode(others), self.decode(carries)))

    def _note_parts(self, whole: torch.Tensor, pieces: list[torch.Tensor]) -> None:
        root, direct = self._roots.get(whole), self._flow(whole).direct
        if root is not None or direct:
            self.parts.add(whole, pieces, self.decode(1 << root.index if root else 0), direct)

    def _carried(self, name: str, tensors: list[torch.Tensor], flows: list[Flow]) -> int:
        own = [each.carries for tensor, each in zip(tensors, flows, strict=True) if self._roots.get(tensor) is not None]
        if name in ops.CONTRACTIONS or name in ops.AFFINE_NORMS:
            return union(own)
        if name in ops.PRODUCTS and flows:
            return self._product(name, tensors, flows, own)
        if name in ops.WRITES:  # into a blank tensor, what is written
            flows = [each for each in flows if each.depends]
        if name in ops.LINEAR and flows and all(each.carries for each in flows):
            return union(each.carries for each in flows)
        return 0

    def _product(self, name: str, tensors: list[torch.Tensor], flows: list[Flow], own: list[int]) -> int:
        """A product carries what one side carries, if the other side does not depend on it (as in x·sigmoid(x))."""
        if own and not name.startswith("div"):
            return own[0]
        sides = flows[:1] if name.startswith("div") else flows
        for side in sides:
            others = union(other.depends for other in flows if other is not side)
            if side.carries and not side.carries & others:
                return side.carries
        return 0

    def _number(self, args: Any) -> float | None:
        """Return the number that a product has as one of its two factors, if it does and its value is known."""
        for each in args[:2]:
            if isinstance(each, (int, float)) and not isinstance(each, bool):
                return float(each)
            if isinstance(each, torch.Tensor) and each.numel() == 1 and not self._flow(each).depends:
                known = getattr(each, "constant", each if type(each) is torch.Tensor else None)
                if known is not None and not known.is_meta:
                    return float(known)
        return None

    def _flow(self, tensor: torch.Tensor) -> Flow:
        root = self._roots.get(tensor)
        if root is not None:
            return Flow(1 << root.index, 1 << root.index if root.linear else 0)
        return self._flows.get(storage_key(tensor)) or Flow()
