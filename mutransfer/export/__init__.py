"""Exports: the target's settings in the format of a training framework."""

from __future__ import annotations

from ..errors import RequestError, closest
from ..planning.target import TargetConfig
from . import pytorch

__all__ = ["FORMATS", "export"]

WRITERS = {"pytorch": pytorch.write}
FORMATS = (
    "pytorch", "transformers", "torchtitan", "olmo-core", "megatron", "nemo", "nanotron", "gpt-neox", "cerebras", "axolotl",
    "lightning",
)  # fmt: skip


def export(target: TargetConfig, to: str) -> tuple[str, str]:
    """Return a suggested file name and the text of ``target`` in the format ``to``; the text is deterministic.

    Raises:
        RequestError: the format is unknown, or not supported in this version.
    """
    if to not in FORMATS:
        meant = closest(to, FORMATS)
        raise RequestError(f"unknown format {to!r}: {f'did you mean {meant!r}?' if meant else 'use --to pytorch.'}")
    if to not in WRITERS:
        raise RequestError(
            f"the format {to!r} is not supported in this version: use --to pytorch, whose JSON any plain-torch script can read."
        )
    return WRITERS[to](target)
