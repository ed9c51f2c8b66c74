"""The target run: a target config trained through the one training loop, with checkpoints that survive a kill at any moment."""

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

from mutransfer.errors import RequestError
from mutransfer.io import naming_the_disk
from mutransfer.planning.target import TargetConfig

from .data import Data, load_data
from .importing import modules_in
from .load import load_family
from .training import FINITE_EVERY, Training

__all__ = ["restore", "run_target", "save"]

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


SLOW = 0.05  # seconds a step must take for a look after each to cost nothing


def run_target(
    target: TargetConfig,
    out: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 1000,
    progress: Callable[[int, int], None] = lambda done, total: None,
    resume: bool = True,
) -> dict[str, Any]:
    """Train ``target``, or go on where ``out/checkpoint.pt`` left off; on CPU both give the same weights, bit by bit.

    Ctrl-C finishes the step at hand and saves before it propagates; a second one does not wait, and leaves the checkpoint
    that was there. A diverged run keeps its last checkpoint with a finite loss.

    Args:
        target: what to train, on what, with which settings.
        out: folder of the checkpoint.
        device: where to train.
        checkpoint_every: steps between checkpoints.
        progress: called with (steps done, steps in all), often.
        resume: False starts over, and overwrites the checkpoint.

    Returns:
        ``loss`` (validation, nats; None if not finite), ``steps`` (done, of the whole run), ``tokens_per_second`` (images:
        examples; of this call, None if nothing was left to do) and ``checkpoint`` (its path, None if there is none).

    Raises:
        RequestError: the data is not the target's, the checkpoint is another target's or damaged, or the disk is full.
        KeyboardInterrupt: as it came, after saving.
    """
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise RequestError(f"checkpoint_every is {checkpoint_every!r}: give a number of steps of at least 1.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"the device is {device} and torch sees no GPU here: use --device cpu.")
    references, folder = target.found()
    data = load_data(references["data"], target.sequence_length)
    _refuse_other_data(target, data)
    torch.manual_seed(target.seed)  # for what the plan does not draw: buffers, dropout
    with modules_in(folder):
        family = load_family(references["model"], data, target.plan.base, options=target.options)
    training = Training(
        family, target.plan, data, steps=target.steps, batch_size=target.batch_size, seed=target.seed, device=device
    )
    path, identity = Path(out) / "checkpoint.pt", _identity(target, data)
    if resume and path.exists():
        restore(training, path, identity)
    begun, seconds = training.step, 0.0
    pace = 1
    with _interrupts() as asked:
        while training.step < target.steps and training.finite:
            due = min(target.steps, (training.step // checkpoint_every + 1) * checkpoint_every)
            until = min(due, (training.step // pace + 1) * pace)
            before, clock = training.step, time.perf_counter()
            training.advance(until)
            took = time.perf_counter() - clock
            seconds += took
            pace = 1 if took > SLOW * (training.step - before) else FINITE_EVERY
            if training.step == due and training.finite:
                save(training, path, identity)
            try:
                progress(training.step, target.steps)
                if asked.is_set():
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                if training.finite:
                    save(training, path, identity)
                raise
    loss = training.validate()
    tokens = target.batch_size * (target.sequence_length if data.kind == "tokens" else 1) * (training.step - begun)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "steps": training.step,
        "tokens_per_second": tokens / seconds if seconds else None,
        "checkpoint": str(path) if path.exists() else None,
    }


def _refuse_other_data(target: TargetConfig, data: Data) -> None:
    expected = target.provenance.get("data_sha256")
    if expected is not None and expected != data.sha256:
        raise RequestError(
            f"the data {target.data!r} has the SHA-256 {data.sha256[:16]}… here and {str(expected)[:16]}… where the recipe was "
            "tuned: train on the same data (for bytes: the same Python version), or tune again on this one."
        )


def _identity(target: TargetConfig, data: Data) -> str:
    """Hash of all that decides what is trained; who tuned it when, and what was warned about, does not."""
    settings = {key: value for key, value in target.as_dict().items() if key not in ("provenance", "warnings", "notes")}
    return hashlib.sha256(json.dumps([settings, data.sha256], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Note Ctrl-C instead of raising it: in the middle of an optimizer step there is no state worth saving."""
    asked = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    elsewhere = threading.current_thread() is not threading.main_thread()  # signals reach the main thread alone
    if elsewhere or previous is None or previous == signal.SIG_IGN:
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
