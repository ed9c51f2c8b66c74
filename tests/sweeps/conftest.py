"""A run folder for each test, the log on stderr, and a workplace for tests of commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mutransfer.printing import log_to_stderr
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import RunContext

from ..helpers.scripts import MODEL, ours, until
from ..helpers.small import within


@pytest.fixture(autouse=True)
def _logs_as_the_command_line() -> Iterator[None]:
    with log_to_stderr():
        yield


KNOWN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _what_is_loaded_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the tests of a process, which would otherwise spend most of their time tracing the same few models."""
    made = RunContext.__init__

    def shared(self: RunContext, experiment: Experiment, subjects: dict[str, Any] | None = None) -> None:
        made(self, experiment, KNOWN if subjects is None else subjects)
        while len(KNOWN) > 4:
            KNOWN.pop(next(iter(KNOWN)))

    monkeypatch.setattr(RunContext, "__init__", shared)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def command_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs beside ``models.py``, ends in a minute, and leaves no process behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODEL)
    with within(60):
        yield
    until(lambda: ours(tmp_path) == [])
