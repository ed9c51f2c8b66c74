"""Small data whose batches are a pure function of (seed, step): clouds as images, or a counting language as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mutransfer.proxies.data.base import Batch, Data

from . import families

__all__ = ["Blobs", "blobs"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Blobs(Data):
    """Ten separable clouds, of torch's default dtype, or sequences that count up by one, and by up to ``noise`` more.

    The held-out batches are ``held_out`` examples each.
    """

    noise: int = 0
    held_out: int = 16

    def batch(self, step: int, size: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        if self.kind == "tokens":
            start = torch.randint(families.VOCABULARY, (size, 1), generator=generator)
            noise = torch.randint(1 + self.noise, (size, 9), generator=generator)
            tokens = (start + torch.arange(9) + noise) % families.VOCABULARY
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        labels = torch.randint(10, (size,), generator=generator)
        centers = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        images = centers[labels] + 0.3 * torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float32)
        return images.to(torch.get_default_dtype()), labels

    def validation(self) -> list[Batch]:
        return [self.batch(10**6 + i, self.held_out, 0) for i in range(2)]


def blobs(kind: Any = "images", **options: Any) -> Blobs:
    return Blobs(name="blobs", sha256="0", facts={}, inputs=17, classes=17, kind=kind, **options)
