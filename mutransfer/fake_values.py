"""Values of fake tensors where a model asks for them: sizes that depend on data, such as the tokens of a router's experts."""

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

LARGEST = 3 * 10**7  # entries computed for one question: a router's decisions are far smaller
Record = tuple[Any, Any, dict[str, Any], Any]  # an operation, its arguments and its result
aten = torch.ops.aten


class FakeValues(TorchDispatchMode):
    """Answer what `FakeTensorMode` cannot: ``item``, ``nonzero``, indexing by a mask and the like.

    All operations are recorded. When a value is asked for, those that lead to it are computed on real tensors, back to what is
    known exactly (``arange``, a batch given to `fake`) and to products, whose results are drawn from N(0, 1): a router's logits
    are random, and its experts equally likely.

    Args:
        mode: the fake tensor mode, entered before this one.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._tape: list[Record] = []  # keeps all tensors, so that a storage's address stands for one storage
        self._writers: dict[int, list[int]] = {}  # storage → records that make or change it
        self._known: dict[int, torch.Tensor] = {}  # storage → its entries

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor like ``tensor``, whose values are known."""
        made = self._mode.from_tensor(tensor)
        self._record(None, (tensor,), {}, made)
        return made

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
        written = fresh | {_storage(each) for each in _tensors(_changed(func, args, kwargs))}
        if written:  # or it is a view, whose values are its storage's
            for storage in written:
                self._writers.setdefault(storage, []).append(len(self._tape))
                self._known.pop(storage, None)
            self._tape.append((func, args, kwargs, out))

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.masked_select.default:
            tensor, mask = torch.broadcast_tensors(*args)
            func, args = aten.index.Tensor, (tensor, [mask])
        if func is aten.index.Tensor:  # the indices alone decide on the size
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
                torch.manual_seed(record)  # the same whenever it is computed
                self._compute(*self._tape[record])
            return func(*self._values(args), **self._values(kwargs))

    def _leading_to(self, storages: set[int], asked: str) -> list[int]:
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
                    f"the forward pass asks for values ({asked}) that take more than {LARGEST:.0e} numbers to compute, and its "
                    "operations are counted without running it: compute them from less, or leave them out of the loss."
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
        for made, value in zip(_tensors(out), tree_leaves(results), strict=False):
            if _storage(made) not in read:
                self._value(made).copy_(value)

    def _values(self, tree: Any) -> Any:
        tree = tree_map_only(FakeTensor, self._value, tree)
        return tree_map_only(torch.device, lambda _: torch.device("cpu"), tree)

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the real tensor that stands for a fake one: a view of its storage's entries."""
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


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes into."""
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
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if whole else torch.randn(tensor.shape).to(tensor.dtype)
