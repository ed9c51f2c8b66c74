"""Builds and forward passes for tracing: on fake tensors, and decomposed into the operations that the model consists of.

torch's own `Module._apply`, `copy.deepcopy` and lazy parameters do not work on fake tensors, and no machine has every device
that a model is written for. While a model is traced, a cast therefore replaces a parameter's data, tensors for any device are
on the CPU, and every source of random numbers is seeded. Everything is restored afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from .._torch_internals import (
    FakeTensor,
    FakeTensorMode,
    current_dispatch_modes,
    default_device,
    device_constructors,
    disable_current_modes,
    tree_map_only,
)
from ..errors import BuildError, RequestError, describe
from ..family import Family, is_lazy, unwrapped
from ..initialization import InitTracer
from ..recipe import Scale
from .scales import of_buffers
from .tracer import ForwardPass, OpTracer

__all__ = [
    "LAYERS",
    "REAL",
    "WIDER",
    "build",
    "drawn_from",
    "forward",
    "on_cpu",
    "on_fake_tensors",
    "quiet",
    "seeded",
    "unfused",
]


@contextlib.contextmanager
def on_fake_tensors() -> Iterator[FakeTensorMode]:
    """Run builds and forward passes on fake tensors; restore the state of the process afterwards.

    Restored are the states of Python's, numpy's and torch's random number generators, and torch's default dtype and device.
    """
    dtype, default = torch.get_default_dtype(), default_device()
    with _generators_kept(), _patched():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                yield mode
        finally:
            torch.set_default_dtype(dtype)
            if default_device() is not default:
                torch.set_default_device(None if default is None else default.device)


class on_cpu(TorchFunctionMode):  # noqa: N801 - read as a function, like torch.no_grad
    """Context in which everything created on or moved to a device stays on the CPU, and copies of fake tensors are clones.

    torch's own deep copy would copy the fake mode along with the tensor, and views of a tensor of another mode do not share
    its storage.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            return _cloned(*args, **kwargs)
        if func in (torch.Tensor.cuda, torch.Tensor.xpu, torch.Tensor.share_memory_, torch.Tensor.pin_memory):
            return args[0]
        if kwargs.get("device") is not None or (func in device_constructors() and default_device() is not None):
            kwargs = kwargs | {"device": "cpu"}
        if func is torch.Tensor.to:
            return func(args[0], *map(_without_device, args[1:]), **kwargs)
        if func is torch.Tensor.type and len(args) > 1 and isinstance(args[1], str):
            return func(args[0], args[1].replace("torch.cuda.", "torch."), **kwargs)
        return func(*args, **kwargs)


def seeded(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, and all generators that are later created without a seed."""
    random.seed(seed)
    _entropy.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    with disable_current_modes():
        torch.default_generator.manual_seed(seed)


def drawn_from() -> int:
    """Return a number that changes when Python's or numpy's generators, or unseeded ones, are drawn from."""
    numpy = sys.modules.get("numpy")
    kind, keys, *rest = numpy.random.get_state() if numpy else ("", b"")
    return hash((random.getstate(), _entropy.getstate(), kind, bytes(keys), *rest))


def _without_device(value: Any) -> Any:
    is_device = isinstance(value, torch.device | str) or (isinstance(value, int) and not isinstance(value, bool))
    return torch.device("cpu") if is_device else value


def _cloned(tensor: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in memo:
        clone: torch.Tensor = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            clone = torch.nn.Parameter(clone, tensor.requires_grad)
        memo[id(tensor)] = clone.requires_grad_(tensor.requires_grad)
        for name in tensor.__dict__.keys() - clone.__dict__.keys():  # attributes set by the user
            setattr(clone, name, copy.deepcopy(tensor.__dict__[name], memo))
    return memo[id(tensor)]


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python, legacy = random.getstate(), numpy.random.get_state() if numpy else None
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    cpu = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(cpu)
        if numpy:
            numpy.random.set_state(legacy)
        if on_cuda is not None:
            torch.cuda.set_rng_state_all(on_cuda)


_entropy = random.Random(0)  # source of seeds for generators created without one
_apply, _parameter, _buffer = nn.Module._apply, UninitializedParameter.__new__, UninitializedBuffer.__new__
_seed, _generator = random.Random.seed, torch.Generator


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """Patch torch and the random generators.

    In a thread without a fake mode, `_apply` and lazy parameters still behave as usual.
    """
    patches: list[tuple[Any, str, Any]] = [
        (nn.Module, "_apply", _applied),
        (UninitializedParameter, "__new__", _lazy(_parameter, _FakeUninitializedParameter)),
        (UninitializedBuffer, "__new__", _lazy(_buffer, _FakeUninitializedBuffer)),
        (torch, "Generator", _OnCpu),
        (random.Random, "seed", _seeded),
    ]
    if "numpy" in sys.modules:
        import numpy.random.bit_generator as numpys

        if hasattr(numpys, "randbits"):
            patches.append((numpys, "randbits", _entropy.getrandbits))
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _AnyGenerator(type(_generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _generator)


class _OnCpu(_generator, metaclass=_AnyGenerator):  # type: ignore[misc, valid-type]
    """`torch.Generator` on the CPU, regardless of the device asked for."""

    def __new__(cls, device: Any = None) -> Any:
        return _generator()


def _seeded(self: random.Random, a: Any = None, version: int = 2) -> None:
    """Replace `random.Random.seed`: without a seed, use one that is the same in every process."""
    _seed(self, _entropy.getrandbits(64) if a is None and self is not _entropy else a, version)


def _is_fake() -> bool:
    return any(isinstance(mode, FakeTensorMode) for mode in current_dispatch_modes())


def _applied(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Replace `nn.Module._apply` for fake tensors: a parameter keeps its identity and takes the new data, as real ones do.

    torch swaps a fake parameter with the new one, which fails if anything else refers to it (pytorch issue 148977).
    """
    if not _is_fake():
        return _apply(self, fn, recurse)
    if recurse:
        for module in self.children():
            module._apply(fn)
    for key, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            made = fn(parameter)
        if isinstance(parameter, FakeTensor) or not isinstance(made, FakeTensor):
            parameter.data = made
        else:  # a parameter that was created before
            self._parameters[key] = nn.Parameter(made, parameter.requires_grad)
        if parameter.grad is not None:
            with torch.no_grad():
                parameter.grad = fn(parameter.grad)
    for key, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[key] = fn(buffer)
    return self


class _FakeUninitialized(FakeTensor):
    """A fake tensor whose shape is not known yet; torch's own class cannot be made from a fake tensor."""

    cls_to_become = FakeTensor
    shape = torch.Tensor.shape  # that of an empty tensor, which FakeTensor's own code reads

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            kind: Any = UninitializedParameter if isinstance(self, UninitializedParameter) else UninitializedBuffer
            memo[id(self)] = kind(self.requires_grad, None, self.dtype)
        return memo[id(self)]


class _FakeUninitializedParameter(_FakeUninitialized, UninitializedParameter):
    pass


class _FakeUninitializedBuffer(_FakeUninitialized, UninitializedBuffer):
    pass


def _lazy(original: Any, fake: type) -> Any:
    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_fake():
            return original(cls, *args, **kwargs)
        with disable_current_modes():
            like = original(cls, *args, **{**kwargs, "device": "cpu"} if len(args) < 2 else kwargs)
        made: Any = torch.empty(0, dtype=like.dtype, device="cpu").requires_grad_(like.requires_grad)
        made.__dict__.update(like.__dict__)  # such as whether a buffer is persistent
        made._is_param = issubclass(cls, nn.Parameter)
        made.__class__ = fake
        return made

    return staticmethod(new)


WIDER = 2  # doubling the width keeps all of the base's divisibility
LAYERS = 4  # how many layers of a deep base are traced
REAL = 3 * 10**7  # largest model, in parameters, whose forward pass is run for real if it reads values


def build(family: Family, scale: Scale) -> torch.nn.Module:
    """Build the family's model under the caller's fake tensor mode, and materialize lazy parameters.

    A wrapper by `torch.compile` is removed; parameter names are the same except for its prefix.

    Raises:
        BuildError: the build raised or returned something other than a module, or the example batch does not determine the
            shapes of lazy parameters.
    """
    seeded(0)
    try:
        with on_cpu():
            model = family.build(scale)
    except BuildError:
        raise
    except RequestError as error:  # raised by the user's code: whatever its kind, the model cannot be built
        raise BuildError(str(error)) from error
    except Exception as error:
        raise BuildError(f"building {family.name} at {scale} on fake tensors failed ({describe(error)}).") from error
    if not isinstance(model, torch.nn.Module):
        raise BuildError(f"build({scale}) returned {type(model).__name__}: return a torch.nn.Module.")
    model = unwrapped(model)
    if is_lazy(model):
        batch = _on_cpu(family.batch)
        with on_cpu(), quiet(), unfused():
            family.materialize(model, batch)
    return model


def forward(family: Family, model: torch.nn.Module, scale: Scale, inits: InitTracer, seed: int = 0) -> ForwardPass:
    """Trace a forward pass of a model built on fake tensors under ``inits``; run it for real if it reads values and is small.

    ``seed`` seeds the random number generators.

    Raises:
        BuildError: the model does not run on the example batch, or its loss is not a number.
    """
    try:
        with quiet():
            return _watched(family, model, _on_cpu(family.batch), inits, seed)
    except BuildError:
        raise
    except Exception as error:
        if sum(each.numel() for each in model.parameters()) > REAL:
            raise _does_not_run(
                family, error, f"on fake tensors, and is too large at width {scale.width} to be run for real"
            ) from error
    with disable_current_modes(), torch.random.fork_rng(devices=[]):
        model = build(family, scale)
        try:
            return _watched(family, model, family.batch_on("cpu"), None, seed)
        except BuildError:
            raise
        except Exception as error:
            raise _does_not_run(family, error, "on its example batch") from error


def _on_cpu(batch: Any) -> Any:
    """Return the batch on the CPU, as fake tensors if a fake mode is active."""
    mode = next((each for each in current_dispatch_modes() if isinstance(each, FakeTensorMode)), None)
    return tree_map_only(torch.Tensor, lambda each: (mode.from_tensor(each) if mode else each).to("cpu"), batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence log messages about operations that fake tensors cannot run: the pass is run for real instead."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _does_not_run(family: Family, error: Exception, how: str) -> BuildError:
    return BuildError(
        f"{family.name} does not run {how} ({describe(error)}): check that build, batch and loss fit together, or give a "
        "smaller base."
    )


def _watched(family: Family, model: torch.nn.Module, batch: object, inits: InitTracer | None, seed: int) -> ForwardPass:
    tracer = OpTracer(model, of_buffers(model, inits))
    seeded(seed)
    before = drawn_from()
    with torch.no_grad(), unfused(), on_cpu(), tracer:
        try:
            loss = family.loss(model, batch)
        except RequestError as error:  # raised by the user's code, as in `build`
            raise BuildError(str(error)) from error
    draws = drawn_from() != before
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise BuildError(f"loss(model, batch) returned {loss!r:.80}: return a tensor with one entry.")
    return tracer.finish(loss, draws)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Run layers and recurrences as the operations that they consist of, not as one kernel each."""
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    # Not mkldnn.flags(), which would also set TF32 and warn about it.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.backends.mkldnn.enabled = before[1]
