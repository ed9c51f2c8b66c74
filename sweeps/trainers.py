"""Who trains a trial instead of the built-in loop: a Python function of the person's, or a command."""

from __future__ import annotations

import shlex
import string
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from mutransfer.config import Settings
from mutransfer.errors import nearest

__all__ = ["PLACEHOLDERS", "Trainer"]

PLACEHOLDERS = ("recipe", "plan", "seed", "out", "slot")
AS_CALL = "write it as file.py:name or package.module:name"
AS_COMMAND = 'as in trainer: {command: "python train.py --plan {plan}"}'


class Trainer(Settings):
    """An own trainer, as an experiment names it; a bare string is a ``call``.

    ``call`` is ``file.py:name`` or ``package.module:name`` (`callables`). ``command`` is a command line (`commands`) whose
    attempts may take ``timeout`` seconds, which is tried again ``retries`` times when it fails, and which is killed
    ``grace`` seconds after it was asked to end.
    """

    call: str | None = None
    command: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    retries: Annotated[int, Field(ge=0, le=100)] = 0
    grace: Annotated[float, Field(ge=0, le=3600)] = 10.0

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"call": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.call is None) == (self.command is None):
            raise ValueError(f"give either call, a Python function, or command, {AS_COMMAND}.")
        if self.call is not None:
            where, _, name = self.call.rpartition(":")
            if not where or not name.isidentifier():
                raise ValueError(f"{self.call!r} names no function: {AS_CALL}; a command is written {AS_COMMAND}.")
            if self.timeout is not None or self.retries:
                raise ValueError("timeout and retries are a command's: a function in this process cannot be ended.")
        else:
            self._check_command()
        return self

    def _check_command(self) -> None:
        assert self.command is not None
        try:
            words = shlex.split(self.command)
            fields = [field for word in words for _, *field in string.Formatter().parse(word) if field[0] is not None]
        except ValueError as error:
            raise ValueError(
                f"the command cannot be read ({error}): quote it, and write a brace of its own as {{{{ }}}}."
            ) from None
        if not words:
            raise ValueError(f"the command is empty: write one, {AS_COMMAND}.")
        for name, *how in fields:
            if name not in PLACEHOLDERS or any(how):
                hint = nearest(str(name), PLACEHOLDERS)
                raise ValueError(
                    f"the command has the placeholder {{{name}}} (a brace of its own is written {{{{ or }}}}): {hint}"
                )
        if not {"recipe", "plan"} & {name for name, *_ in fields}:
            raise ValueError(
                "the command has neither {recipe} nor {plan}, so that every trial would train the same: add one."
            )

    def words(self, values: Mapping[str, str]) -> list[str]:
        """Return the command's words with ``values`` (by `PLACEHOLDERS`) put in; no shell reads them."""
        assert self.command is not None
        return [word.format_map(values) for word in shlex.split(self.command)]

    def question(self) -> str:
        """Return what decides the losses; how long and how often it may try does not."""
        return self.call or str(self.command)

    def __str__(self) -> str:
        """Return how sentences call it."""
        return self.call or "the trainer's command"
