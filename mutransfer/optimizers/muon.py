"""Muon for hidden matrices and AdamW for all other parameters, as one optimizer (Jordan et al. 2024, and torch's own)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from .._torch_internals import muon_lr
from ..precision import bfloat16_is_slow

__all__ = ["MuonWithAdamW", "iteration_dtype", "orthogonalized"]


def iteration_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of Muon's Newton-Schulz iteration: torch's bfloat16, or float32 where that is much slower."""
    return torch.float32 if bfloat16_is_slow(device) else torch.bfloat16


def orthogonalized(
    matrices: Tensor, dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return ``matrices`` with their singular values moved near 1 by Newton-Schulz iteration (Jordan et al. 2024).

    With ``dtype`` bfloat16 these are the operations of `torch.optim.Muon`, one for one.

    Args:
        matrices: ``[rows, columns]`` or ``[K, rows, columns]``.
        dtype: of the iteration and of the result.
        coefficients: a, b, c of the quintic polynomial.
        steps: iterations.
        eps: least norm that a matrix is divided by.
    """
    a, b, c = coefficients
    product = torch.addmm if matrices.dim() == 2 else torch.baddbmm
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class _Muon(Muon):
    """`torch.optim.Muon`, whose iteration runs in float32 on processors that multiply bfloat16 slowly."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; `MuonWithAdamW` has called the closure."""
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, parameters, gradients, buffers)
            lr, momentum = float(group["lr"]), group["momentum"]
            for parameter, gradient, buffer in zip(parameters, gradients, buffers, strict=True):
                buffer.lerp_(gradient, 1 - momentum)
                direction = orthogonalized(
                    gradient.lerp(buffer, momentum) if group["nesterov"] else buffer,
                    iteration_dtype(parameter.device), group["ns_coefficients"], group["ns_steps"], group["eps"],
                )  # fmt: skip
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(direction, alpha=-muon_lr(lr, group["adjust_lr_fn"], parameter.shape))


class MuonWithAdamW(Optimizer):
    """One `torch.optim.Optimizer` over groups of two kinds: ``muon`` is True for those that `torch.optim.Muon` steps.

    Both inner optimizers work on this one's groups and state, so that schedulers, checkpoints and audits see one. Muon's
    iteration runs in bfloat16 as in torch, or in float32 on a CPU that multiplies bfloat16 over four times slower.

    Args:
        groups: parameter groups with the key ``muon`` and the settings that the class concerned takes.
        options: for either class (fused, foreach, ns_steps, nesterov), where a group does not set them.

    Raises:
        ValueError: a group for Muon holds a parameter that is not a matrix, or an option is unknown to both classes.
    """

    def __init__(self, groups: Any, **options: Any) -> None:
        probe = torch.zeros(1, 1)
        own = {True: Muon([probe]).defaults, False: AdamW([probe]).defaults}
        unknown = [name for name in options if all(name not in known for known in own.values())]
        if unknown:
            raise ValueError(f"neither Muon nor AdamW has an option {unknown[0]!r}")
        self._own = {
            kind: {**known, **{name: value for name, value in options.items() if name in known}}
            for kind, known in own.items()
        }
        super().__init__(groups, {"muon": False})
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``muon`` says which of the two it follows."""
        kind = bool(param_group.get("muon", False))
        super().add_param_group({**self._own[kind], **param_group, "muon": kind})
        odd = [list(each.shape) for each in self.param_groups[-1]["params"] if kind and each.dim() != 2]
        if odd:
            self.param_groups.pop()
            raise ValueError(f"Muon steps matrices, and a parameter of shape {odd[0]} is none: leave it to AdamW")
        if hasattr(self, "_inner"):
            self._link()

    def _link(self) -> None:
        """Let both inner optimizers step this one's own groups and state."""
        self._inner: list[Optimizer] = []
        for kind, cls in ((True, _Muon), (False, AdamW)):
            groups = [group for group in self.param_groups if group["muon"] == kind]
            if groups:
                inner = cls([torch.zeros(1, 1)])
                inner.param_groups, inner.state = groups, self.state
                self._inner.append(inner)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_own": self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state, which are new objects after a load or a copy."""
        super().__setstate__(state)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with both; ``closure`` recomputes the loss, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._inner:
            inner.step()
        return loss
