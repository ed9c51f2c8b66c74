"""One process of a sharded model, for test_shards.py: `sharded.py WAY RANK WORLD STORE`."""

from __future__ import annotations

import resource
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, empty
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mutransfer as mt
from mutransfer.initialization import Init, draw_

WIDTH, TOKENS = 300, 37  # neither the tiles nor the ranks divide them


class Model(nn.Module):
    """A padding row, a truncated normal, an orthogonal matrix, a bias in two parts, and more columns than a tile has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width, padding_idx=0)
        self.up = nn.Linear(width, 15 * width)
        self.down = nn.Linear(15 * width, width, bias=False)
        self.readout = nn.Linear(width, 5)
        nn.init.trunc_normal_(self.up.weight, std=0.02, a=-0.03, b=0.03)
        nn.init.zeros_(self.up.bias)
        nn.init.ones_(self.up.bias[:width])
        nn.init.orthogonal_(self.readout.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.readout(self.down(self.up(self.embedding(tokens)).relu()))


FAMILY = mt.Family(
    lambda scale: Model(scale.width),
    torch.zeros(2, 3, dtype=torch.long),
    lambda model, tokens: model(tokens).square().mean(),
    mt.Scale(width=20),
)
TP = {"up": ColwiseParallel(), "down": RowwiseParallel(), "embedding": RowwiseParallel()}


def shard(way: str) -> nn.Module:
    """The model on the meta device, sharded, with memory and no values."""
    with torch.device("meta"):
        model: nn.Module = Model(WIDTH)
    world = dist.get_world_size()
    if way == "tensor parallel":
        parallelize_module(model, init_device_mesh("cpu", (world,)), TP)
    elif way == "fully_shard":
        for layer in (model.up, model.down, model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    elif way == "hybrid":
        fully_shard(model, mesh=init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], TP)
        fully_shard(model, mesh=mesh["data"])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    return model


def compare(way: str, rank: int, world: int, store: str) -> None:
    """Fill the sharded model and compare every parameter, put together, with the unsharded one."""
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{store}")
    plan = mt.plan(FAMILY, mt.Scale(width=WIDTH))
    whole = Model(WIDTH)
    plan.initialize(whole, seed=3)
    model = shard(way)
    plan.initialize(model, seed=3)
    sharded = 0
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name)
        if isinstance(parameter, DTensor):
            sharded += parameter.to_local().shape != parameter.shape
            parameter = parameter.full_tensor()
        assert torch.equal(parameter, expected), name
    assert sharded >= 3
    dist.destroy_process_group()


def measure() -> None:
    """Fill one of 64 shards: the values of the whole matrix; of a gigabyte, within little memory and with the right std."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=3, world_size=64, store=FakeStore())
    mesh = init_device_mesh("cpu", (64,))
    init = Init("normal", 0.0, 0.02)
    draw_(empty(64, 64, device_mesh=mesh, placements=[Shard(0)]), init, 0, "warm up")
    whole = torch.empty(300, 130)
    draw_(whole, init, 0, "part")
    for dim in (0, 1):
        part = empty(*whole.shape, device_mesh=mesh, placements=[Shard(dim)])
        draw_(part, init, 0, "part")
        assert torch.equal(part.to_local(), whole.chunk(64, dim)[3])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for dim in (0, 1):
        parameter = empty(1 << 14, 1 << 14, device_mesh=mesh, placements=[Shard(dim)])
        draw_(parameter, init, 0, "weight")
        assert abs(parameter.to_local().std().item() / 0.02 - 1) < 0.01
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150 << 10, f"{grown} KiB for shards of 16 MiB"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "measure":
        measure()
    else:
        compare(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
