"""How the head dim and the scale of attention differ between two sizes of one model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError
from .noted import Attention

__all__ = ["Heads", "compared", "in_attention"]


@dataclass(frozen=True)
class Heads:
    """All attention of one model against a larger one's.

    ``ratio`` is what the head dim grows by, and ``power`` the power of the head dim by which the model itself scales the
    logits (−½ as usual).
    """

    dim: int | None = None
    ratio: float = 1.0
    power: float = -0.5


def compared(seen: Sequence[Attention], larger: Sequence[Attention]) -> Heads:
    """Compare layer by layer.

    Raises:
        RequestError: the sizes have other numbers of attention layers, or layers whose head dims or scales differ in growth.
    """
    if len(seen) != len(larger):
        raise RequestError(
            "the number of attention layers depends on the width: build the same modules at every width."
        )
    pairs = list(zip(seen, larger, strict=True))
    if len({wide.head_dim / base.head_dim for base, wide in pairs}) > 1:
        dims = sorted({base.head_dim for base, _ in pairs})
        raise RequestError(f"attention layers differ in head dim ({dims}), and only some grow: use one for all.")
    powers = [math.log(b.scale / a.scale, b.head_dim / a.head_dim) for a, b in pairs if a.head_dim != b.head_dim]
    if powers and max(powers) - min(powers) > 1e-6:
        raise RequestError(
            f"attention layers scale their logits by different powers of the head dim ({sorted(powers)}): use one."
        )
    if not pairs:
        return Heads()
    base, wide = pairs[0]
    return Heads(base.head_dim, wide.head_dim / base.head_dim, round(powers[0], 6) if powers else -0.5)


def in_attention(seen: Sequence[Attention], wider: Sequence[Attention], ratio: float) -> dict[str, float]:
    """Return powers of the width in the scale of attention where the head dim stays, by the queries that carry it."""
    powers: dict[str, float] = defaultdict(float)
    for narrow, broad in zip(seen, wider, strict=False):
        if narrow.head_dim == broad.head_dim:  # such as 1/√hidden with a fixed head dim
            for name in narrow.queries:
                powers[name] += round(math.log(broad.scale / narrow.scale, ratio), 6)
    return powers
