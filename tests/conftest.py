"""Shared by all tests: a machine that behaves the same for all, and a summary that says which sets of tests were left out."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
import torch

from .helpers import sets

torch.set_num_threads(1)  # small models: more threads only add noise

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")

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


_deselected: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _deselected.update(sets.count(items))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker of pytest-xdist: only the process that started it has a summary
        output["left_out"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    left_out = getattr(node, "workeroutput", {}).get("left_out")  # missing where the worker has crashed
    if left_out is not None:  # every worker collects, and deselects, the same
        _deselected.clear()
        _deselected.update(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in sets.lines(_deselected):
        terminalreporter.write_line(line)
