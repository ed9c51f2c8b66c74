"""Every private name of torch that this package uses, under a public one, in one place.

torch may rename or remove them in any release: `tests/test_internals.py` says which one broke, and pyproject.toml bounds torch by
the last version that these tests have seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._guards import detect_fake_mode as detect_fake_mode
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS
from torch.optim._muon import _adjust_lr as muon_lr
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as current_dispatch_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils._pytree import register_dataclass as register_dataclass
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

# Context in which torch functions run without the function modes around it, such as that of a default device.
without_function_modes = torch._C.DisableTorchFunction

__all__ = [
    "ConvNd", "DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode",
    "HigherOrderOperator", "NEWTON_SCHULZ", "OpOverload", "TorchDispatchMode", "argument_schemas",
    "current_dispatch_modes", "default_device", "detect_fake_mode", "device_constructors", "disable_current_modes",
    "inductor_compile", "is_mutable", "is_traceable_wrapper_subclass", "local_shape_and_offset", "multiply_all_",
    "muon_lr", "operator_name", "overload_packet", "register_dataclass", "storage_id", "tree_flatten", "tree_leaves",
    "tree_map", "tree_map_only", "tree_unflatten", "without_function_modes",
]  # fmt: skip


NEWTON_SCHULZ = (
    (DEFAULT_A, DEFAULT_B, DEFAULT_C),
    DEFAULT_NS_STEPS,
    EPS,
)  # coefficients, steps and epsilon of torch.optim.Muon


def storage_id(tensor: torch.Tensor | torch.UntypedStorage) -> int:
    """Return the address of a storage, or of a tensor's; fake tensors have one as well."""
    return int((tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else tensor)._cdata)


def operator_name(operator: Any) -> str:
    """Return an operator's qualified name, such as ``aten::addmm``."""
    return str(operator.name() if isinstance(operator, HigherOrderOperator) else operator._schema.name)


def overload_packet(operator: Any) -> Any:
    """Return all overloads of an operator together, such as ``torch.ops.aten.addmm``."""
    return operator._overloadpacket


def argument_schemas(operator: Any) -> list[Any]:
    """Return the schemas of an operator's arguments, with ``name`` and ``alias_info``."""
    return list(operator._schema.arguments)


def is_mutable(operator: Any) -> bool:
    """Return whether an operator writes to one of its arguments."""
    return isinstance(operator, OpOverload) and bool(operator._schema.is_mutable)


def device_constructors() -> set[Any]:
    """Return the functions of torch that make a tensor on the default device."""
    return set(_device_constructors())


def default_device() -> Any:
    """Return the context that `torch.set_default_device` has installed in this thread; None if there is none."""
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def multiply_all_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply every tensor in place, by one kernel where the device has one."""
    torch._foreach_mul_(tensors, factor)


def local_shape_and_offset(parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the size of a `DTensor`'s local shard and where it begins in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(size), tuple(start)


def inductor_options() -> dict[str, Any]:
    """Return the options of `torch.compile` without which its programs are wrong on this CPU.

    With `ATEN_CPU_CAPABILITY=avx2` on a CPU with AVX-512, Inductor writes AVX2 code, has it compiled with `-march=native`, and
    its numbers are wrong; its cache does not tell programs for the two instruction sets apart either.
    """
    restricted = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.cpu._is_avx512_supported()
    return {"cpp.march": "haswell"} if restricted else {}  # the first CPU with AVX2


def inductor_compile(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Return ``graph`` compiled by Inductor, with bfloat16 rounded wherever the graph writes it, and eager's random numbers."""
    import torch._inductor

    options = {"emulate_precision_casts": True, "fallback_random": True} | inductor_options()
    with torch._inductor.config.patch(options):
        return torch._inductor.compile(graph, inputs)
