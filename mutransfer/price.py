"""The cost of a training step in floating point operations, counted operation by operation before anything is built.

The same convention applies to every kind of layer:

- A multiply-add counts as 2 operations, or as 8 for complex numbers.
- Products are counted: of matrices, convolutions (padding included), attention, recurrences, distances. Entrywise work,
  normalizations, reductions, gathers and entrywise optimizers are left out, as in the usual 6·N·D. Muon's products are counted
  separately, by `optimizer_flops`.
- Attention is counted in full whatever its mask, so that written-out and fused causal attention cost the same: 4·T·S·d forward
  for T queries, S keys and a width d over all heads, and twice that backward. Scores that a fused kernel recomputes in its
  backward pass are not counted.
- Everything else is counted as executed. A layer under activation checkpointing runs forward twice (up to the last tensor that
  its backward pass needs). A gradient that is not needed, such as that of the data or of a recurrence's initial state, costs
  nothing.
- Where sizes depend on values (experts chosen by a router), the values are computed from random products. The count is exact if
  every token goes to the same number of experts; otherwise (tokens dropped at a capacity) it is that of a random router.

Operations that may cost something but have no formula are named in `Flops.uncounted`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ._torch_internals import (
    NEWTON_SCHULZ,
    FakeTensor,
    HigherOrderOperator,
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    operator_name,
    overload_packet,
    tree_leaves,
    tree_map_only,
)
from .errors import RequestError
from .fake_values import FakeValues
from .family import Family
from .flop_formulas import FORMULAS, HIGHER_ORDER, Formula, grouped_mm, is_free
from .optimizers.rules import OPTIMIZERS, Muon
from .planning.plan import Plan
from .scale import Scale
from .tracing.run import REAL, build, on_cpu, on_fake_tensors, quiet, unfused

__all__ = ["FlopCounter", "Flops", "optimizer_flops", "step_cost", "step_flops"]

ITERATIONS = NEWTON_SCHULZ[1]


@dataclass(frozen=True)
class Flops:
    """A number of floating point operations, and the operations it does not include.

    Attributes:
        total: the sum over all operations that have a formula.
        uncounted: names of the operations that may cost something but have no formula, such as ``aten::_fft_r2c`` or a
            custom ``mylib::op`` (`torch.utils.flop_counter.register_flop_formula` adds one).
    """

    total: float
    uncounted: tuple[str, ...] = ()


def step_cost(family: Family, scale: Scale, batch: Any) -> Flops:
    """Return the cost of one training step (forward and backward) on ``batch``.

    The model runs on fake tensors, and nothing of its size is allocated. Only a small model that cannot run on fake tensors is
    run on real ones.

    Raises:
        RequestError: the model cannot be built, or needs values that cannot be computed without running it.
    """
    size = 0
    try:
        with on_fake_tensors() as mode, FakeValues(mode) as values, quiet():
            model = build(family, scale)
            size = sum(each.numel() for each in model.parameters())
            return _counted(family, model, tree_map_only(torch.Tensor, values.fake, batch))
    except RequestError:
        if not 0 < size <= REAL:
            raise
    except Exception:
        if size > REAL:
            raise
    with torch.random.fork_rng(devices=[]):
        return _counted(family, family.built(scale), batch)


def _counted(family: Family, model: torch.nn.Module, batch: Any) -> Flops:
    with on_cpu(), FlopCounter() as counter:
        family.printing_once().loss(model, batch).backward()
    return counter.flops


def optimizer_flops(plan: Plan) -> float:
    """Return the floating point operations of one optimizer step: Muon's Newton-Schulz iteration, 0 for other optimizers.

    There are five iterations (Jordan et al. 2024) of three products each: X·Xᵀ, its square, and that times X.
    """
    total = 0.0
    for row in plan.rows:
        if isinstance(OPTIMIZERS[plan.optimizer].of(row), Muon):
            short, long = sorted(row.shape)
            total += ITERATIONS * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)
    return total


def step_flops(family: Family, scale: Scale, batch: Any) -> float:
    """Return the total of `step_cost`."""
    return step_cost(family, scale, batch).total


class FlopCounter(TorchDispatchMode):
    """Count the operations that run inside the context, on fake or real tensors; read `flops` afterwards.

    Inside, compiled functions run uncompiled, and fused layers run as the operations they consist of.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._total = 0.0
        self._uncounted: dict[str, None] = {}
        self._around: list[contextlib.ExitStack] = []

    @property
    def flops(self) -> Flops:
        """The count so far."""
        return Flops(self._total, tuple(self._uncounted))

    def __enter__(self) -> FlopCounter:
        if not self._around:  # re-entered to count the operations that another one consists of
            stack = contextlib.ExitStack()
            stack.enter_context(unfused())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_flex_attention_trains_on_the_cpu())
            self._around.append(stack)
        else:
            self._around.append(contextlib.ExitStack())
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._around.pop().close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(each) for each in tree_leaves((args, kwargs))):
            return NotImplemented  # ragged or sharded: operations on the inner tensors are dispatched in turn, and counted then
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        packet = overload_packet(func)
        formula = FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None and not is_free(func):
            with self:  # in inference mode, composite operations arrive here undecomposed
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        fake = any(isinstance(each, FakeTensor) for each in args[:2])
        out = (grouped_mm if fake and packet is torch.ops.aten._grouped_mm else func)(*args, **kwargs)
        if formula is not None:
            self._add(func, formula, args, kwargs, out)
        elif not is_free(func):
            self._uncounted[operator_name(func)] = None
        return out

    def _add(self, func: Any, formula: Formula, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        dense = all(each.layout is torch.strided for each in tree_leaves((args, out)) if isinstance(each, torch.Tensor))
        if not dense:  # the shape of a sparse or ragged tensor does not show how many entries it holds
            self._uncounted[f"{_name(func)} of {_layout(args)} tensors"] = None
            return
        products = 4 if any(isinstance(each, torch.Tensor) and each.is_complex() for each in tree_leaves(args)) else 1
        self._total += products * formula(*args, **kwargs, out_val=out)

    def _higher_order(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.name()
        formula = HIGHER_ORDER.get(name) or flop_registry.get(func)
        if formula is not None:
            out = func(*args, **kwargs)
            self._add(func, formula, args, kwargs, out)
            return out
        match name:
            case "cond":  # the more expensive branch, because the condition is not known
                costs = [_cost(branch, args[3]) for branch in args[1:3]]
                parts, times = max(costs, key=lambda cost: cost.total), 1
            case "scan":
                combine, init, xs, additional = args
                parts, times = _cost(combine, (*init, *(x[0] for x in xs), *additional)), len(xs[0])
            case "map_impl":
                mapped, xs, others = args
                parts, times = _cost(mapped, (*(x[0] for x in xs), *others)), len(xs[0])
            case _:
                parts, times = Flops(0.0, (name,)), 1
        self._total += times * parts.total
        self._uncounted |= dict.fromkeys(parts.uncounted)
        return func(*args, **kwargs)


def _cost(called: Callable[..., Any], operands: Any) -> Flops:
    with torch.no_grad(), FlopCounter() as counter:
        called(*operands)
    return counter.flops


@contextlib.contextmanager
def _flex_attention_trains_on_the_cpu() -> Iterator[None]:
    """Skip the check by which flex attention refuses gradients on the CPU, where fake tensors stand in for a GPU's."""
    from torch.nn.attention import flex_attention as module

    check = getattr(module, "_validate_device", None)
    if check is None:
        yield
        return
    module._validate_device = lambda *_: None
    try:
        yield
    finally:
        module._validate_device = check


def _name(func: Any) -> str:
    return operator_name(func)


def _layout(args: Any) -> str:
    layouts = {str(each.layout).removeprefix("torch.") for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
    return " and ".join(sorted(layouts - {"strided"}))
