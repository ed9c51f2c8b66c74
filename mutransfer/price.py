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

Where a size depends on data, such as the tokens per expert, the values of fake tensors are computed (`FakeValues`).
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
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    TorchDispatchMode,
    argument_schemas,
    disable_current_modes,
    is_traceable_wrapper_subclass,
    operator_name,
    overload_packet,
    storage_id,
    tree_leaves,
    tree_map_only,
)
from .errors import BuildError
from .family import Family
from .flop_formulas import FORMULAS, HIGHER_ORDER, Formula, grouped_mm, is_free
from .optimizers.rules import OPTIMIZERS, Muon
from .planning.plan import Plan
from .recipe import Scale
from .tracing.run import REAL, build, on_cpu, on_fake_tensors, quiet, unfused

__all__ = ["FakeValues", "FlopCounter", "Flops", "optimizer_flops", "step_cost", "step_flops"]

LARGEST = 3 * 10**7  # most entries computed for one value; a router's decisions need far fewer
Record = tuple[Any, Any, dict[str, Any], Any]  # (operation, args, kwargs, result)
aten = torch.ops.aten


class FakeValues(TorchDispatchMode):
    """Run the operations that `FakeTensorMode` cannot: ``item``, ``nonzero``, indexing by a mask and similar ones.

    All operations are recorded. When a value is needed, the operations that lead to it are computed on real tensors. They
    start from values that are known exactly (``arange``, a batch passed to `fake`) and from products, whose results are drawn
    from N(0, 1): a router's logits are random, and its experts equally likely.

    Args:
        mode: the fake tensor mode, which must be entered before this one.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._tape: list[Record] = []  # keeps all tensors alive, so that no storage's address is reused
        self._writers: dict[int, list[int]] = {}  # storage → records that create or modify it
        self._known: dict[int, torch.Tensor] = {}  # storage → its entries

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a fake copy of ``tensor`` whose values are known."""
        fake = self._mode.from_tensor(tensor)
        self._record(None, (tensor,), {}, fake)
        return fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return self._answer(func, args, kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        read = {_storage(each) for each in _tensors((args, kwargs))}
        fresh = {_storage(each) for each in _tensors(out)} - read
        written = fresh | {_storage(each) for each in _tensors(_mutated(func, args, kwargs))}
        if written:  # otherwise it is a view, whose values are those of its storage
            for storage in written:
                self._writers.setdefault(storage, []).append(len(self._tape))
                self._known.pop(storage, None)
            self._tape.append((func, args, kwargs, out))

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.masked_select.default:
            tensor, mask = torch.broadcast_tensors(*args)
            func, args = aten.index.Tensor, (tensor, [mask])
        if func is aten.index.Tensor:  # only the indices determine the size
            indices: list[Any] = []
            for index in args[1]:
                mask = index is not None and index.dtype in (torch.bool, torch.uint8)
                indices += self._answer(aten.nonzero.default, (index,), {}).unbind(1) if mask else [index]
            out = func(args[0], indices)
            self._record(func, (args[0], indices), {}, out)
            return out
        real = self._real(func, args, kwargs)
        return tree_map_only(torch.Tensor, self.fake, real)

    def _real(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the operation's result on real tensors."""
        records = self._leading_to({_storage(each) for each in _tensors((args, kwargs))}, str(func))
        with disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for record in records:
                torch.manual_seed(record)  # the same values every time it is computed
                self._compute(*self._tape[record])
            return func(*self._values(args), **self._values(kwargs))

    def _leading_to(self, storages: set[int], operation: str) -> list[int]:
        records: set[int] = set()
        seen: set[int] = set()
        entries = 0
        while storages:
            storage = storages.pop()
            if storage in seen or storage in self._known:
                continue
            seen.add(storage)
            for record in self._writers.get(storage, ()):
                if record in records:
                    continue
                records.add(record)
                func, args, kwargs, out = self._tape[record]
                entries += sum(each.numel() for each in _tensors(out))
                storages |= {_storage(each) for each in _tensors(out)}
                if not _is_product(func):
                    storages |= {_storage(each) for each in _tensors((args, kwargs))}
            if entries > LARGEST:
                raise BuildError(
                    f"the forward pass needs values ({operation}) that take more than {LARGEST:.0e} entries to compute, but its "
                    "operations are counted without running it: compute them from smaller tensors, or leave them out of the loss."
                )
        return sorted(records)

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if func is None:
            results = args[0]
        elif _is_product(func):
            results = tree_map_only(torch.Tensor, _random, out)
        else:
            results = func(*self._values(args), **self._values(kwargs))
        read = {_storage(each) for each in _tensors((args, kwargs))} if not _is_product(func) else set()
        for fake, value in zip(_tensors(out), tree_leaves(results), strict=False):
            if _storage(fake) not in read:
                self._value(fake).copy_(value)

    def _values(self, tree: Any) -> Any:
        tree = tree_map_only(FakeTensor, self._value, tree)
        return tree_map_only(torch.device, lambda _: torch.device("cpu"), tree)

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the real counterpart of a fake tensor: a view of its storage's entries."""
        storage = _storage(tensor)
        if storage not in self._known:
            count = tensor.untyped_storage().nbytes() // tensor.itemsize
            self._known[storage] = torch.zeros(count, dtype=tensor.dtype)
        entries = self._known[storage]
        if entries.dtype != tensor.dtype:
            entries = entries.view(tensor.dtype)
        return entries.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, FakeTensor)]


def _storage(tensor: torch.Tensor) -> int:
    return storage_id(tensor)


def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to."""
    if func is None or isinstance(func, HigherOrderOperator):
        return []
    named = [each for each in argument_schemas(func) if each.alias_info is not None and each.alias_info.is_write]
    given = dict(zip((each.name for each in argument_schemas(func)), args, strict=False)) | kwargs
    return [given[each.name] for each in named if each.name in given]


def _is_product(func: Any) -> bool:
    if isinstance(func, HigherOrderOperator):
        return True
    return func is not None and (overload_packet(func) in FORMULAS or overload_packet(func) in flop_registry)


def _random(tensor: torch.Tensor) -> torch.Tensor:
    integral = not (tensor.is_floating_point() or tensor.is_complex())
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if integral else torch.randn(tensor.shape).to(tensor.dtype)


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
        BuildError: the model cannot be built, or needs values that cannot be computed without running it.
    """
    size = 0
    try:
        with on_fake_tensors() as mode, FakeValues(mode) as values, quiet():
            model = build(family, scale)
            size = sum(each.numel() for each in model.parameters())
            return _counted(family, model, tree_map_only(torch.Tensor, values.fake, batch))
    except BuildError:
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
