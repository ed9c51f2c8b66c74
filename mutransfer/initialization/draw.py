"""Any shard of a parameter's draw without the whole: tiles on a fixed grid, each with random numbers of its own.

A rank draws the tiles that its shard touches, and copies its share of them: the values are those of the unsharded
parameter, whatever the sharding, and replicas agree without a message.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import torch

from ..errors import RequestError
from .init import Init

__all__ = ["draw_"]

# A tile: enough to be drawn at full speed, little enough that a thin shard wastes little. Wide, because most shard rows.
COLUMNS, ENTRIES = 4096, 1 << 16


@torch.no_grad()
def draw_(parameter: torch.Tensor, init: Init, seed: int, name: str) -> None:
    """Overwrite ``parameter``, or this rank's shard of it (a DTensor), with a draw that depends on seed and name only.

    Drawn in float32 on the CPU and copied, so that it is the same on every device; a recorded ``init`` needs memory for
    the whole parameter on every rank.

    Raises:
        RequestError: the parameter has no memory yet, or is sharded in a way in which a rank does not hold a box of it.
    """
    if parameter.is_meta:
        raise RequestError(f"{name} is on the meta device: call model.to_empty(device=...) before initialize.")
    shape, local, start = tuple(parameter.shape), parameter, (0,) * parameter.dim()
    if hasattr(parameter, "placements"):
        local, start = _shard(parameter, name)
    if init.program is not None:
        whole = torch.empty(shape, dtype=torch.float32, device="cpu")
        _draw(init, whole, (0,) * len(shape), f"{seed}/{name}")
        local.copy_(whole[_box(start, tuple(local.shape))])
        return
    direct = local.dtype == torch.float32 and local.device.type == "cpu"
    region = local.detach() if direct else torch.empty(local.shape, dtype=torch.float32, device="cpu")
    _fill(init, region, shape, start, f"{seed}/{name}")
    if not direct:
        local.copy_(region)


def _fill(init: Init, region: torch.Tensor, shape: tuple[int, ...], start: tuple[int, ...], seed: str) -> None:
    """Draw ``region``, the box that begins at ``start`` in a parameter of ``shape``, tile by tile."""
    size, tile = tuple(region.shape), _tile_shape(shape)
    if not region.numel():
        return
    memory = torch.empty(math.prod(tile), dtype=torch.float32, device="cpu")
    grid = (range(low // step, -(-(low + n) // step)) for low, n, step in zip(start, size, tile, strict=True))
    for index in itertools.product(*grid):
        corner = tuple(i * step for i, step in zip(index, tile, strict=True))
        extent = tuple(min(step, whole - low) for step, whole, low in zip(tile, shape, corner, strict=True))
        low = tuple(map(max, corner, start))
        high = tuple(min(c + e, s + n) for c, e, s, n in zip(corner, extent, start, size, strict=True))
        count = tuple(h - b for h, b in zip(high, low, strict=True))
        share = region[_box(tuple(b - s for b, s in zip(low, start, strict=True)), count)]
        whole = count == extent and share.is_contiguous()
        drawn = share if whole else memory[: math.prod(extent)].view(extent)
        _draw(init, drawn, corner, f"{seed}/{index}")
        if not whole:
            share.copy_(drawn[_box(tuple(b - c for b, c in zip(low, corner, strict=True)), count)])


def _draw(init: Init, tensor: torch.Tensor, start: tuple[int, ...], seed: str) -> None:
    digest = hashlib.sha256(seed.encode()).digest()
    init.fill_(tensor, torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63), start)


def _tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The grid depends on the whole parameter only: columns first, then rows, then what is above them."""
    tile: list[int] = []
    left = ENTRIES
    for axis, size in enumerate(reversed(shape)):
        limit = min(left, COLUMNS) if axis == 0 and len(shape) > 1 else left
        tile.append(max(1, min(size, limit)))
        left //= tile[-1]
    return tuple(reversed(tile))


def _box(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(low, low + count) for low, count in zip(start, size, strict=True))


def _shard(parameter: Any, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = parameter.to_local()
    size, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if any(placement.is_partial() for placement in parameter.placements) or tuple(size) != tuple(local.shape):
        raise RequestError(
            f"{name} is placed as {parameter.placements}: initialize fills shards and replicas, so place it so first."
        )
    return local, tuple(start)
