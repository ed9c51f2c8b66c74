"""Scale propagation: the constants that the forward pass multiplies each use's result by before another operation consumes it.

A constant can be folded into a parameter if every consumer of the parameter's result sees it multiplied by that constant.
Constants are therefore tracked per use and recorded where the result is consumed: by another matrix, a norm or a nonlinearity.
The factor by which a sum or a norm over n entries changes the size (n, √n) is tracked separately, as a ``residual``: x / ‖x‖ · √n
and x.sum() / n multiply by nothing that grows. A constant may also be stored in a tensor with one entry or with equal entries
(`Scalars`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._torch_internals import disable_current_modes, storage_id, tree_leaves, tree_map_only
from ..initialization import Init, InitTracer
from . import ops as ops
from .aliases import Aliases
from .dataflow import Carriers, Use, Uses, ValueGraph
from .ops import Operation, Value

__all__ = [
    "SOFTMAX",
    "Scalars",
    "Scaled",
    "Scales",
    "SizePower",
    "common",
    "constants",
    "loose",
    "of_buffers",
    "rounded",
]

# Position of the fill value among the arguments.
FILLS: dict[str, int | float] = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1, "fill_": 1}
ONES = {"ones", "ones_like", "new_ones"}
ARITHMETIC = ops.PRODUCTS | ops.SUMS | ops.COPIES | {"sqrt", "rsqrt", "pow", "reciprocal", "neg", "exp", "log", "rsub"}


class Scalars:
    """Tracks which tensors of a traced forward pass hold a single number, as fake tensors do not expose their values."""

    def __init__(self, find: Callable[[torch.Tensor], float | None] = lambda _: None) -> None:
        self._find = find
        self._known: dict[int, float] = {}

    def value(self, each: Any) -> float | None:
        """Return the number that ``each`` is, or that all its entries hold; None if unknown."""
        if isinstance(each, (int, float)) and not isinstance(each, bool):
            return float(each)
        if not isinstance(each, torch.Tensor) or not each.is_floating_point():
            return None
        key = storage_id(each)
        return self._known[key] if key in self._known else self._read(each)

    def see(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], outputs: list[torch.Tensor]) -> None:
        """Record the number that an operation's output holds, if it follows from those of its inputs."""
        if not outputs or not outputs[0].is_floating_point():
            return
        made = None
        if name in FILLS:
            made = self.value(args[FILLS[name]]) if len(args) > FILLS[name] else None
        elif name in ONES:
            made = 1.0
        elif name in ARITHMETIC:
            made = self._computed(func, args, kwargs)
        elif not name.endswith("_"):
            return
        self._known.pop(storage_id(outputs[0]), None)
        if made is not None:
            self._known[storage_id(outputs[0])] = made

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> float | None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not tensors or any(self._known.get(storage_id(each)) is None for each in tensors):
            return None
        with disable_current_modes():
            real = tree_map_only(torch.Tensor, lambda each: torch.tensor(self.value(each), dtype=torch.float64), args)
            return float(func(*real, **{key: each for key, each in kwargs.items() if key == "alpha"}))

    def _read(self, each: torch.Tensor) -> float | None:
        if each.numel() != 1:
            return self._find(each)
        known = getattr(each, "constant", each if type(each) is torch.Tensor else None)
        return self._find(each) if known is None or known.is_meta else float(known)


def of_buffers(model: torch.nn.Module, inits: InitTracer | None) -> Callable[[torch.Tensor], float | None]:
    """Return a function that reads the number in a buffer, or None.

    It is taken from the recorded operations of the constructor (``inits``), or from the values if there is no record and the
    buffer is a real tensor.
    """
    buffers = {storage_id(each): each for each in model.buffers() if each.is_floating_point() and each.numel()}

    def find(tensor: torch.Tensor) -> float | None:
        buffer = buffers.get(storage_id(tensor))
        if inits is None:
            if buffer is None or type(buffer) is not torch.Tensor:
                return None
            first = buffer.flatten()[0]
            return float(first) if bool((buffer == first).all()) else None
        if tensor.numel() == 1:
            number = inits.value(tensor)
            return None if number is None else float(number)
        init = None if buffer is None else inits.find(buffer)
        return init.a if isinstance(init, Init) and init.kind == "constant" and not init.parts else None

    return find


SOFTMAX = {"_softmax", "_safe_softmax"}
POWERS = {"pow", "linalg_vector_norm", "norm"}

# Homogeneous functions: a factor c > 0 on the input is a factor c to this power on the output.
HOMOGENEOUS = {
    **dict.fromkeys(("abs", "relu", "relu_", "leaky_relu", "_prelu_kernel", "clamp", "clamp_min"), 1.0),
    **dict.fromkeys(("clamp_", "clamp_max", "clamp_min_", "clamp_max_"), 1.0),
    **dict.fromkeys(("amax", "max", "maximum", "minimum", "std", "linalg_vector_norm", "norm", "where"), 1.0),
    **{"var": 2.0, "square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0},
}


@dataclass(frozen=True, eq=False)
class Scaled:
    """The constants that an activation has been multiplied by.

    Attributes:
        factors: use that carries a factor into it → the constants multiplied in since.
        residual: the constants multiplied in that are on no parameter's result.
        product: set on the product of two activations that may become attention: its two sides.
    """

    factors: dict[int, float] = field(default_factory=dict)
    residual: float = 1.0
    product: Sides | None = None

    @property
    def number(self) -> float:
        """The constant that the activation has been multiplied by since the last use."""
        return next(iter(self.factors.values()), 1.0) * self.residual


Sides = tuple[Scaled, Scaled]


class Scales:
    """Constants that every use's result has been multiplied by where it is consumed, in one forward pass.

    Attributes:
        taken: use → nodes that consume its result → pairs of (constants multiplied in, residual).
        inner: use → the constants that the module owning the parameter multiplied in itself.
        by: operation → the constant that it multiplies by.
    """

    def __init__(self, aliases: Aliases, graph: ValueGraph, carriers: Carriers, uses: Uses) -> None:
        self.taken: dict[int, dict[int, set[tuple[float, float]]]] = defaultdict(lambda: defaultdict(set))
        self.inner: dict[int, float] = defaultdict(lambda: 1.0)
        self.by: dict[Operation, float] = {}
        self._loose: dict[str, set[tuple[float, int]]] = defaultdict(set)
        self._aliases, self._graph, self._carriers, self._uses = aliases, graph, carriers, uses
        self._scaled: dict[int, Scaled] = {}
        for op in aliases.operations:
            if op.derived:
                alias, number = aliases.get(op.out), aliases.number(op) if op.name in ops.PRODUCTS else None
                if number is not None and alias is not None and not alias.linear:
                    self._record_loose(number, 0, op.module)
            elif op.computes:
                copied = aliases.copied(op)
                scaled = self._result(op) if copied is None else self.of(copied)
                for each in op.outputs:
                    self._scaled[each.version] = scaled

    def of(self, value: Value) -> Scaled:
        """Return the constants that ``value`` has been multiplied by."""
        known = self._scaled.get(value.version) if self._aliases.get(value) is None else None
        return known or Scaled()

    @property
    def loose(self) -> dict[str, set[float]]:
        """Constants that multiply no parameter's result, by module."""
        return {module: {number for number, _ in found} for module, found in self._loose.items()}

    def discard(self, uses: Iterable[int], nodes: set[int]) -> None:
        """Remove the records of ``nodes`` that consume these uses, and of constants there, as they are handled elsewhere."""
        for use in uses:
            for node in nodes:
                self.taken[use].pop(node, None)
        for module, found in self._loose.items():
            self._loose[module] = {each for each in found if each[1] not in nodes}

    def consume(self, scaled: Scaled, node: int, module: str) -> None:
        """Record that ``node``, computed in ``module``, consumes an activation."""
        for use, factor in scaled.factors.items():
            self.taken[use][node].add((rounded(factor), rounded(scaled.residual)))
        if not scaled.factors and scaled.product is None:
            self._record_loose(scaled.residual, node, module)

    def _record_loose(self, number: float, node: int, module: str) -> None:
        self._loose[module].add((rounded(number), node))

    def _result(self, op: Operation) -> Scaled:
        """Return the constants of an operation's result, and record the inputs that it consumes."""
        name, node, module = op.name, self._graph.made(op), op.module
        live = self._live(op)
        own = self._uses.factors[op]
        for use, factor in own.items():
            self.inner[use] *= factor if self._uses.owner(use) == module else 1.0
        carries = self._carriers.of(op.out)
        product = _product(op, live)
        factors, kept = self._kept(op, live, own, product, carries)
        absorbs = not (name in ops.PRODUCTS or name in ops.LINEAR or name in HOMOGENEOUS or name == "pow")
        for each in live:
            if not any(each is other for other in kept) and (each.factors or absorbs):
                self.consume(each, node, module)
        if carries or not own:
            factors |= own
        else:
            self.consume(Scaled(own), node, module)
        residual = _residual(op, live, own, product)
        if name not in SOFTMAX:  # the sides of products that did not become attention
            for each in live:
                if each.product is not None and each.product is not product:
                    for side in each.product:
                        self.consume(side, node, module)
                    self._record_loose(each.residual, node, module)
        else:  # n entries that sum to 1 are 1/n each
            residual = 1 / max(1, int(op.args[0].shape[op.args[1]]))
        return self._multiplied(op, Scaled(factors, residual, product))

    def _live(self, op: Operation) -> list[Scaled]:
        """Return the constants of the activations among an operation's inputs."""
        values = [each for each in self._aliases.activations(op) if self._aliases.depends(each)]
        live = [self.of(each) for each in values]
        second = op.kwargs.get("alpha", 1) if op.name in ops.SUMS else 1
        if second != 1 and self._aliases.live(op.args[1]):  # the second operand, and so the last
            live[-1] = replace(live[-1], factors={use: each * second for use, each in live[-1].factors.items()})
        return live

    def _kept(
        self, op: Operation, live: list[Scaled], own: dict[int, float], product: Sides | None, carries: int
    ) -> tuple[dict[int, float], Sequence[Scaled]]:  # fmt: skip
        """Return the factors that a result keeps of its inputs, and these inputs; it consumes the others."""
        if op.name in ops.CONTRACTIONS and product is not None:
            return {}, product
        if op.name in ops.LINEAR and carries:
            return self._joined(op, live), live
        if op.name in ops.PRODUCTS and carries and not own:
            values = [each for each in self._aliases.activations(op) if self._aliases.depends(each)]
            kept = next(each for value, each in zip(values, live, strict=True) if self._carriers.of(value) == carries)
            return dict(kept.factors), [kept]
        return {}, live[:2] if op.name.startswith("_scaled_dot_product") else []

    def _joined(self, op: Operation, live: list[Scaled]) -> dict[int, float]:
        """Return the constants of a sum's terms.

        A sum has one residual, so a difference between the terms' residuals becomes part of the factors. If two terms bring
        different constants of the same use, both are recorded as consumed.
        """
        factors: dict[int, float] = {}
        common = live[0].residual if live else 1.0
        for each in live:
            for use, factor in each.factors.items():
                brought = factor * each.residual / common if common else factor
                known = factors.setdefault(use, brought)
                if rounded(known) != rounded(brought):
                    self.consume(Scaled({use: brought}), self._graph.made(op), op.module)
                    self.consume(Scaled({use: known}), self._graph.made(op), op.module)
        return factors

    def _multiplied(self, op: Operation, scaled: Scaled) -> Scaled:
        """Multiply the constants of a result by the number that the operation multiplies by."""
        number = self._aliases.number(op) if op.name in ops.PRODUCTS else None
        if number is None or not self._aliases.depends(op.out):
            return scaled
        by = (1 / number if number else float("nan")) if op.name.startswith("div") else float(number)
        self.by[op] = by
        for use in scaled.factors:
            if self._uses.owner(use) == op.module:
                self.inner[use] *= by
        if scaled.factors:
            return replace(scaled, factors={use: each * by for use, each in scaled.factors.items()})
        return replace(scaled, residual=scaled.residual * by)


def _product(op: Operation, live: Sequence[Scaled]) -> Sides | None:
    """Return the sides of the product of activations that an operation's result is, or still is."""
    if op.name in {"mm", "bmm", "baddbmm"} and len(live) >= 2:
        return live[-2], live[-1]
    if op.name in ops.LINEAR or op.name in ops.PRODUCTS or op.name in ops.UNARY or op.name == "where":
        return next((each.product for each in live if each.product), None)
    return None


def _residual(op: Operation, live: Sequence[Scaled], own: Mapping[int, float], product: Sides | None) -> float:
    """Return the constants of a result that are on no parameter's result."""
    name, residuals = op.name, [each.residual for each in live]
    if name in ops.CONTRACTIONS or name in ops.AFFINE_NORMS or not live:
        return 1.0
    if product is not None:
        return next(each.residual for each in live if each.product is product)
    if name in ops.PRODUCTS and len(live) == 2:
        return residuals[0] / residuals[1] if name.startswith("div") else residuals[0] * residuals[1]
    if name in ops.PRODUCTS:
        # Constants before a gain are recorded as consumed; that of a normalized value, carried by no parameter, is kept.
        return 1.0 if own and live[0].factors else residuals[0]
    if not (name in ops.LINEAR or name in HOMOGENEOUS or name == "pow"):
        return 1.0
    known = op.numbers[1] if name in POWERS and len(op.numbers) > 1 else None
    power = 2.0 if known is None else known
    exponent = power if name == "pow" else HOMOGENEOUS.get(name, 1.0)
    count = op.inputs[0].numel() / max(1, op.out.numel())  # number of input entries that are reduced to one
    grown = count if name == "sum" else count ** (1 / power) if name in ("linalg_vector_norm", "norm") else 1.0
    return max(residuals[0], 0.0) ** exponent * grown if residuals[0] else 1.0


def rounded(number: float) -> float:
    """Return ``number`` without the digits that depend on the order of multiplication."""
    return float(f"{number:.9g}")


Taken = frozenset[tuple[float, float]]


@dataclass(frozen=True)
class SizePower:
    """The power of the size that the forward pass multiplies the result of one use by.

    Attributes:
        power: the exponent.
        inside: whether the module that owns the parameter does the multiplication.
        torn: whether the consumers of the result see different constants, so the constant cannot be folded into the parameter.
    """

    power: float = 0.0
    inside: bool = False
    torn: bool = False


def constants(seen: Sequence[Use], larger: Sequence[Use], ratio: float) -> list[SizePower]:
    """Return the size power of every use in ``seen``, by comparison with the uses in a model ``ratio`` times as large."""
    if len(seen) == len(larger):
        return [_compared(a.taken, b.taken, (a.inner, b.inner), ratio) for a, b in zip(seen, larger, strict=True)]
    # The number of uses depends on the size, as in a loop: only what all uses share can be compared.
    both = [frozenset().union(*(use.taken for use in uses)) for uses in (seen, larger)]
    inner = [next((use.inner for use in uses), 1.0) for uses in (seen, larger)]
    return [_compared(both[0], both[1], (inner[0], inner[1]), ratio)] * len(seen)


def common(found: Sequence[SizePower]) -> SizePower:
    """Return the size power that all uses share, or 0 if they differ or are torn: a parameter has one scale for all uses."""
    return found[0] if found and len(set(found)) == 1 and not found[0].torn else SizePower()


def loose(seen: Scales, larger: Scales, ratio: float) -> list[float]:
    """Return the size powers of the constants that multiply no parameter's result."""
    found = set()
    before, after = seen.loose, larger.loose
    for module, a in before.items():
        b = after.get(module, set())
        if a != b and len(a) == len(b):
            found |= {_power(x, y, ratio) for x, y in zip(sorted(a), sorted(b), strict=True)}
    return sorted(found - {0.0})


def _compared(taken: Taken, larger: Taken, inner: tuple[float, float], ratio: float) -> SizePower:
    before, after = _net(taken), _net(larger)
    if before == after:
        return SizePower()
    if len(before) != len(after):
        return SizePower(torn=True)
    powers = {_power(a, b, ratio) for a, b in zip(before, after, strict=True)}
    if powers == {0.0}:
        return SizePower()
    torn = len(powers) > 1 or {residual for _, residual in taken} != {residual for _, residual in larger}
    power = max(powers, key=abs)
    return SizePower(power, inside=_power(*inner, ratio) == power, torn=torn)


def _net(taken: Iterable[tuple[float, float]]) -> list[float]:
    return sorted({float(f"{factor * residual:.6g}") for factor, residual in taken})


def _power(before: float, after: float, ratio: float) -> float:
    return round(math.log(after / before, ratio), 4) if before and after / before > 0 else 0.0
