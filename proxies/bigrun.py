"""The big run: a target config trained through the one training loop, with checkpoints that survive whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mutransfer.errors import RequestError
from mutransfer.planning.target import TargetConfig

from .checkpoints import restore, save
from .data import Data, load_data
from .importing import modules_in
from .reference import load_family
from .training import FINITE_EVERY, Training

__all__ = ["run_target"]

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
    told = {key: value for key, value in target.as_dict().items() if key not in ("provenance", "warnings", "notes")}
    return hashlib.sha256(json.dumps([told, data.sha256], sort_keys=True).encode()).hexdigest()


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
