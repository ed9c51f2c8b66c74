"""The hyperparameters of a run, expressed at the base scale, and the scale: the size of a model and its run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from .config import Settings
from .errors import SettingsError
from .io import read_json, write_json
from .methods import Backprop, MethodOf

__all__ = ["Recipe", "Scale"]

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Recipe(Settings):
    """Hyperparameters at the base scale, by default the proxy's scale; scaling rules turn them into those of the target.

    Numbers are dimensionless except ``clip`` and ``eps`` (units of the gradient). Each ``alpha_*`` acts as a multiplier on
    one part of the forward pass, folded into weights and optimizer settings, and ``init_scale`` multiplies the initial
    weights; a value of 1 changes nothing. TP-V (2203.03466), Table 1, lists which of these transfer. ``method`` is the training
    method, by name or with its settings (`methods`).
    """

    lr: Positive = 2**-9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    momentum: Fraction = 0.9
    adamw_lr_ratio: Positive = 1.0  # with Muon: the lr of the parameters that AdamW updates, relative to Muon's
    eps2: Positive = (
        1e-3  # Adafactor: steps are proportional to the parameter's size, or to this value if the size is smaller
    )
    init_scale: Positive = 1.0
    alpha_input: Positive = 1.0
    alpha_attention: Positive = 1.0
    alpha_residual: Positive = 1.0
    alpha_output: Positive = 1.0
    decay: Literal["matrices", "all"] = "matrices"
    decay_policy: Literal["independent", "coupled", "sqrt"] = "independent"
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    cooldown: Annotated[float, Field(gt=0, le=1)] = 0.2
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Positive | None = None
    law: Literal["none", "sqrt", "bjorck", "power-lines", "ema"] = "none"
    method: MethodOf = Backprop()

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup {self.warmup:g} and cooldown {self.cooldown:g} are fractions of one run: make their sum at most 1."
            )
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, handler: Any) -> dict[str, Any]:
        """Leave backpropagation out, so that files of such recipes can be read by earlier versions."""
        data: dict[str, Any] = handler(self)
        if data.get("method", {}).get("name") == "backprop":
            del data["method"]
        return data

    def with_(self, **changes: Any) -> Recipe:
        """Return a validated copy of this recipe with some values replaced."""
        return Recipe.read({**self.model_dump(), **changes}, "recipe")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe as JSON, atomically."""
        return write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe that `save` wrote.

        Raises:
            RequestError: the file does not exist or is not JSON, a key is unknown, or a value is out of range.
        """
        return cls.read(read_json(path, "a recipe, such as the best.json of `mutransfer tune`"), str(path))


@dataclass(frozen=True)
class Scale:
    """Width and depth of a model, batch size and tokens of its run: what may differ between a proxy and its target.

    Args:
        width: the size that grows, in the unit that the family's ``build`` uses (hidden size, channels).
        depth: number of repeated blocks.
        batch: examples per optimizer step; None if unspecified.
        tokens: training examples (tokens for language models) of the whole run; None if unspecified.

    Raises:
        SettingsError: a size is not a positive integer.
    """

    width: int
    depth: int = 2
    batch: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None and name in ("batch", "tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingsError(f"{name} is {value!r}: give a whole number of at least 1.")

    def with_(self, **changes: int | None) -> Scale:
        """Return this scale with some sizes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, int | None]:
        """Return the four sizes as a dictionary."""
        return asdict(self)
