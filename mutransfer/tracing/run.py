"""Builds and forward passes under observation: on fake tensors, and as the operations that the model consists of."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

from ..errors import RequestError, describe
from ..family import Family, is_lazy, unwrapped
from ..initialization import InitWatcher
from ..scale import Scale
from .construct import drawn_from, on_cpu, seeded
from .scales import of_buffers
from .tracer import OpTracer

__all__ = ["LAYERS", "REAL", "WIDER", "build", "forward", "quiet", "unfused"]

WIDER = 2  # a doubled width keeps every divisibility the base has
LAYERS = 4  # of a deep base that are watched
REAL = 3 * 10**7  # parameters up to which a forward pass that reads values is run for real


def build(family: Family, scale: Scale) -> torch.nn.Module:
    """Build the family's model under the caller's fake tensor mode, with lazy parameters in place.

    A model that `torch.compile` wraps comes without the wrapper, whose parameters' names are the same but for it.

    Raises:
        RequestError: the build raised, or returned something else than a module; or lazy parameters whose shape the example
            batch does not tell.
    """
    seeded(0)
    try:
        with on_cpu():
            model = family.build(scale)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"building {family.name} at {scale} on fake tensors failed ({describe(error)}).") from error
    if not isinstance(model, torch.nn.Module):
        raise RequestError(f"build({scale}) returned {type(model).__name__}: return a torch.nn.Module.")
    model = unwrapped(model)
    if is_lazy(model):
        batch = _on_cpu(family.batch)
        with on_cpu(), quiet(), unfused():
            family.materialize(model, batch)
    return model


def forward(family: Family, model: torch.nn.Module, scale: Scale, inits: InitWatcher, seed: int = 0) -> OpTracer:
    """Watch a forward pass of a model built on fake tensors under ``inits``; one that reads values is run for real, if small.

    ``seed`` is what generators of random numbers start from.

    Raises:
        RequestError: the model does not run on the example batch, or its loss is no number.
    """
    try:
        with quiet():
            return _watched(family, model, _on_cpu(family.batch), inits, seed)
    except RequestError:
        raise
    except Exception as error:
        if sum(each.numel() for each in model.parameters()) > REAL:
            raise _does_not_run(
                family, error, f"on fake tensors, and at width {scale.width} is too large to be run"
            ) from error
    with _disable_current_modes(), torch.random.fork_rng(devices=[]):
        model = build(family, scale)
        try:
            return _watched(family, model, family.batch_on("cpu"), None, seed)
        except RequestError:
            raise
        except Exception as error:
            raise _does_not_run(family, error, "on its example batch") from error


def _on_cpu(batch: Any) -> Any:
    """Return the batch as the fake mode in force has it, if there is one."""
    mode = next((each for each in _get_current_dispatch_mode_stack() if isinstance(each, FakeTensorMode)), None)
    return tree_map_only(torch.Tensor, lambda each: (mode.from_tensor(each) if mode else each).to("cpu"), batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what fake tensors cannot run out of the log: it is run for real instead."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _does_not_run(family: Family, error: Exception, how: str) -> RequestError:
    return RequestError(
        f"{family.name} does not run {how} ({describe(error)}): check that build, batch and loss fit together, or give a "
        "smaller base."
    )


def _watched(family: Family, model: torch.nn.Module, batch: object, inits: InitWatcher | None, seed: int) -> OpTracer:
    watcher = OpTracer(model, of_buffers(model, inits))
    seeded(seed)
    before = drawn_from()
    with torch.no_grad(), unfused(), on_cpu(), watcher:
        loss = family.loss(model, batch)
    watcher.draws = drawn_from() != before
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise RequestError(f"loss(model, batch) returned {loss!r:.80}: return a tensor with one entry.")
    watcher.finish(loss)
    return watcher


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Let layers and recurrences run as the operations that they consist of, not as one kernel each."""
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    # Not its flags(), which would set TF32 as well and warn of it.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.backends.mkldnn.enabled = before[1]
