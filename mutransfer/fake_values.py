"""Compute the values of fake tensors where a model needs them: for data-dependent sizes, such as the tokens per expert."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ._torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    TorchDispatchMode,
    argument_schemas,
    disable_current_modes,
    overload_packet,
    storage_id,
    tree_leaves,
    tree_map_only,
)
from .errors import RequestError
from .flop_formulas import FORMULAS

__all__ = ["FakeValues"]

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
                raise RequestError(
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
