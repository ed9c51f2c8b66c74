"""One training step of K models of equal shape as a function of tensors: forward, backward, clipping and update.

The tensors of the K models are stacked, and one model provides the structure. Attention folds the models into the batch, which
lets the usual kernel compute all of them. Optimizer steps repeat torch's arithmetic operation by operation, so a vectorized step
equals a separate one. They return new tensors: Inductor's fusion for CPUs failed on programs that write in place (docs/log.md).

Shapes: parameters, gradients and states are [K, ...], settings [K, 1, ...] in float64, clocks [K].
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mutransfer._torch_internals import NEWTON_SCHULZ, muon_lr, register_dataclass
from mutransfer.family import Family
from mutransfer.optimizers.muon import iteration_dtype, orthogonalized
from mutransfer.planning.plan import ColumnBlock, ParameterPlan, Plan, parted

__all__ = [
    "Clock",
    "FUSED",
    "FoldedAttention",
    "Kind",
    "Moving",
    "OptimSettings",
    "Stack",
    "Tensors",
    "TrainingStep",
    "blank_state",
    "kind_of",
    "losses_of",
    "moving_parts",
    "numbers_of",
    "stepped",
]

FUSED = ("adamw", "adam", "sgd", "muon", "muon-match-rms-adamw")
OptimSettings = dict[str, Tensor]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kind:
    """Optimizer update of a parameter.

    Attributes:
        name: "adam", "sgd" or "muon".
        adjust: Muon's lr adjustment, by the name that torch gives it.
        iteration: dtype of Muon's iteration.
        columns: column blocks with separate gauges, which count in clipping.
    """

    name: str
    adjust: str = ""
    iteration: torch.dtype = torch.bfloat16
    columns: tuple[ColumnBlock, ...] = ()


@dataclass(frozen=True)
class Clock:
    """Each model's learning rate multiplier for this step and the step's number from 1; both are [K] in float64."""

    multiplier: Tensor
    step: Tensor


register_dataclass(Clock)


def kind_of(plan: Plan, row: ParameterPlan, device: str) -> Kind:
    """Return the update of one parameter on ``device``."""
    settings = plan.settings_of(row)
    if settings.get("muon"):
        return Kind("muon", settings["adjust_lr_fn"], iteration_dtype(device))
    return Kind("adam" if "betas" in settings else "sgd", columns=row.columns)


def numbers_of(plan: Plan, row: ParameterPlan) -> dict[str, float]:
    """Return the optimizer settings of one parameter as numbers, including its gauge, which counts in clipping."""
    settings = plan.settings_of(row)
    betas = settings.get("betas", (0.0, 0.0))
    return {
        "lr": settings["lr"],
        "weight_decay": settings["weight_decay"],
        "eps": settings.get("eps", 0.0),
        "beta1": betas[0],
        "beta2": betas[1],
        "momentum": settings.get("momentum", 0.0),
        "gauge": row.gauge,
    }


def blank_state(kind: Kind, parameter: Tensor) -> State:
    """Return the optimizer's state before the first step."""
    return tuple(torch.zeros_like(parameter) for _ in range(2 if kind.name == "adam" else 1))


def stepped(
    kind: Kind, parameter: Tensor, gradient: Tensor, state: State, settings: OptimSettings, clock: Clock
) -> tuple[Tensor, State]:
    """Return the parameter and its optimizer state after one step."""
    multiplier, step = (each.view(-1, *[1] * (parameter.dim() - 1)) for each in (clock.multiplier, clock.step))
    lr = settings["lr"] * multiplier
    match kind.name:
        case "adam":
            return _adam(parameter, gradient, state, settings, lr, step)
        case "muon":
            return _muon(parameter, gradient, state, settings, lr, kind)
        case _:
            return _sgd(parameter, gradient, state, settings, lr)


def _adam(p: Tensor, g: Tensor, state: State, settings: OptimSettings, lr: Tensor, t: Tensor) -> tuple[Tensor, State]:
    """AdamW; `Adam` is the same here, since its rule has no weight decay (`torch.optim.adam._single_tensor_adam`)."""
    beta1, beta2 = settings["beta1"], settings["beta2"]
    keep = (1 - lr * settings["weight_decay"]).to(p.dtype)
    size = (lr / (1 - beta1**t)).to(p.dtype)
    root = (1 - beta2**t).sqrt().to(p.dtype)
    first = torch.lerp(state[0], g, (1 - beta1).to(p.dtype))
    second = state[1] * beta2.to(p.dtype) + (1 - beta2).to(p.dtype) * g * g
    return p * keep - size * first / (second.sqrt() / root + settings["eps"].to(p.dtype)), (first, second)


def _sgd(p: Tensor, g: Tensor, state: State, settings: OptimSettings, lr: Tensor) -> tuple[Tensor, State]:
    """SGD with momentum; a zero buffer gives the same first step as torch (`torch.optim.sgd._single_tensor_sgd`)."""
    g = g + settings["weight_decay"].to(p.dtype) * p
    buffer = state[0] * settings["momentum"].to(p.dtype) + g
    return p - lr.to(p.dtype) * buffer, (buffer,)


def _muon(p: Tensor, g: Tensor, state: State, settings: OptimSettings, lr: Tensor, kind: Kind) -> tuple[Tensor, State]:
    """Muon with Nesterov momentum (`torch.optim._muon._single_tensor_muon`)."""
    momentum = settings["momentum"]
    buffer = torch.lerp(state[0], g, (1 - momentum).to(p.dtype))
    direction = orthogonalized(torch.lerp(g, buffer, momentum.to(p.dtype)), kind.iteration, *NEWTON_SCHULZ)
    size = lr * muon_lr(1.0, kind.adjust, p.shape[1:])
    return p * (1 - lr * settings["weight_decay"]).to(p.dtype) - size.to(p.dtype) * direction.to(p.dtype), (buffer,)


class FoldedAttention(TorchFunctionMode):
    """Mode in which `scaled_dot_product_attention` under one `torch.vmap` folds the mapped axis into the batch.

    Take gradients outside of the vmap, of the sum of its losses.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Accept the arguments of torch's function, by position or by name."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _Folded.apply(query, key, value, attn_mask, options)


class _Folded(torch.autograd.Function):
    """An autograd function that exists only for its vmap rule, which consists of differentiable operations."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Compute attention without vmap, for inputs that all models share."""
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, since inputs that all models share have no gradient."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """Fold the models into the batch, compute attention, and unfold the result."""
        K = info.batch_size
        q, k, v = (_first(each, dim, K) for each, dim in zip((query, key, value), in_dims[:3], strict=True))
        if q.dim() < 5:  # no batch axis, and the heads may be grouped: use the models as the batch
            if mask is not None and in_dims[3] is not None:
                mask = _ranked(_first(mask, in_dims[3], K), q.dim())
            return F.scaled_dot_product_attention(q, k, v, mask, **options), 0
        B = max(each.shape[1] for each in (q, k, v))
        q, k, v = (each.expand(K, B, *each.shape[2:]).flatten(0, 1) for each in (q, k, v))
        if mask is not None and (in_dims[3] is not None or (mask.dim() == q.dim() and mask.shape[0] > 1)):
            mask = _ranked(_first(mask, in_dims[3], K), q.dim() + 1)
            mask = mask.expand(K, B, *mask.shape[2:]).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, mask, **options)
        return out.unflatten(0, (K, B)), 0


def _first(tensor: Tensor, dim: int | None, K: int) -> Tensor:
    """Return the tensor with the models as its first axis."""
    return tensor.expand(K, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _ranked(mask: Tensor, rank: int) -> Tensor:
    """Return the mask with axes of size 1 after the models' axis, where broadcasting adds them for each model alone."""
    return mask.reshape(mask.shape[0], *[1] * (rank - mask.dim()), *mask.shape[1:])


Tensors = dict[str, Tensor]


class _Loss(nn.Module):
    """Module that returns the loss, which allows `functional_call` to replace the tensors of the model."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family, self.model = family, model

    def forward(self, batch: Any) -> Tensor:
        return self.family.loss(
            self.model, batch
        )  # not `loss_on`: under vmap, a loss does not show whether it has a gradient


class Stack:
    """Stacked tensors ``[K, ...]`` by name, of models with the same names and shapes.

    Attributes:
        trained: parameters with a gradient.
        resting: parameters that the loss does not use or that require no gradient; the optimizer does not change them.
        buffers: buffers that a training pass changes, such as running averages; all others are those of ``model``.

    Args:
        family: provides the loss.
        model: provides the structure; it must not be used for anything else.
        size: number of models, K.
        trained: names of the trained parameters, from `moving_parts`.
        moving: names of the changing buffers, from `moving_parts`.
    """

    def __init__(self, family: Family, model: nn.Module, size: int, trained: set[str], moving: set[str]) -> None:
        # Not `torch.func.stack_module_state`: it needs all K models at once, and stacks the buffers that no pass changes as well.
        # Slots are filled, and refilled, with one model at a time.
        self.size, self.model, self.program = size, model, _Loss(family, model)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.trained = {name: _empty(each, size) for name, each in parameters.items() if name in trained}
        self.resting = {name: _empty(each, size) for name, each in parameters.items() if name not in trained}
        self.buffers = {name: _empty(buffers[name], size) for name in buffers if name in moving}

    @torch.no_grad()
    def put(self, slot: int, model: nn.Module) -> None:
        """Copy the tensors of ``model`` to one slot."""
        source = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, stack in self.tensors():
            stack[slot].copy_(source[name])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the stacked tensor of all parameters and buffers."""
        for part in (self.trained, self.resting, self.buffers):
            yield from part.items()

    def loss(self, tensors: Tensors, batch: Any) -> Tensor:
        """Return the loss of one model with these tensors; in training mode, buffers among them are changed in place."""
        return functional_call(self.program, {f"model.{name}": each for name, each in tensors.items()}, (batch,))


def moving_parts(family: Family, model: nn.Module, batch: Any) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that have a gradient, and of the buffers that a training pass changes.

    Raises:
        RequestError: the model or its loss raised.
    """
    model.train()
    before = {name: each.clone() for name, each in model.named_buffers()}
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    devices = sorted({each.get_device() for each in parameters.values() if each.is_cuda})
    with torch.random.fork_rng(devices):
        loss = family.loss_on(model, batch, "a batch (inputs, targets) of the data")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    # Compare values: an update of running averages by a kernel is not always counted as a change of the tensor.
    moving = {name for name, each in model.named_buffers() if not torch.equal(each, before[name])}
    with torch.no_grad():
        for name, each in model.named_buffers():
            each.copy_(before[name])
    return {name for name, each in zip(parameters, gradients, strict=True) if each is not None}, moving


def _empty(tensor: Tensor, size: int) -> Tensor:
    return tensor.detach().new_empty((size, *tensor.shape))


Precision = torch.dtype | None


@dataclass(frozen=True)
class Moving:
    """Tensors that a step changes: parameters, buffers such as running averages, and the optimizer's state."""

    trained: Tensors
    buffers: Tensors
    states: dict[str, State]


register_dataclass(Moving)


class TrainingStep:
    """Training step for stacks of one shape.

    Args:
        stack: the models; only the structure is used.
        kinds: optimizer update of each trained parameter.
        clips: whether any model clips its gradients.
        precision: precision of matrix products under `torch.autocast`; that of the tensors if None.
    """

    def __init__(self, stack: Stack, kinds: dict[str, Kind], clips: bool, precision: Precision) -> None:
        self.stack, self.kinds, self.clips, self.precision = stack, kinds, clips, precision

    def __call__(
        self, now: Moving, resting: Tensors, settings: dict[str, OptimSettings], limit: Tensor, clock: Clock, batch: Any
    ) -> tuple[Tensor, Moving]:
        """Return the losses ``[K]`` before the step, and the state after it.

        Args:
            now: current state; not changed.
            resting: the stack's parameters that are not trained.
            settings: optimizer settings of each trained parameter, each [K, 1, ...].
            limit: maximum norm of the gradient, infinite for a model that does not clip; [K] in float64.
            clock: lr multiplier and step number of each model.
            batch: a separate batch for each model, [K, N, ...].
        """
        leaves = {name: each.detach().requires_grad_() for name, each in now.trained.items()}
        losses, buffers = losses_of(self.stack, {**resting, **leaves}, now.buffers, batch, self.precision)
        # Losses are means within each model, summed over the models: a value that is not finite stays within its model.
        found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        # Use the memory layout of the weights: a layer's gradient is transposed, and tensors computed from it would be too.
        gradients = {name: each.contiguous() for name, each in zip(leaves, found, strict=True)}
        with torch.no_grad():
            if self.clips:
                gradients = clipped(gradients, self.kinds, settings, limit)
            after = {
                name: stepped(self.kinds[name], each.detach(), gradients[name], now.states[name], settings[name], clock)
                for name, each in leaves.items()
            }
        return losses.detach(), Moving(
            {name: parameter for name, (parameter, _) in after.items()},
            buffers,
            {name: state for name, (_, state) in after.items()},
        )


def losses_of(
    stack: Stack, tensors: Tensors, buffers: Tensors, batch: Any, precision: Precision
) -> tuple[Tensor, Tensors]:
    """Return the losses ``[K]`` of a stack with these tensors, each model on its own batch, and the buffers afterwards."""

    def one(tensors: Tensors, buffers: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        buffers = {name: each.clone() for name, each in buffers.items()}
        return stack.loss({**tensors, **buffers}, batch), buffers

    run = torch.vmap(one, randomness="different")
    with FoldedAttention(), _casting(tensors, precision), warnings.catch_warnings():
        # An operation without a vmap rule runs model by model: slower, but correct.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return run(tensors, buffers, batch)


def clipped(gradients: Tensors, kinds: dict[str, Kind], settings: dict[str, OptimSettings], limit: Tensor) -> Tensors:
    """Return gradients ``[K, ...]``, clipped so each model's norm is at most its ``limit`` (`Plan.clip_grad_norm_`)."""
    norms = [
        torch.linalg.vector_norm(piece.flatten(1), dim=1) * more * settings[name]["gauge"].flatten().to(each.dtype)
        for name, each in gradients.items()
        for more, piece in parted(each, kinds[name].columns, leading=1)
    ]
    total = torch.linalg.vector_norm(torch.stack([each.to(norms[0].dtype) for each in norms]), dim=0)
    scale = torch.clamp(limit.to(total.dtype) / (total + 1e-6), max=1.0)
    scale = torch.where(limit.isfinite(), scale, 1.0)  # without clipping, keep even gradients that are not finite
    return {name: each * scale.to(each.dtype).view(-1, *[1] * (each.dim() - 1)) for name, each in gradients.items()}


@contextlib.contextmanager
def _casting(tensors: Tensors, precision: Precision) -> Iterator[None]:
    if precision is None:
        yield
        return
    device = next(iter(tensors.values())).device.type
    # Disable the cache of casts: it would keep casts of weights that have been replaced.
    with torch.autocast(device, precision, cache_enabled=False):
        yield
