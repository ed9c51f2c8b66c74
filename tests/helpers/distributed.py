"""One of two gloo processes: trains the sharded and replicated forms of one model, and writes what each saw as JSON.

`distributed.py RANK FOLDER NAME…`: the names are keys of ``WRAPPED``, and "mup" for what mup's own models do.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mutransfer.planning.audit import audit


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_of_compiled(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    compiled: Any = torch.compile(model, backend="eager")
    return DistributedDataParallel(compiled)


def compiled_ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    compiled: Any = torch.compile(DistributedDataParallel(model), backend="eager")
    return compiled


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    return model


def parallelized(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Feed-forward layers split by units; attention and norms stay whole and plain beside the DTensors."""
    for block in model.blocks:  # type: ignore[union-attr]
        layers = {"up": ColwiseParallel(), "gate": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block.ffn, mesh, layers)  # type: ignore[arg-type, union-attr]
    return model


WRAPPED: dict[str, tuple[Callable[[nn.Module, DeviceMesh], nn.Module], bool]] = {
    # name: (wrapper, whether each process sees its own half of the batch)
    "DDP": (ddp, True),
    "DDP(compile)": (ddp_of_compiled, True),
    "compile(DDP)": (compiled_ddp, True),
    "fully_shard": (sharded, True),
    "parallelize_module": (parallelized, False),
}


def main(rank: int, names: list[str]) -> dict[str, Any]:
    import tests.helpers.trained as trained

    mesh = init_device_mesh("cpu", (2,))
    case = trained.transformer_case()
    x, y = case.family.batch
    assert len(x) % 2 == 0
    report: dict[str, Any] = {}
    for name, (wrap, halved) in WRAPPED.items():
        if name not in names:
            continue
        model = wrap(case.model(), mesh)
        optimizer = case.plan.make_optimizer(model)
        trained.assert_as_planned(case.plan, optimizer)
        half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2) if halved else slice(None)
        norms: list[float] = []
        batch = x[half], y[half]
        losses = trained.train(model, optimizer, batch, clip=trained.clipping(case.plan, norms))
        mean = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(mean)
        trained.assert_as_planned(case.plan, optimizer)
        report[name] = {
            "losses": (mean / 2).tolist(),
            "norms": norms,
            "names": [parameter for parameter, _ in model.named_parameters()],
            "dtensors": sum(isinstance(parameter, DTensor) for parameter in model.parameters()),
        }
        torch.compiler.reset()
    if "fully_shard" in names:
        report["fully_shard"]["resumed"] = resumed(mesh, rank)
    if "mup" in names:
        report["mup"] = mup_failures(mesh)
    return report


def resumed(mesh: DeviceMesh, rank: int) -> list[float]:
    """Losses of a sharded run that is saved by names after two steps and goes on in a fresh model and optimizer."""
    import tests.helpers.trained as trained

    case = trained.transformer_case()
    x, y = case.family.batch
    half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    losses: list[float] = []
    saved: Any = None
    for steps in (2, 3):
        model = sharded(case.model(), mesh)
        optimizer = case.plan.make_optimizer(model)
        if saved is not None:
            for group in optimizer.param_groups:
                group["lr"] = 1.0
            set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        trained.assert_as_planned(case.plan, optimizer)
        losses += trained.train(model, optimizer, (x[half], y[half]), steps, trained.clipping(case.plan, []))
        saved = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=False))
        assert audit(case.plan, {"optimizer": saved[1], "model": saved[0]}).empty
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    return (mean / 2).tolist()


def mup_failures(mesh: DeviceMesh) -> dict[str, str]:
    """How mup's own models end up: the first line of what is raised, or "trains"."""
    import tests.helpers.annotated as annotated

    found = {}
    for name, wrap in (
        ("fully_shard", lambda model: fully_shard(model, mesh=mesh)),
        ("parallelize_module", lambda model: parallelize_module(model, mesh, {"readout": ColwiseParallel()})),
    ):
        model = annotated.model()
        wrap(model)
        found[name] = annotated.outcome(model)
    return found


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    importlib.import_module("tests.conftest")  # what pytest prepares for the other tests
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        result = main(rank, sys.argv[3:])
    except BaseException:
        result = {"error": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    if "error" not in result:
        dist.barrier()
        # Leave at once: a thread of gloo may still hold tensors of the last collective. It needs the interpreter to free them,
        # and where that is being finalized the process aborts (torch 2.13, one run in five).
        os._exit(0)
