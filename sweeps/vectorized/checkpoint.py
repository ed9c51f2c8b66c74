"""Trials in the middle of their run on disk, so that a killed sweep goes on inside of them.

One file holds a whole batch, is called after its own hash, and replaces the one before. A trial is found again by all that its
course depends on, not by its number: the study asks for a killed trial's values again under another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mutransfer.io import write_bytes
from mutransfer.planning.plan import Plan

from ..experiment import Experiment

__all__ = ["Checkpoints", "course_of"]

SUFFIX = ".trials"
SHARE = 0.02  # of the time between two writes that a write may take: rungs that come faster are passed over


class Checkpoints:
    """The files in ``folder``, which is this process's alone.

    Args:
        folder: made when the first file is written.
        share: of the time, how much writing may take; 1 to write whenever asked.
    """

    def __init__(self, folder: Path, share: float = SHARE) -> None:
        self.folder, self.share = folder, share
        self._entries: dict[str, Any] | None = None
        self._own: Path | None = None
        self._written, self._cost = 0.0, 0.0

    def take(self, course: str) -> Any | None:
        """Return what was saved of a trial, once, or None."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries.pop(course, None)

    def due(self) -> bool:
        """Say whether enough time has passed to write again."""
        return time.monotonic() - self._written >= self._cost / self.share - self._cost

    def save(self, entries: Mapping[str, Any]) -> None:
        """Write the trials that run, by their courses, in place of those before.

        Raises:
            RequestError: the disk is full or cannot be written; the file before stays.
        """
        begun = time.monotonic()
        file = io.BytesIO()
        torch.save(dict(entries), file)
        content = file.getvalue()
        path = self.folder / (hashlib.sha256(content).hexdigest() + SUFFIX)
        write_bytes(path, content)
        if self._own not in (None, path):
            self._own.unlink(missing_ok=True)
        self._own = path
        self._written = time.monotonic()
        self._cost = self._written - begun

    def clear(self) -> None:
        """Remove all files: every trial has ended."""
        self._entries, self._own = {}, None
        for path in self.folder.glob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _read(self) -> dict[str, Any]:
        """What is in the files that are whole; where a trial is in two, the one that is further."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:
                path.unlink(missing_ok=True)
                continue
            for course, entry in torch.load(io.BytesIO(content), weights_only=True).items():
                if course not in found or found[course]["step"] < entry["step"]:
                    found[course] = entry
        return found


def course_of(experiment: Experiment, plan: Plan, seed: int, data_sha256: str, precision: str) -> str:
    """Return a hash of all that a trial's course depends on, the code of the person's own model apart."""
    facts = {
        "plan": plan.as_dict(),
        "seed": seed,
        "data": data_sha256,
        "precision": precision,
        **experiment.model_dump(mode="json", include={"model", "options", "steps", "batch_size", "sequence_length"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
