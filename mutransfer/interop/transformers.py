"""The recorder as a callback of transformers' Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from ..coord_check.recorder import Recorder
from ..schemas import COORDINATES

__all__ = ["RecorderCallback"]


class RecorderCallback(TrainerCallback):
    """Record a `Trainer`'s run, and write the frame where the training ends.

    Args:
        probe: as in `Recorder`.
        path: a file for the frame (schema COORDINATES), .csv or .parquet; None to take it from ``recorder.frame()``.
        options: further arguments of `Recorder`, such as plan, width and seed.
    """

    def __init__(
        self, probe: Callable[[torch.nn.Module], Any], path: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        self.probe, self.path, self.options = probe, path, options
        self.recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin to record."""
        optimizer = given["optimizer"]
        # accelerate's wrapper is no torch optimizer's step.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.recorder = Recorder(given["model"], optimizer, self.probe, **self.options)
        self.recorder.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Stop recording and write the frame."""
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            if self.path is not None and state.is_world_process_zero:
                COORDINATES.write(self.recorder.frame(), self.path)
