"""How parameters and their results are cut: pieces that grow differently are rows of different roles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from .flows import storage_key

__all__ = ["Cut", "Cuts"]


@dataclass
class Cut:
    """A parameter, or results of parameters (``direct``: their uses, as bits), and all the pieces that were cut from it.

    ``pieces`` are (sizes, where each begins), dim by dim as in ``whole``.
    """

    whole: tuple[int, ...]
    owners: frozenset[str]
    direct: int
    pieces: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def unevenly(self, wide: Cut) -> bool:
        """Say whether in a wider model the pieces grow differently; more pieces of one size do not."""
        for dim, (size, wide_size) in enumerate(zip(self.whole, wide.whole, strict=False)):
            sizes, wide_sizes = ({piece[dim] for piece, _ in each.pieces} for each in (self, wide))
            alike = {wide_size * each for each in sizes} == {size * each for each in wide_sizes}
            more = sizes == wide_sizes and len(sizes) == 1 and self._covers(dim) and wide._covers(dim)
            if size != wide_size and not (alike or more):
                return True
        return False

    def _covers(self, dim: int) -> bool:
        return sum({begin[dim]: size[dim] for size, begin in self.pieces}.values()) == self.whole[dim]


class Cuts:
    """All that is cut in one forward pass, in the order seen: by storage and shape, whether in one step or piece by piece."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[int, ...]], Cut] = {}

    def add(self, whole: torch.Tensor, pieces: Iterable[torch.Tensor], owners: frozenset[str], direct: int) -> None:
        """Note views of ``whole``, those that are smaller and no single entries."""
        shape = tuple(whole.shape)
        for piece in pieces:
            if piece.dim() == whole.dim() and piece.numel() < whole.numel():
                cut = self._found.setdefault((storage_key(whole), shape), Cut(shape, owners, direct))
                offset = piece.storage_offset() - whole.storage_offset()
                steps = zip(whole.stride(), shape, strict=True)
                begins = tuple(int(offset // at % size) if at and size else 0 for at, size in steps)
                cut.pieces.add((tuple(piece.shape), begins))

    def uneven(self, wider: Cuts) -> Iterator[Cut]:
        """Return what is cut into pieces that grow differently in a wider model's forward pass."""
        pairs = zip(self._found.values(), wider._found.values(), strict=False)
        return (cut for cut, wide in pairs if cut.unevenly(wide))
