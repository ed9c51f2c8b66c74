"""What a command tells on its stdout: JSON lines with a loss, among whatever else it prints."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

__all__ = ["Told", "told"]


class Told(NamedTuple):
    """A loss at a step (None where it was not given), and whether it is the final one."""

    step: int | None
    loss: float
    final: bool


def told(line: bytes) -> Told | None:
    """Return what ``line`` tells: ``{"step": 100, "loss": 2.3}``, with ``"final": true`` for the last; None for other text.

    A loss of null, NaN or Infinity is one that is not finite; a step is the number of optimizer steps done.
    """
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or "loss" not in given:
        return None
    loss, step, final = given["loss"], given.get("step"), given.get("final", False)
    loss = math.nan if loss is None else loss
    if not _is_number(loss) or not isinstance(final, bool) or not (step is None or _is_step(step)):
        return None
    return Told(None if step is None else int(step), float(loss), final)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_step(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0 and value == int(value)
