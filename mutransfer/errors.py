"""`RequestError` and its kinds, and helpers that write their messages: one sentence with the problem and the next move."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable

__all__ = [
    "BuildError", "DataError", "FileError", "FrameError", "InitError", "LayerError", "MissingBaseError", "ModelError",
    "RequestError", "RoleError", "SettingsError", "StorageError", "TrainerError", "assertion", "closest", "describe", "nearest",
]  # fmt: skip


class RequestError(ValueError):
    """Raised when a request is invalid or cannot be fulfilled.

    The message is one sentence for the user: it names the parameter, key or file with its value, what was expected,
    and the next move. The command line prints it without a traceback and exits with code 2. Catch one of its subclasses to
    tell the causes apart; do not parse the message.
    """


class SettingsError(RequestError):
    """A recipe, a plan, an experiment, a size or another set of values has an unknown key or an invalid value."""


class FileError(RequestError):
    """A file is missing, cannot be read or written, or holds something other than expected."""


class FrameError(RequestError):
    """A data frame, or the file that holds it, lacks a column, has too few rows, or mixes what must be judged apart."""


class DataError(RequestError):
    """The training data is unknown, missing or empty, or does not fit the model."""


class MissingBaseError(RequestError):
    """The model has no base size, and none was given."""


class TrainerError(RequestError):
    """A user trainer cannot be loaded or started, or reports something other than a loss."""


class StorageError(RequestError):
    """The storage of a study cannot be opened, read or written, or holds another study."""


class ModelError(RequestError):
    """The user's model cannot be planned as it is."""


class BuildError(ModelError):
    """The model cannot be built at a size, or does not run on its example batch."""


class InitError(ModelError):
    """It cannot be determined how a parameter is initialized."""


class RoleError(ModelError):
    """The role of a parameter cannot be determined, or the one given for it does not apply."""


class LayerError(ModelError):
    """A layer has no counterpart at another size, grows in a way that no rule covers, or cannot absorb a factor."""


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


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word closest to ``word``, or None if none is close."""
    choices = sorted(known)
    if (meant := ALIASES.get(word.casefold().replace("-", "_"))) in choices:
        return meant
    folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the known word closest to ``word``, or a list of all known words if none is close."""
    choices = sorted(known)
    meant = closest(word, choices)
    return f"known names are {', '.join(choices)}." if meant is None else f"did you mean {meant!r}?"


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
