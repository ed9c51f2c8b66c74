"""How big a model and its run are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .errors import RequestError

__all__ = ["Scale"]


@dataclass(frozen=True)
class Scale:
    """Width and depth of a model, batch and tokens of its run: the four axes hyperparameters are carried along.

    Args:
        width: the size that grows, in whatever unit the family's ``build`` reads it (hidden size, channels).
        depth: number of repeated blocks.
        batch: examples per optimizer step; None when it is not part of the question.
        tokens: training examples (tokens for language models) of the whole run; None likewise.

    Raises:
        RequestError: a size is not a positive whole number.
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
                raise RequestError(f"{name} is {value!r}: give a whole number of at least 1.")

    def with_(self, **changes: int | None) -> Scale:
        """Return this scale with some of its sizes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, int | None]:
        """Return the four sizes as plain data."""
        return asdict(self)
