"""Muon for hidden matrices and AdamW for all other parameters, as one optimizer (Jordan et al. 2024, as implemented in torch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from .._torch_internals import muon_lr
from ..devices import bfloat16_is_slow

__all__ = ["MuonWithAdamW", "iteration_dtype", "orthogonalized"]


def iteration_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of Muon's Newton-Schulz iteration: bfloat16 as in torch, or float32 if bfloat16 is much slower."""
    return torch.float32 if bfloat16_is_slow(device) else torch.bfloat16


def orthogonalized(
    matrices: Tensor, dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return ``matrices`` with their singular values moved near 1 by Newton-Schulz iteration (Jordan et al. 2024).

    With ``dtype`` bfloat16, the operations are exactly those of `torch.optim.Muon`.

    Args:
        matrices: ``[rows, columns]`` or ``[K, rows, columns]``.
        dtype: of the iteration and of the result.
        coefficients: a, b, c of the quintic polynomial.
        steps: number of iterations.
        eps: lower bound on the norm that a matrix is divided by.
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
    """`torch.optim.Muon`, with the iteration in float32 on processors that multiply bfloat16 slowly."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; `MuonWithAdamW` has already called the closure."""
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
    """One `torch.optim.Optimizer` that applies `torch.optim.Muon` to groups with ``muon=True``, and AdamW to all others.

    Both inner optimizers work on the groups and state of this one, so that schedulers, checkpoints and audits see a single
    optimizer. Muon's iteration runs in bfloat16 as in torch, or in float32 on a CPU where bfloat16 products are more than four
    times slower.

    Args:
        groups: parameter groups with the key ``muon`` and the settings of the respective class.
        options: defaults for either class (fused, foreach, ns_steps, nesterov), used where a group does not set them.

    Raises:
        ValueError: a group for Muon contains a parameter that is not a matrix, or an option is known to neither class.
    """

    def __init__(self, groups: Any, **options: Any) -> None:
        probe = torch.zeros(1, 1)
        defaults = {True: Muon([probe]).defaults, False: AdamW([probe]).defaults}
        unknown = [name for name in options if all(name not in known for known in defaults.values())]
        if unknown:
            raise ValueError(f"neither Muon nor AdamW has an option {unknown[0]!r}")
        self._own = {
            kind: {**known, **{name: value for name, value in options.items() if name in known}}
            for kind, known in defaults.items()
        }
        super().__init__(groups, {"muon": False})
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its key ``muon`` selects Muon (True) or AdamW (False)."""
        kind = bool(param_group.get("muon", False))
        super().add_param_group({**self._own[kind], **param_group, "muon": kind})
        wrong_shapes = [list(each.shape) for each in self.param_groups[-1]["params"] if kind and each.dim() != 2]
        if wrong_shapes:
            self.param_groups.pop()
            raise ValueError(
                f"Muon updates matrices, and a parameter of shape {wrong_shapes[0]} is not one: leave it to AdamW"
            )
        if hasattr(self, "_inner"):
            self._link()

    def _link(self) -> None:
        """Make both inner optimizers use the groups and state of this one."""
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
        """Restore the links to groups and state, which are new objects after a load or a copy."""
        super().__setstate__(state)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with both optimizers; ``closure``, if given, is called once to recompute the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in self._inner:
            inner.step()
        return loss
