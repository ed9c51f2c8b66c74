"""Forward gradients: estimates of the gradient from directional derivatives, without a backward pass (Baydin et al. 2202.08587).

For tangents v ~ N(0, C), the mean of (∇f · v) v is C ∇f. Nothing is saved for a backward pass. The estimate is unbiased but
noisy: with K isotropic tangents and n parameters, its squared norm is (n + K + 1) / K times that of the gradient, on average.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from mutransfer.devices import devices_of, is_out_of_memory, random_state_restored
from mutransfer.errors import RequestError, describe
from mutransfer.methods import ForwardGradient

__all__ = ["estimate", "forward_gradients", "tangents"]

DIFFERENCE = 1e-3  # step of central differences along a tangent, as in MeZO (Malladi et al. 2305.17333)

Tensors = dict[str, Tensor]


def estimate(
    function: Callable[[Tensors], Tensor],
    at: Tensors,
    along: Tensors,
    derivative: str = "jvp",
    moving: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensors]:
    """Return the value of a function, and the estimate of its gradient.

    Args:
        function: parameters by name → a scalar.
        at: the parameters.
        along: K tangents of each, ``[K, ...]``.
        derivative: "jvp" for exact directional derivatives by forward-mode differentiation, or "difference" for central
            differences, which need no forward mode.
        moving: buffers that the function may change; differences leave them as one evaluation does.
    """
    count = len(next(iter(along.values())))
    at = {name: each.detach() for name, each in at.items()}
    if derivative == "jvp":
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the other kernels have no forward mode
            warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)  # torch's own, on first use
            both = torch.vmap(lambda v: jvp(function, (at,), (v,))[:2], randomness="same")
            values, slopes = both(along)
        value = values[0]
    else:
        with torch.no_grad():
            each = ({name: v[index] for name, v in along.items()} for index in range(count))
            slopes = torch.stack([_difference(function, at, v, moving) for v in each])
            value = function(at)
    return value, {name: torch.tensordot(slopes.to(v.dtype), v, 1) / count for name, v in along.items()}


def _difference(function: Callable[[Tensors], Tensor], at: Tensors, v: Tensors, moving: Sequence[Tensor]) -> Tensor:
    """Return the central difference along ``v``, both sides with the same random numbers, such as dropout masks."""
    values, before = [], [each.clone() for each in moving]
    for sign in (1, -1):
        with random_state_restored(devices_of(at.values())):
            values.append(function({name: at[name] + sign * DIFFERENCE * v[name] for name in at}))
        for buffer, kept in zip(moving, before, strict=True):
            buffer.copy_(kept)
    return (values[0] - values[1]) / (2 * DIFFERENCE)


def tangents(at: Mapping[str, Tensor], scales: Mapping[str, float], count: int, seed: int, step: int) -> Tensors:
    """Return ``count`` tangents of each parameter, ``[count, ...]``, normal with standard deviation ``scales[name]``.

    They depend only on seed, step and name, and are the same on every device.
    """
    found = {}
    for name, each in at.items():
        digest = hashlib.sha256(f"tangents/{seed}/{step}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        drawn = torch.randn((count, *each.shape), generator=generator, dtype=torch.float32)
        found[name] = (drawn * scales[name]).to(each)
    return found


class _Loss(nn.Module):
    """Module that returns the loss, which allows `functional_call` to replace the tensors of the model."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def forward_gradients(
    method: ForwardGradient, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any,
    scales: Mapping[str, float], seed: int, step: int,
) -> Tensor:  # fmt: skip
    """Set the gradients of ``model``'s parameters to their estimates, and return the loss.

    Args:
        method: number of tangents and how derivatives along them are computed.
        model: the model; only parameters that require gradients move.
        loss: (model, batch) → a scalar.
        batch: the examples of this step.
        scales: standard deviation of the tangents by parameter name.
        seed: seed of the tangents.
        step: number of the step.

    Raises:
        RequestError: an operation has no forward mode; the message names the layer.
    """
    program = _Loss(model, loss)
    at: Tensors = {name: each for name, each in model.named_parameters() if each.requires_grad}
    along = tangents(at, scales, method.tangents, seed, step)
    with _entered(model) as last:
        try:
            value, gradients = estimate(
                lambda given: functional_call(program, {f"model.{k}": v for k, v in given.items()}, (batch,)),
                at, along, method.derivative, list(model.buffers()),
            )  # fmt: skip
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, RequestError):
                raise
            where = f"{last[-1][0]} ({last[-1][1]})" if last else "the loss"
            raise RequestError(
                f"{where} cannot be differentiated in forward mode ({describe(error)}): use another layer, or "
                "method.derivative=difference, which needs none."
            ) from error
    for name, each in at.items():
        each.grad = gradients[name]
    return value


@contextmanager
def _entered(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Yield a list of (name, class) of the modules that are running, the innermost last; after an error, where it occurred."""
    running: list[tuple[str, str]] = []
    hooks = []
    for name, module in model.named_modules():
        label = (name or "the model", type(module).__name__)
        hooks.append(module.register_forward_pre_hook(lambda *_, label=label: running.append(label)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()
