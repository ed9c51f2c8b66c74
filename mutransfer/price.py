"""What a training step costs in floating point operations, counted on the operations themselves and before anything is built.

The convention, for every kind of layer:

- A multiply-add is 2 operations, of complex numbers 8.
- Counted are products: of matrices, convolutions (padding included), attention, recurrences, distances. Entrywise work,
  normalizations, reductions, gathers and entrywise optimizers are left out, as in the usual 6·N·D; Muon's products are
  `optimizer_flops`.
- Attention is counted in full whatever its mask, so that causal attention written out and fused cost the same: 4·T·S·d forward
  for T queries, S keys and a width d over all heads, and twice that backward. Scores that a fused kernel computes again in its
  backward pass are its own affair and not counted.
- Everything else is counted as executed. A layer under activation checkpointing is computed twice forward (up to the last
  tensor that its backward pass needs); a gradient that nobody needs, such as the data's or a recurrence's initial state's, is
  no work.
- Where values decide on sizes (experts chosen by a router), they are computed from random products: the count is exact where
  every token goes to the same number of experts, and otherwise (tokens dropped at a capacity) that of a random router.

Whatever may be work and has no formula here is named: see `Flops.uncounted`.
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
    """Floating point operations, and what they do not include.

    Attributes:
        total: of all operations that have a formula.
        uncounted: names of the operations that may be work and have none, such as ``aten::_fft_r2c`` or a custom
            ``mylib::op`` (`torch.utils.flop_counter.register_flop_formula` gives it one).
    """

    total: float
    uncounted: tuple[str, ...] = ()


def step_cost(family: Family, scale: Scale, batch: Any) -> Flops:
    """Return the cost of one training step (forward and backward) on ``batch``.

    Nothing of the model's size is allocated. Only a small model that does not run on fake tensors is run for real.

    Raises:
        RequestError: the model cannot be built, or asks for values that cannot be computed without running it.
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
    """Return the floating point operations of one optimizer step: of Muon's Newton-Schulz iteration, 0 for all others.

    Five iterations (Jordan et al. 2024), each of three products: X·Xᵀ, its square, and that times X.
    """
    total = 0.0
    for row in plan.rows:
        if isinstance(OPTIMIZERS[plan.optimizer].of(row), Muon):
            short, long = sorted(row.shape)
            total += ITERATIONS * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)
    return total


def step_flops(family: Family, scale: Scale, batch: Any) -> float:
    """Return `step_cost`'s total."""
    return step_cost(family, scale, batch).total


class FlopCounter(TorchDispatchMode):
    """Count what runs inside, on fake or real tensors; ask `flops` afterwards.

    Compiled functions run uncompiled inside, and layers as the operations that they consist of.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._total = 0.0
        self._uncounted: dict[str, None] = {}
        self._around: list[contextlib.ExitStack] = []

    @property
    def flops(self) -> Flops:
        """What was counted so far."""
        return Flops(self._total, tuple(self._uncounted))

    def __enter__(self) -> FlopCounter:
        if not self._around:  # re-entered to count the operations that another consists of
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
            return NotImplemented  # ragged or sharded: what it holds is operated on in turn, and seen then
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        packet = overload_packet(func)
        formula = FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None and not is_free(func):
            with self:  # what torch itself breaks down, in inference mode
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
        if not dense:  # of a sparse or ragged tensor the shape does not say how much is in it
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
            case "cond":  # the dearer branch, as the condition may be anything
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
    """Leave out flex attention's refusal of gradients on the CPU, where fake tensors stand for a GPU's."""
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
