"""Shared by all tests: small families, and a machine that behaves the same for all."""

from __future__ import annotations

import importlib.util
import signal
import sys

import pytest
import torch

torch.set_num_threads(1)  # small models: more threads only add noise

# What a shell starts in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# mup pulls in a torchvision that is broken beside a CPU torch, and then breaks transformers; nothing here needs it.
if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
