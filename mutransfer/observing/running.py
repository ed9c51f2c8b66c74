"""Builds and forward passes under observation: on fake tensors, and as the operations that the model consists of."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..errors import RequestError, describe
from ..family import Family
from ..inits import InitWatcher
from ..scale import Scale
from .copied import CopiedAsValues
from .scalars import of_buffers
from .uses import UseWatcher

__all__ = ["LAYERS", "REAL", "WIDER", "build", "forward", "quiet", "unfused"]

WIDER = 2  # a doubled width keeps every divisibility the base has
LAYERS = 4  # of a deep base that are watched
REAL = 3 * 10**7  # parameters up to which a forward pass that reads values is run for real


def build(family: Family, scale: Scale) -> torch.nn.Module:
    """Build the family's model under the caller's fake tensor mode.

    Raises:
        RequestError: the build raised, or returned something else than a module.
    """
    try:
        with CopiedAsValues():
            model = family.build(scale)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"building {family.name} at {scale} on fake tensors failed ({describe(error)}).") from error
    if not isinstance(model, torch.nn.Module):
        raise RequestError(f"build({scale}) returned {type(model).__name__}: return a torch.nn.Module.")
    return model


def forward(
    family: Family, model: torch.nn.Module, mode: FakeTensorMode, scale: Scale, inits: InitWatcher
) -> UseWatcher:
    """Watch a forward pass of a model built in ``mode`` under ``inits``; one that reads values is run for real, if small.

    Raises:
        RequestError: the model does not run on the example batch, or its loss is no number.
    """
    batch = tree_map_only(torch.Tensor, mode.from_tensor, family.batch)
    try:
        with quiet():
            return _watched(family, model, batch, inits)
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
            return _watched(family, model, family.batch, None)
        except RequestError:
            raise
        except Exception as error:
            raise _does_not_run(family, error, "on its example batch") from error


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


def _watched(family: Family, model: torch.nn.Module, batch: object, inits: InitWatcher | None) -> UseWatcher:
    watcher = UseWatcher(model, of_buffers(model, inits))
    with torch.no_grad(), unfused(), watcher:
        loss = family.loss(model, batch)
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
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.backends.mkldnn.enabled = before[1]
