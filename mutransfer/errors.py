"""`RequestError`, and helpers that write its message: one sentence with the problem and the next move."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable

__all__ = ["RequestError", "assertion", "describe", "nearest"]


class RequestError(ValueError):
    """Raised when a request is invalid or cannot be fulfilled.

    The message is one sentence for the user: it names the parameter, key or file with its value, what was expected,
    and the next move. The command line prints it without a traceback and exits with code 2.
    """


# Names that other libraries use for the same settings.
ALIASES = {
    "learning_rate": "lr", "learningrate": "lr", "step_size": "lr", "wd": "weight_decay", "decay": "weight_decay",
    "l2": "weight_decay", "epsilon": "eps", "beta_1": "beta1", "beta_2": "beta2", "adam_beta1": "beta1", "adam_beta2": "beta2",
    "warmup_ratio": "warmup", "warmup_steps": "warmup", "max_steps": "steps", "iterations": "steps", "num_steps": "steps",
    "n_trials": "trials", "lr_scheduler": "schedule", "lr_scheduler_type": "schedule", "scheduler": "schedule",
    "max_grad_norm": "clip", "grad_clip": "clip", "clip_grad_norm": "clip", "gradient_clipping": "clip", "dataset": "data",
    "initializer_range": "init_scale", "init_std": "init_scale", "bs": "batch_size", "batch": "batch_size",
    "seq_len": "sequence_length", "block_size": "sequence_length", "context_length": "sequence_length",
}  # fmt: skip


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the known word closest to ``word``, or a list of all known words if none is close."""
    choices = sorted(known)
    if (meant := ALIASES.get(word.casefold().replace("-", "_"))) in choices:
        return f"did you mean {meant!r}?"
    folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return f"did you mean {folded[close[0]]!r}?" if close else f"known names are {', '.join(choices)}."


def describe(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, for use inside a sentence.

    An ``assert`` without a message is described by its source line: "AssertionError: assert width % 8 == 0 (line 3 of net.py)".
    """
    lines = str(error).strip().splitlines()
    if lines:
        return f"{type(error).__name__}: {lines[0].rstrip('.')}"
    asserted = assertion(error)
    return f"{type(error).__name__}: {asserted}" if asserted else type(error).__name__


def assertion(error: BaseException, place: bool = True) -> str:
    """Return the source line of a failed ``assert`` that has no message, or an empty string for other exceptions.

    Args:
        error: the exception.
        place: also give the line number and the file.
    """
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, AssertionError) else []
    if not frames or not frames[-1].line or str(error).strip():
        return ""
    where = f" (line {frames[-1].lineno} of {frames[-1].filename})" if place else ""
    return " ".join(frames[-1].line.split()) + where
