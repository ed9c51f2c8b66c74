"""A CUDA device that computes nothing, for a torch without CUDA: what a step would do on a GPU is seen without one.

Fake tensors are on it, with autograd, so a tensor left on the CPU, a copy to the host and a read of a value show. It changes
torch for the whole process: `install` in a process of its own, before anything else has imported torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path:
    """Compile the device's library.

    Raises:
        FileNotFoundError: there is no compiler, or torch comes without its headers.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    include = _torch() / "include"
    if compiler is None or not include.is_dir():
        raise FileNotFoundError("a C++ compiler (g++ or clang++) and torch's headers build the fake GPU")
    library = folder / "fake_cuda.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or []
    return Path(folder)


def install(library: Path) -> None:
    """Load the device, import torch, and replace what needs a real GPU: random numbers, streams, pinned memory."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
    import torch

    torch.nn.Module.to = _to  # type: ignore[method-assign]
    torch.random.fork_rng = lambda *given, **options: contextlib.nullcontext()  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda tensor, *given: tensor  # type: ignore[method-assign,assignment]
    torch.cuda.default_generators = (torch.Generator(),)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *given: True
    state = torch.zeros(1)
    torch.cuda.get_rng_state = lambda *device: state
    torch.cuda.set_rng_state = lambda *given: None
    torch.equal = lambda one, other: True  # no values to compare
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *device: None


def _to(module: Any, device: Any, *given: Any, **options: Any) -> Any:
    """`Module.to`, which otherwise cannot replace the data of a fake parameter by that of another device."""
    import torch

    moved: dict[int, Any] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    data = parameter.detach().to(device)
                    moved[id(parameter)] = torch.nn.Parameter(data, parameter.requires_grad)
                each._parameters[name] = moved[id(parameter)]
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else buffer.to(device)
    return module


# Operations that make another view of a tensor, and launch nothing.
VIEWS = {
    "alias", "as_strided", "detach", "expand", "narrow", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "diagonal", "real",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "lift_fresh", "is_same_size",
}  # fmt: skip
# Operations whose result the host must know.
WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class NotOnTheDeviceError(AssertionError):
    """An operation waited for the device, copied from it, or worked on the CPU."""


@contextlib.contextmanager
def only_on_the_device() -> Iterator[Counter[str]]:
    """Context that raises `NotOnTheDeviceError` for an operation off the GPU, and yields how often each kernel is launched.

    Scalars on the CPU are allowed: torch passes them to kernels by value, and Adam counts its steps with one.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    launched: Counter[str] = Counter()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            namespace, _, name = func._schema.name.partition("::")
            ins, large = places((args, kwargs))
            if "cuda" in ins and name in WAITS:
                raise NotOnTheDeviceError(f"{name} waits for the device")
            if "cpu" in large and "cuda" in ins:
                raise NotOnTheDeviceError(f"{name} copies from the CPU")
            out = func(*args, **kwargs)
            outs, large = places(out)
            if "cpu" in outs and "cuda" in ins:
                raise NotOnTheDeviceError(f"{name} copies to the CPU")
            if "cpu" in large:
                raise NotOnTheDeviceError(f"{name} makes a tensor on the CPU")
            if "cuda" in outs and namespace == "aten" and name not in VIEWS:
                launched[name] += 1
            return out

    def places(values: Any) -> tuple[set[str], set[str]]:
        """Return the devices of all tensors, and of those that are not scalars."""
        tensors = [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]
        return {each.device.type for each in tensors}, {each.device.type for each in tensors if each.dim()}

    with Watching():
        yield launched
