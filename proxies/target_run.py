"""Train a target config, with checkpoints from which a run can resume after being killed at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

from mutransfer.errors import DataError, FileError, RequestError
from mutransfer.io import naming_the_disk
from mutransfer.planning.target import TargetConfig

from .data import Data, load_data
from .importing import modules_in
from .load import load_family
from .training import FINITE_EVERY, Training

__all__ = ["restore", "run_target", "save"]

FORMAT = "mutransfer-checkpoint/1"


def save(training: Training, path: Path, identity: str) -> None:
    """Save a checkpoint of ``training`` to ``path``.

    The checkpoint is written to a temporary file, which then replaces the previous checkpoint atomically.

    Args:
        training: the run to save.
        path: file of the checkpoint; its folders are created.
        identity: string that identifies the run; `restore` checks it.

    Raises:
        FileError: if the disk is full or ``path`` cannot be written.
    """
    state = {"format": FORMAT, "target": identity, "random": _random(training.device), **training.state_dict()}
    # The name is fixed so that the next save overwrites a partial file left behind by a killed run.
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
    """File wrapper that keeps the OSError of a failed write; torch's archive writer raises a RuntimeError without the cause."""

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
    """Restore ``training`` and the random state from the checkpoint at ``path``.

    Args:
        training: the run to continue.
        path: file of the checkpoint.
        identity: string that identifies the run; it must equal the one given to `save`.

    Raises:
        FileError: if the checkpoint cannot be read, belongs to another target, or does not fit the model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state.get("target") if isinstance(state, dict) and state.get("format") == FORMAT else None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise FileError(
            f"{path} cannot be read ({type(error).__name__}): move it away to start over, or replace it with an intact copy."
        ) from None
    if found != identity:
        problem = "belongs to another target" if found else "is not a checkpoint of mutransfer"
        raise FileError(f"{path} {problem}: choose another --out, or move it away to start over.")
    try:
        training.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise FileError(
            f"{path} does not fit the model that its code builds now ({' '.join(str(error).split())[:160]}): restore the code "
            "that wrote it, or move the checkpoint away to start over."
        ) from None
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and training.device.startswith("cuda"):
        torch.cuda.set_rng_state(state["random"]["cuda"], training.device)


def _random(device: str) -> dict[str, torch.Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else {}
    return {"cpu": torch.get_rng_state(), **cuda}


SLOW = 0.05  # seconds per step above which returning from `Training.advance` after every step has negligible cost


def run_target(
    target: TargetConfig,
    out: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 1000,
    progress: Callable[[int, int], None] = lambda done, total: None,
    resume: bool = True,
) -> dict[str, Any]:
    """Train ``target``, resuming from ``out/checkpoint.pt`` if it exists.

    On CPU a resumed run ends with bitwise the same weights as an uninterrupted one. Ctrl-C finishes the current step and
    saves a checkpoint before the KeyboardInterrupt propagates; a second Ctrl-C interrupts immediately and leaves the previous
    checkpoint in place. A diverged run keeps its last checkpoint with a finite loss.

    Args:
        target: the model, data and settings to train with.
        out: folder of the checkpoint.
        device: torch device to train on.
        checkpoint_every: steps between checkpoints.
        progress: callback, called often with (steps done, total steps).
        resume: if False, start over and overwrite an existing checkpoint.

    Returns:
        A dictionary with ``loss`` (validation loss in nats, None if not finite), ``steps`` (steps done in the whole run),
        ``tokens_per_second`` (examples per second for images; measured over this call, None if no step was left to do) and
        ``checkpoint`` (its path, None if there is none).

    Raises:
        RequestError: if the data differs from the target's, the checkpoint is damaged or belongs to another target, or the
            disk is full.
        KeyboardInterrupt: if the run is interrupted; raised after saving, unless it is the second Ctrl-C.
    """
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise RequestError(f"checkpoint_every is {checkpoint_every!r}: give a number of steps of at least 1.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"the device is {device} and torch sees no GPU here: use --device cpu.")
    references, folder = target.found()
    data = load_data(references["data"], target.sequence_length)
    _refuse_other_data(target, data)
    torch.manual_seed(target.seed)  # for random numbers that the plan does not draw: buffers and dropout
    with modules_in(folder):
        family = load_family(references["model"], data, target.plan.base, options=target.options)
    training = Training(
        family, target.plan, data, steps=target.steps, batch_size=target.batch_size, seed=target.seed, device=device
    )
    path, identity = Path(out) / "checkpoint.pt", _identity(target, data)
    if resume and path.exists():
        restore(training, path, identity)
    start_step, seconds = training.step, 0.0
    interval = 1
    with _interrupts() as interrupted:
        while training.step < target.steps and training.finite:
            due = min(target.steps, (training.step // checkpoint_every + 1) * checkpoint_every)
            until = min(due, (training.step // interval + 1) * interval)
            before, clock = training.step, time.perf_counter()
            training.advance(until)
            took = time.perf_counter() - clock
            seconds += took
            interval = 1 if took > SLOW * (training.step - before) else FINITE_EVERY
            if training.step == due and training.finite:
                save(training, path, identity)
            try:
                progress(training.step, target.steps)
                if interrupted.is_set():
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                if training.finite:
                    save(training, path, identity)
                raise
    loss = training.validate()
    tokens = target.batch_size * (target.sequence_length if data.kind == "tokens" else 1) * (training.step - start_step)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "steps": training.step,
        "tokens_per_second": tokens / seconds if seconds else None,
        "checkpoint": str(path) if path.exists() else None,
    }


def _refuse_other_data(target: TargetConfig, data: Data) -> None:
    expected = target.provenance.get("data_sha256")
    if expected is not None and expected != data.sha256:
        raise DataError(
            f"the data {target.data!r} has the SHA-256 {data.sha256[:16]}… here but {str(expected)[:16]}… where the recipe was "
            "tuned: train on the same data (for bytes: use the same Python version), or tune again on this data."
        )


def _identity(target: TargetConfig, data: Data) -> str:
    """Return the SHA-256 of everything that determines the training; provenance, warnings and notes do not."""
    settings = {key: value for key, value in target.as_dict().items() if key not in ("provenance", "warnings", "notes")}
    return hashlib.sha256(json.dumps([settings, data.sha256], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set an event on Ctrl-C instead of raising, because the state in the middle of an optimizer step is not worth saving."""
    interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    off_main_thread = threading.current_thread() is not threading.main_thread()  # only the main thread receives signals
    if off_main_thread or previous is None or previous == signal.SIG_IGN:
        yield interrupted
        return

    def set_event(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, set_event)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
