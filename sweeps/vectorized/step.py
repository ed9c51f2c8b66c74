"""One training step of K models of equal shape as a function of tensors: forward, backward, clipping and update.

The tensors of the K models are stacked and one of them lends its structure; attention takes the models as part of the batch, so
that the usual kernel computes all of them. Optimizer steps are torch's own arithmetic, operation by operation, so a vectorized
step equals a separate one. They return new tensors: Inductor's fusion for CPUs failed on programs that write in place
(docs/log.md).

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
    """Which update a parameter follows; ``adjust`` is Muon's factor, by the name that torch gives it, ``iteration`` its dtype.

    ``columns`` are those with a gauge of their own, which counts in clipping.
    """

    name: str
    adjust: str = ""
    iteration: torch.dtype = torch.bfloat16
    columns: tuple[ColumnBlock, ...] = ()


@dataclass(frozen=True)
class Clock:
    """Where each model is: what multiplies its learning rates in this step, and the step's number from 1; [K] in float64."""

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
    """Return the settings of one parameter as numbers, with its gauge, which counts in clipping."""
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
    """Return parameters and state after one step."""
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
    """AdamW; `Adam` is the same here, as its rule takes no weight decay (`torch.optim.adam._single_tensor_adam`)."""
    beta1, beta2 = settings["beta1"], settings["beta2"]
    keep = (1 - lr * settings["weight_decay"]).to(p.dtype)
    size = (lr / (1 - beta1**t)).to(p.dtype)
    root = (1 - beta2**t).sqrt().to(p.dtype)
    first = torch.lerp(state[0], g, (1 - beta1).to(p.dtype))
    second = state[1] * beta2.to(p.dtype) + (1 - beta2).to(p.dtype) * g * g
    return p * keep - size * first / (second.sqrt() / root + settings["eps"].to(p.dtype)), (first, second)


def _sgd(p: Tensor, g: Tensor, state: State, settings: OptimSettings, lr: Tensor) -> tuple[Tensor, State]:
    """SGD with momentum; a buffer of zeros makes the first step that of torch (`torch.optim.sgd._single_tensor_sgd`)."""
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
    """While active, `scaled_dot_product_attention` under one `torch.vmap` folds the mapped axis into the batch.

    Gradients are to be taken outside of the vmap, of the sum of its losses.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """The arguments as torch's function takes them, by position or by name."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _Folded.apply(query, key, value, attn_mask, options)


class _Folded(torch.autograd.Function):
    """A function of autograd for the sake of its rule for vmap, which is made of differentiable parts."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Nothing is mapped: it was computed from what all models share."""
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved: what all models share has no gradient."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """Fold, attend, unfold."""
        K = info.batch_size
        q, k, v = (_first(each, dim, K) for each, dim in zip((query, key, value), in_dims[:3], strict=True))
        if q.dim() < 5:  # no batch axis, and the heads may be grouped: the models alone are the batch
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
    """The tensor with the models as its first axis."""
    return tensor.expand(K, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _ranked(mask: Tensor, rank: int) -> Tensor:
    """The mask with axes of 1 after the models', as broadcasting would put them before each model's own."""
    return mask.reshape(mask.shape[0], *[1] * (rank - mask.dim()), *mask.shape[1:])


Tensors = dict[str, Tensor]


class _Loss(nn.Module):
    """The loss as a module's output, so that `functional_call` can put other tensors under the model."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family, self.model = family, model

    def forward(self, batch: Any) -> Tensor:
        return self.family.loss(self.model, batch)  # mapped, a loss does not tell whether it has a gradient


class Stack:
    """Tensors ``[K, ...]`` by name, of models that have the same names and shapes.

    Attributes:
        trained: parameters with a gradient.
        resting: parameters that the loss does not use or that want no gradient: an optimizer leaves them alone.
        buffers: those that a pass in training changes, such as running averages; all others are the first model's.

    Args:
        family: the loss.
        model: lends its structure, and may be used for nothing else.
        size: K.
        trained: names, from `moving_parts`.
        moving: names of buffers, from `moving_parts`.
    """

    def __init__(self, family: Family, model: nn.Module, size: int, trained: set[str], moving: set[str]) -> None:
        self.size, self.model, self.program = size, model, _Loss(family, model)
        own, held = dict(model.named_parameters()), dict(model.named_buffers())
        self.trained = {name: _room(each, size) for name, each in own.items() if name in trained}
        self.resting = {name: _room(each, size) for name, each in own.items() if name not in trained}
        self.buffers = {name: _room(held[name], size) for name in held if name in moving}

    @torch.no_grad()
    def put(self, slot: int, model: nn.Module) -> None:
        """Copy ``model`` to one slot."""
        source = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, stack in self.tensors():
            stack[slot].copy_(source[name])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Go through all stacks."""
        for part in (self.trained, self.resting, self.buffers):
            yield from part.items()

    def loss(self, tensors: Tensors, batch: Any) -> Tensor:
        """Return the loss of one model with these tensors; a buffer among them is changed in place by training."""
        return functional_call(self.program, {f"model.{name}": each for name, each in tensors.items()}, (batch,))


def moving_parts(family: Family, model: nn.Module, batch: Any) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that have a gradient, and of the buffers that a pass in training changes.

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
    # By value: a kernel that updates running averages does not always count as a change of the tensor.
    moving = {name for name, each in model.named_buffers() if not torch.equal(each, before[name])}
    with torch.no_grad():
        for name, each in model.named_buffers():
            each.copy_(before[name])
    return {name for name, each in zip(parameters, gradients, strict=True) if each is not None}, moving


def _room(tensor: Tensor, size: int) -> Tensor:
    return tensor.detach().new_empty((size, *tensor.shape))


Precision = torch.dtype | None


@dataclass(frozen=True)
class Moving:
    """All that a step changes: parameters, buffers that training changes, and the optimizer's state."""

    trained: Tensors
    buffers: Tensors
    states: dict[str, State]


register_dataclass(Moving)


class TrainingStep:
    """The step of one stack's shape.

    Args:
        stack: the models; only its structure is kept.
        kinds: each trained parameter's update.
        clips: whether any model clips its gradients.
        precision: of matrix products, under `torch.autocast`; the tensors' own if None.
    """

    def __init__(self, stack: Stack, kinds: dict[str, Kind], clips: bool, precision: Precision) -> None:
        self.stack, self.kinds, self.clips, self.precision = stack, kinds, clips, precision

    def __call__(
        self, now: Moving, resting: Tensors, settings: dict[str, OptimSettings], limit: Tensor, clock: Clock, batch: Any
    ) -> tuple[Tensor, Moving]:
        """Return the losses ``[K]`` before the step, and what it makes of ``now``.

        Args:
            now: as it stands; not changed.
            resting: the stack's parameters that are not trained.
            settings: of each trained parameter, [K, 1, ...] each.
            limit: the largest norm of the gradient, infinite for a model that does not clip; [K] in float64.
            clock: where each model is.
            batch: every model's own, [K, N, ...].
        """
        leaves = {name: each.detach().requires_grad_() for name, each in now.trained.items()}
        losses, buffers = losses_of(self.stack, {**resting, **leaves}, now.buffers, batch, self.precision)
        # A mean inside of each model and a sum over them: what is not finite stays where it is.
        found = torch.autograd.grad(losses.sum(), list(leaves.values()))
        # As the weights lie in memory: a layer's gradient comes transposed, and what is made of it would be as well.
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
    """Return the losses ``[K]`` of a stack with these tensors on each model's own batch, and its buffers afterwards."""

    def one(tensors: Tensors, buffers: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        buffers = {name: each.clone() for name, each in buffers.items()}
        return stack.loss({**tensors, **buffers}, batch), buffers

    run = torch.vmap(one, randomness="different")
    with FoldedAttention(), _casting(tensors, precision), warnings.catch_warnings():
        # An operation without a rule runs model by model: slower, and as right.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return run(tensors, buffers, batch)


def clipped(gradients: Tensors, kinds: dict[str, Kind], settings: dict[str, OptimSettings], limit: Tensor) -> Tensors:
    """Return gradients ``[K, ...]`` of which each model's norm is at most its ``limit`` (`Plan.clip_grad_norm_`)."""
    norms = [
        torch.linalg.vector_norm(piece.flatten(1), dim=1) * more * settings[name]["gauge"].flatten().to(each.dtype)
        for name, each in gradients.items()
        for more, piece in parted(each, kinds[name].columns, leading=1)
    ]
    total = torch.linalg.vector_norm(torch.stack([each.to(norms[0].dtype) for each in norms]), dim=0)
    scale = torch.clamp(limit.to(total.dtype) / (total + 1e-6), max=1.0)
    scale = torch.where(limit.isfinite(), scale, 1.0)  # who does not clip keeps even what is not finite
    return {name: each * scale.to(each.dtype).view(-1, *[1] * (each.dim() - 1)) for name, each in gradients.items()}


@contextlib.contextmanager
def _casting(tensors: Tensors, precision: Precision) -> Iterator[None]:
    if precision is None:
        yield
        return
    device = next(iter(tensors.values())).device.type
    # Casts are not kept between passes: the cache would hold those of weights that have been replaced.
    with torch.autocast(device, precision, cache_enabled=False):
        yield
