"""`Recorder` as a callback for transformers' Trainer."""

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
    """Record a run of `Trainer`, and write the frame when training ends.

    Args:
        probe: as in `Recorder`.
        path: file for the frame (schema COORDINATES), .csv or .parquet; if None, get it from ``recorder.frame()``.
        options: further arguments of `Recorder`, such as plan, width and seed.
    """

    def __init__(
        self, probe: Callable[[torch.nn.Module], Any], path: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        self.probe, self.path, self.options = probe, path, options
        self.recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start recording."""
        optimizer = kwargs["optimizer"]
        # Unwrap accelerate's optimizer: step hooks belong on the torch optimizer.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.recorder = Recorder(kwargs["model"], optimizer, self.probe, **self.options)
        self.recorder.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop recording and write the frame."""
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            if self.path is not None and state.is_world_process_zero:
                COORDINATES.write(self.recorder.frame(), self.path)
