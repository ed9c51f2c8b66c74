"""The recorder as a callback of Lightning's Trainer."""

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
    """Record a Lightning module's training, and write the frame where it ends.

    Args:
        probe: as in `Recorder`; it is given what ``model`` returns.
        path: a file for the frame (schema COORDINATES), .csv or .parquet; None to take it from ``recorder.frame()``.
        model: the Lightning module → the model to look at, by default the module itself.
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
        """Begin to record, with the first optimizer."""
        self.recorder = Recorder(self.model(pl_module), trainer.optimizers[0], self.probe, **self.options)
        self.recorder.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop recording and write the frame."""
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            if self.path is not None and trainer.is_global_zero:
                COORDINATES.write(self.recorder.frame(), self.path)
