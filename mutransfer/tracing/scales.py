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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._torch_internals import disable_current_modes, tree_leaves, tree_map_only
from ..initialization import Init, InitTracer
from . import ops as ops
from .dataflow import Flow, Use, storage_key

__all__ = ["SizePower", "ScaleTracker", "Scalars", "common", "constants", "loose", "of_buffers", "rounded"]

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
        key = storage_key(each)
        return self._known[key] if key in self._known else self._read(each)

    def factor(self, args: Any, depends: Callable[[torch.Tensor], bool]) -> float | None:
        """Return the number that is one of a product's two factors, or None; tensors for which ``depends`` holds are skipped."""
        for each in args[:2]:
            if isinstance(each, torch.Tensor) and depends(each):
                continue
            if (value := self.value(each)) is not None:
                return value
        return None

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
        self._known.pop(storage_key(outputs[0]), None)
        if made is not None:
            self._known[storage_key(outputs[0])] = made

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> float | None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not tensors or any(self._known.get(storage_key(each)) is None for each in tensors):
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
    buffers = {storage_key(each): each for each in model.buffers() if each.is_floating_point() and each.numel()}

    def find(tensor: torch.Tensor) -> float | None:
        buffer = buffers.get(storage_key(tensor))
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


# Homogeneous functions: a factor c > 0 on the input is a factor c to this power on the output.
HOMOGENEOUS = {
    **dict.fromkeys(("abs", "relu", "relu_", "leaky_relu", "_prelu_kernel", "clamp", "clamp_min"), 1.0),
    **dict.fromkeys(("clamp_", "clamp_max", "clamp_min_", "clamp_max_"), 1.0),
    **dict.fromkeys(("amax", "max", "maximum", "minimum", "std", "linalg_vector_norm", "norm", "where"), 1.0),
    **{"var": 2.0, "square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0},
}


class ScaleTracker:
    """Tracks the constants that every use's result has been multiplied by where it is consumed.

    Attributes:
        taken: use → nodes that consume its result → pairs of (constants multiplied in, residual).
        inner: use → the constants that the module owning the parameter multiplied in itself.
    """

    def __init__(self) -> None:
        self.taken: dict[int, dict[int, set[tuple[float, float]]]] = defaultdict(lambda: defaultdict(set))
        self.inner: dict[int, float] = defaultdict(lambda: 1.0)
        self._loose: dict[str, set[tuple[float, int]]] = defaultdict(set)

    @property
    def loose(self) -> dict[str, set[float]]:
        """Constants that multiply no parameter's result, by module."""
        return {module: {number for number, _ in found} for module, found in self._loose.items()}

    def leave(self, number: float, node: int, module: str) -> None:
        """Record a constant that multiplies no parameter's result at ``node``."""
        self._loose[module].add((rounded(number), node))

    def forget(self, uses: Iterable[int], nodes: set[int]) -> None:
        """Remove the records of ``nodes`` that consume these uses, and of constants there, as they are handled elsewhere."""
        for use in uses:
            for node in nodes:
                self.taken[use].pop(node, None)
        for module, found in self._loose.items():
            self._loose[module] = {each for each in found if each[1] not in nodes}

    def take(self, flow: Flow, node: int, module: str) -> None:
        """Record that ``node``, computed in ``module``, consumes ``flow``."""
        for use, factor in flow.factors.items():
            self.taken[use][node].add((rounded(factor), rounded(flow.residual)))
        if not flow.factors and flow.product is None:
            self.leave(flow.residual, node, module)

    def spill(self, flows: Iterable[Flow], result: Flow, module: str) -> None:
        """Record that ``result`` consumes the sides of products of activations that did not become attention."""
        for flow in flows:
            if flow.product is not None and flow.product is not result.product:
                for side in flow.product.sides:
                    self.take(side, result.node, module)
                self.leave(flow.residual, result.node, module)

    def multiply(self, result: Flow, number: float, module: str, owner: Callable[[int], str]) -> None:
        """Multiply the constants of ``result`` by ``number``."""
        for use in result.factors:
            result.factors[use] *= number
            if owner(use) == module:
                self.inner[use] *= number
        if not result.factors:
            result.residual *= number

    def follow(
        self, name: str, live: list[Flow], own: dict[int, float], result: Flow, module: str, *, count: float, power: float
    ) -> None:  # fmt: skip
        """Pass the constants of the inputs on to ``result`` where it keeps them, and record the other inputs as consumed.

        Args:
            name: name of the operation.
            live: flows of the activations among its inputs.
            own: uses of parameters in this operation, each with the number that its parameter was multiplied by.
            result: flow of the result.
            module: module that runs the operation.
            count: number of input entries that are reduced to one.
            power: exponent of a `pow` or order of a norm.
        """
        attends = name.startswith("_scaled_dot_product")
        if name in ops.CONTRACTIONS and result.product is not None:
            kept = list(result.product.sides)
        elif name in ops.LINEAR and result.carries:
            kept = live
            self._join(live, result, module)
        elif name in ops.PRODUCTS and result.carries and not own:
            kept = [next(flow for flow in live if flow.carries == result.carries)]
            result.factors = dict(kept[0].factors)
        else:
            kept = live[:2] if attends else []
        self._keep_residual(name, live, own, result, count, power)
        absorbs = not (name in ops.PRODUCTS or name in ops.LINEAR or name in HOMOGENEOUS or name == "pow")
        for flow in live:
            if not any(flow is each for each in kept) and (flow.factors or absorbs):
                self.take(flow, result.node, module)
        if result.carries or not own:
            result.factors |= own
        else:
            self.take(Flow(factors=own), result.node, module)

    def _join(self, live: list[Flow], result: Flow, module: str) -> None:
        """Merge the constants of a sum's terms.

        A sum has one residual, so a difference between the terms' residuals becomes part of the factors. If two terms bring
        different constants of the same use, both are recorded as consumed.
        """
        common = live[0].residual if live else 1.0
        for flow in live:
            for use, factor in flow.factors.items():
                brought = factor * flow.residual / common if common else factor
                known = result.factors.setdefault(use, brought)
                if rounded(known) != rounded(brought):
                    self.take(Flow(factors={use: brought}), result.node, module)
                    self.take(Flow(factors={use: known}), result.node, module)

    def _keep_residual(
        self, name: str, live: list[Flow], own: dict[int, float], result: Flow, count: float, power: float
    ) -> None:
        residuals = [flow.residual for flow in live]
        if name in ops.CONTRACTIONS or name in ops.AFFINE_NORMS or not live:
            return
        if result.product is not None:
            result.residual = next(flow.residual for flow in live if flow.product is result.product)
        elif name in ops.PRODUCTS and len(live) == 2:
            result.residual = residuals[0] / residuals[1] if name.startswith("div") else residuals[0] * residuals[1]
        elif name in ops.PRODUCTS:
            # Constants before a gain are recorded as consumed; that of a normalized value, carried by no parameter, is kept.
            result.residual = 1.0 if own and live[0].factors else residuals[0]
        elif name in ops.LINEAR or name in HOMOGENEOUS or name == "pow":
            exponent = power if name == "pow" else HOMOGENEOUS.get(name, 1.0)
            grown = count if name == "sum" else count ** (1 / power) if name in ("linalg_vector_norm", "norm") else 1.0
            result.residual = max(residuals[0], 0.0) ** exponent * grown if residuals[0] else 1.0


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


def loose(seen: ScaleTracker, larger: ScaleTracker, ratio: float) -> list[float]:
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
