"""The size of a model and its run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .errors import SettingsError

__all__ = ["Scale"]


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
