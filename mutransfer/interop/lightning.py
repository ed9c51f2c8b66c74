"""`Recorder` as a callback for Lightning's Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback

from ..coord_check.recorder import Recorder
from ..schemas import COORDINATES

__all__ = ["RecorderCallback"]


class RecorderCallback(Callback):
    """Record the training of a Lightning module, and write the frame when training ends.

    Args:
        probe: as in `Recorder`; called with the result of ``model``.
        path: file for the frame (schema COORDINATES), .csv or .parquet; if None, get it from ``recorder.frame()``.
        model: Lightning module → the model to record; by default the module itself.
        options: further arguments of `Recorder`, such as plan, width and seed.
    """

    def __init__(
        self,
        probe: Callable[[torch.nn.Module], Any],
        path: str | os.PathLike[str] | None = None,
        *,
        model: Callable[[Any], torch.nn.Module] = lambda module: module,
        **options: Any,
    ) -> None:
        self.probe, self.path, self.model, self.options = probe, path, model, options
        self.recorder: Recorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start recording with the first optimizer."""
        self.recorder = Recorder(self.model(pl_module), trainer.optimizers[0], self.probe, **self.options)
        self.recorder.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop recording and write the frame."""
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            if self.path is not None and trainer.is_global_zero:
                COORDINATES.write(self.recorder.frame(), self.path)
