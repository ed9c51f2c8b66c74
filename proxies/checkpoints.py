"""Checkpoints of a run: written beside the old one and then put in its place, with torch's random state."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import IO, Any, cast

import torch

from mutransfer.errors import RequestError
from mutransfer.io import naming_the_disk

from .training import Training

__all__ = ["restore", "save"]

FORMAT = "mutransfer-checkpoint/1"


def save(training: Training, path: Path, identity: str) -> None:
    """Write the checkpoint beside the old one, then put it in its place."""
    state = {"format": FORMAT, "target": identity, "random": _random(training.device), **training.state_dict()}
    # One fixed name, so that a killed run's leftover is overwritten rather than kept.
    partial = path.with_name(f".{path.name}.partial")
    with naming_the_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                writer = _Writer(file)
                try:
                    torch.save(state, cast(IO[bytes], writer))
                except RuntimeError:
                    if writer.error is None:
                        raise
                    raise writer.error from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


class _Writer:
    """A file that remembers why a write failed: torch's archive writer raises a RuntimeError that does not say."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, chunk: Any) -> int:
        try:
            return self.file.write(chunk)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def restore(training: Training, path: Path, identity: str) -> None:
    """Go on from the checkpoint ``path`` of the run that ``identity`` names.

    Raises:
        RequestError: it cannot be read, is of another target, or does not fit the model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state.get("target") if isinstance(state, dict) and state.get("format") == FORMAT else None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise RequestError(
            f"{path} cannot be read ({type(error).__name__}): move it away to start over, or put a good copy in its place."
        ) from None
    if found != identity:
        whose = "is of another target" if found else "is not a checkpoint of mutransfer"
        raise RequestError(f"{path} {whose}: choose another --out, or move it away to start over.")
    try:
        training.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise RequestError(
            f"{path} does not fit the model as its code builds it now ({' '.join(str(error).split())[:160]}): restore the code, "
            "or move the checkpoint away to start over."
        ) from None
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and training.device.startswith("cuda"):
        torch.cuda.set_rng_state(state["random"]["cuda"], training.device)


def _random(device: str) -> dict[str, torch.Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else {}
    return {"cpu": torch.get_rng_state(), **cuda}
