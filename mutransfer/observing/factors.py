"""Numbers on their way: by what the forward pass multiplies the result of every use before something takes it in.

A number can be written on a parameter if all that the parameter's result goes into sees it multiplied by that number. So
it is followed per use, and noted where the result is taken in: by another matrix, a norm, a nonlinearity. What a sum or a
norm over n entries does to a size (n, √n) is followed apart, as a ``residual``: x / ‖x‖ · √n and x.sum() / n multiply with
nothing that grows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from . import operations as ops
from .flows import Flow

__all__ = ["Factors", "rounded"]

# Functions that turn a factor c > 0 on their input into c to this power.
HOMOGENEOUS = {
    **dict.fromkeys(("abs", "relu", "relu_", "leaky_relu", "_prelu_kernel", "clamp", "clamp_min"), 1.0),
    **dict.fromkeys(("clamp_", "clamp_max", "clamp_min_", "clamp_max_"), 1.0),
    **dict.fromkeys(("amax", "max", "maximum", "minimum", "std", "linalg_vector_norm", "norm", "where"), 1.0),
    **{"var": 2.0, "square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0},
}


class Factors:
    """What every use's result has been multiplied with where it is taken in.

    Attributes:
        taken: use → nodes that took it in → pairs of (numbers multiplied in, residual).
        inner: use → the numbers that the module which owns the parameter multiplied in itself.
    """

    def __init__(self) -> None:
        self.taken: dict[int, dict[int, set[tuple[float, float]]]] = defaultdict(lambda: defaultdict(set))
        self.inner: dict[int, float] = defaultdict(lambda: 1.0)
        self._loose: dict[str, set[tuple[float, int]]] = defaultdict(set)

    @property
    def loose(self) -> dict[str, set[float]]:
        """Numbers that were on no parameter's result, by module."""
        return {module: {number for number, _ in found} for module, found in self._loose.items()}

    def leave(self, number: float, node: int, module: str) -> None:
        """Note a number that is on no parameter's result at ``node``."""
        self._loose[module].add((rounded(number), node))

    def forget(self, uses: Iterable[int], nodes: set[int]) -> None:
        """Forget that ``nodes`` have taken in these uses, and numbers there: what becomes of them is told elsewhere."""
        for use in uses:
            for node in nodes:
                self.taken[use].pop(node, None)
        for module, found in self._loose.items():
            self._loose[module] = {each for each in found if each[1] not in nodes}

    def take(self, flow: Flow, node: int, module: str) -> None:
        """Note that ``node``, made in ``module``, has taken ``flow`` in."""
        for use, factor in flow.factors.items():
            self.taken[use][node].add((rounded(factor), rounded(flow.residual)))
        if not flow.factors and flow.product is None:
            self.leave(flow.residual, node, module)

    def spill(self, flows: Iterable[Flow], result: Flow, module: str) -> None:
        """Take in the sides of a product of activations that did not become attention."""
        for flow in flows:
            if flow.product is not None and flow.product is not result.product:
                for side in flow.product.sides:
                    self.take(side, result.node, module)
                self.leave(flow.residual, result.node, module)

    def multiply(self, result: Flow, number: float, module: str, owner: Callable[[int], str]) -> None:
        """Multiply ``result`` with a number."""
        for use in result.factors:
            result.factors[use] *= number
            if owner(use) == module:
                self.inner[use] *= number
        if not result.factors:
            result.residual *= number

    def follow(
        self, name: str, live: list[Flow], own: dict[int, float], result: Flow, module: str, *, count: float, power: float
    ) -> None:  # fmt: skip
        """Hand on what ``result`` keeps of the flows that entered, and take in the rest.

        ``own`` are the uses of parameters in this operation; ``count`` is how many entries of the input become one, and
        ``power`` the exponent of a `pow`.
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
        """A sum has one residual: what differs is part of the factors; two ways of one use that differ are both taken in."""
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
            # What a gain took in has been noted; a normalized value, which nothing carries, goes on through it.
            result.residual = 1.0 if own and live[0].factors else residuals[0]
        elif name in ops.LINEAR or name in HOMOGENEOUS or name == "pow":
            exponent = power if name == "pow" else HOMOGENEOUS.get(name, 1.0)
            grown = count if name == "sum" else count ** (1 / power) if name in ("linalg_vector_norm", "norm") else 1.0
            result.residual = max(residuals[0], 0.0) ** exponent * grown if residuals[0] else 1.0


def rounded(number: float) -> float:
    """Return ``number`` without the digits in which two orders of multiplying differ."""
    return float(f"{number:.9g}")
