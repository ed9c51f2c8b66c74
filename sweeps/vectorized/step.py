"""One training step of K models of equal shape as a function of tensors: forward, backward, clipping and update.

The tensors of the K models are stacked, and one model provides the structure. Attention folds the models into the batch, which
lets the usual kernel compute all of them. Parameters of equal shape and update form a group, which is one tensor: what is done
to all of them is then one operation, whatever their number. The parameters themselves are views of it.

A step that will be compiled returns new tensors: Inductor's fusion for CPUs failed on programs that write in place (docs/log.md).
Others write in place.

Shapes: groups, their gradients and states are [K, n, ...] for n parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mutransfer._torch_internals import register_dataclass
from mutransfer.devices import devices_of, random_state_restored
from mutransfer.family import Family
from mutransfer.planning.plan import parted

from .updates import Kind, State, is_in_pieces, updated

__all__ = [
    "MASK", "Group", "Moving", "Stack", "StackedKernels", "Tensors", "TrainingStep", "grouped", "losses_of", "moving_parts",
]  # fmt: skip

Tensors = dict[str, Tensor]


JOINT = "joint:"  # prefix of the name of a joint weight
MASK = "mask:"  # prefix of the name of a group's masks [K, n, ...] among the tensors that rest


@dataclass(frozen=True)
class Group:
    """Parameters of equal shape, dtype and update, which are trained as one tensor ``[K, n, ...]``.

    Attributes:
        kind: their update.
        names: their names; the first one also names the group.
        start: number of parameters with the same kind of update in the groups before, which locates the group's numbers.
        joint: number of successive parameters in each part of the group; those of a part are weights of linear layers that
            read the same input, which is multiplied by all of them at once.
    """

    kind: Kind
    names: tuple[str, ...]
    start: int
    joint: tuple[int, ...]

    @property
    def columns(self) -> slice:
        """Where the group's numbers are among those of its kind of update."""
        return slice(self.start, self.start + len(self.names))

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """Names of the parameters in each part."""
        ends = itertools.accumulate(self.joint)
        return [self.names[end - size : end] for end, size in zip(ends, self.joint, strict=True)]

    def members(self, stack: Tensor) -> Tensors:
        """Return views of the group's tensor ``[K, n, out, in]``: the parameters by name, and the joint weight of each part.

        The joint weight, ``[K, size * out, in]``, has the name of its first parameter after `JOINT`. A gradient of the group
        is put together from those of its parts by one operation.
        """
        found: Tensors = {}
        for names, part in zip(
            self.parts, stack.split(self.joint, dim=1) if len(self.joint) > 1 else [stack], strict=True
        ):
            if len(names) == 1:
                found[names[0]] = part.squeeze(1)
            else:
                found |= zip(names, part.unbind(1), strict=True)
                found[JOINT + names[0]] = part.flatten(1, 2)
        return found


def grouped(
    parameters: Mapping[str, Tensor], kinds: Mapping[str, Kind], readers: Sequence[Sequence[str]] = ()
) -> dict[str, Group]:
    """Return the groups of those ``parameters`` that have a kind, by the name of the first parameter of each.

    ``readers`` are names of linear weights that read the same input.
    """
    reads = {name: index for index, names in enumerate(readers) for name in names}
    alike: dict[Any, list[str]] = {}
    for name, each in parameters.items():
        if name in kinds:
            alike.setdefault((kinds[name], each.shape, each.dtype), []).append(name)
    groups, counts = {}, dict.fromkeys(("adam", "sgd", "muon"), 0)
    for (kind, *_), names in alike.items():
        parts = itertools.groupby(names, lambda name: reads.get(name, name))
        groups[names[0]] = Group(kind, tuple(names), counts[kind.name], tuple(len(list(part)) for _, part in parts))
        counts[kind.name] += len(names)
    return groups


class StackedKernels(TorchFunctionMode):
    """Mode in which attention and RMSNorm under one `torch.vmap` are computed for all models at once by fewer operations.

    `scaled_dot_product_attention` folds the mapped axis into the batch; `rms_norm` has its gradient written out. Take gradients
    outside of the vmap, of the sum of its losses.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func in (torch.rms_norm, F.rms_norm):
            return _rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class JointProducts(TorchFunctionMode):
    """Mode in which linear layers that read the same input multiply it by all of their weights at once.

    Args:
        joint: joint weights, by the name of their first parameter after `JOINT` (`Group.members`).
        tensors: the parameters by name, which the layers will use.
        groups: groups of the parameters.
    """

    def __init__(self, joint: Tensors, tensors: Tensors, groups: Mapping[str, Group]) -> None:
        super().__init__()
        parts = {names[0]: names for group in groups.values() for names in group.parts}
        # By weight: the joint weight, the number of layers that share it, and the layer's place among them.
        self._places = {
            id(tensors[name]): (weight, len(names), place)
            for key, weight in joint.items()
            for names in (parts[key.removeprefix(JOINT)],)
            for place, name in enumerate(names)
        }
        self._products: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and self._places:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) not in self._places:
            return F.linear(input, weight, bias)
        joint, count, place = self._places[id(weight)]
        read, products = self._products.get(id(joint), (None, {}))
        if read is not input or place not in products:
            products = dict(enumerate(F.linear(input, joint).chunk(count, dim=-1)))
            self._products[id(joint)] = input, products
        product = products.pop(place)  # once each: what all layers have taken is not kept
        return product if bias is None else product + bias


class _SharedInputs(TorchFunctionMode):
    """Mode that records which weights of linear layers read the same input.

    The layers return views of wider results, as in `JointProducts`: a model that cannot use them raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[int, list[Tensor]] = {}
        self._inputs: list[Tensor] = []  # kept alive, so that no other tensor gets one's id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._inputs.append(input)
        self.reads.setdefault(id(input), []).append(weight)
        out = F.linear(input, weight, bias)
        return torch.cat((out, out), dim=-1).narrow(-1, 0, out.shape[-1])


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    """Accept the arguments of torch's function, by position or by name."""
    cast = torch.is_autocast_enabled(input.device.type)
    if weight is None or len(normalized_shape) != 1 or input.dtype != weight.dtype or cast:
        return torch.rms_norm(input, normalized_shape, weight, eps)
    return _Normed.apply(input, weight, torch.finfo(input.dtype).eps if eps is None else eps)


class _Normed(torch.autograd.Function):
    """An autograd function that exists for its vmap rule."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute RMSNorm without vmap, for inputs that all models share."""
        return torch.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, since inputs that all models share have no gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, int]:
        """Compute it for all models."""
        x, weight = (_first(each, dim, info.batch_size) for each, dim in zip((x, weight), in_dims[:2], strict=True))
        return _RMSNorm.apply(x, weight, eps), 0


class _RMSNorm(torch.autograd.Function):
    """RMSNorm of inputs [K, ..., D] with weights [K, D]: the gradients take a third of the operations that autograd would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize, then multiply by the weights."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        inverse = torch.rsub(square, eps, alpha=-1 / x.shape[-1]).rsqrt()  # of the mean square plus eps
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * _along(weight, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of input and weights."""
        normed, inverse, weight = ctx.saved_tensors
        product = gradient * normed
        rows = product.reshape(weight.shape[0], -1, weight.shape[-1])
        sums = torch.bmm(rows, weight.unsqueeze(-1)).view_as(inverse)
        of_input = (
            torch.addcmul(gradient * _along(weight, gradient), normed, sums, value=-1 / weight.shape[-1]) * inverse
        )
        return of_input, rows.sum(1), None


def _along(weight: Tensor, x: Tensor) -> Tensor:
    """Return weights [K, D] in a shape that broadcasts over inputs [K, ..., D]."""
    return weight.view(weight.shape[0], *[1] * (x.dim() - 2), weight.shape[-1])


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
        if _is_short(q, k, v, mask, options):
            out = _short(q, k, v, options)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, **options)
        return out.unflatten(0, (K, B)), 0


SHORT = (
    64  # the longest sequence for which a CPU is faster without its attention kernel: 1.7 times at 64 with 16 per head
)


def _is_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    plain = q.dim() == k.dim() == v.dim() == 4 and mask is None and not options["dropout_p"]
    return plain and q.device.type == "cpu" and max(q.shape[-2], k.shape[-2]) <= SHORT


def _short(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Compute attention without a mask by batched products; all are [N, heads, T, D]."""
    if (group := q.shape[1] // k.shape[1]) > 1:
        k, v = (each.repeat_interleave(group, dim=1) for each in (k, v))
    T, S = q.shape[-2], k.shape[-2]
    unseen = q.new_zeros(T, S)
    if options["is_causal"]:
        unseen = unseen.masked_fill(unseen.new_ones(T, S, dtype=torch.bool).triu(1), -torch.inf)
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    scores = torch.baddbmm(unseen, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(*q.shape[:-1], v.shape[-1])


def _first(tensor: Tensor, dim: int | None, K: int) -> Tensor:
    """Return the tensor with the models as its first axis."""
    return tensor.expand(K, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _ranked(mask: Tensor, rank: int) -> Tensor:
    """Return the mask with axes of size 1 after the models' axis, where broadcasting adds them for each model alone."""
    return mask.reshape(mask.shape[0], *[1] * (rank - mask.dim()), *mask.shape[1:])


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
    """Stacked tensors ``[K, ...]``, of models with the same names and shapes.

    Attributes:
        trained: groups of parameters with a gradient, ``[K, n, ...]`` each.
        resting: parameters that the loss does not use or that require no gradient; the optimizer does not change them. With them
            are masks of groups whose weights may be pruned, after the prefix `MASK`.
        buffers: buffers that a training pass changes, such as running averages; all others are those of ``model``.

    Args:
        family: provides the loss.
        model: provides the structure; it must not be used for anything else.
        size: number of models, K.
        groups: the trained parameters, from `grouped`.
        moving: names of the changing buffers, from `moving_parts`.
    """

    def __init__(self, family: Family, model: nn.Module, size: int, groups: dict[str, Group], moving: set[str]) -> None:
        # Not `torch.func.stack_module_state`: it needs all K models at once, and stacks the buffers that no pass changes as well.
        # Slots are filled, and refilled, one at a time.
        self.size, self.model, self.program, self.groups = size, model, _Loss(family, model), groups
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        trained = {name for group in groups.values() for name in group.names}
        self.trained = {first: _empty(parameters[first], size, len(group.names)) for first, group in groups.items()}
        self.resting = {name: _empty(each, size) for name, each in parameters.items() if name not in trained}
        self.buffers = {name: _empty(buffers[name], size) for name in buffers if name in moving}

    def tensors(self) -> Tensors:
        """Return the stacked tensor ``[K, ...]`` of every parameter and changing buffer; writing to it writes to the stack."""
        parameters = {name: each for name, each in self.parameters(self.trained).items() if not name.startswith(JOINT)}
        return {**parameters, **self.resting, **self.buffers}

    def parameters(self, trained: Tensors) -> Tensors:
        """Return views of the groups ``trained``: the parameters ``[K, ...]`` by name, and joint weights (`Group.members`)."""
        return {
            name: each for first, group in self.groups.items() for name, each in group.members(trained[first]).items()
        }

    def loss(self, tensors: Tensors, batch: Any) -> Tensor:
        """Return the loss of one model with these tensors; in training mode, buffers among them are changed in place."""
        joint = {name: each for name, each in tensors.items() if name.startswith(JOINT)}
        own = {f"model.{name}": each for name, each in tensors.items() if not name.startswith((JOINT, MASK))}
        with JointProducts(joint, tensors, self.groups):
            return functional_call(self.program, own, (batch,))


def moving_parts(family: Family, model: nn.Module, batch: Any) -> tuple[set[str], set[str], list[list[str]]]:
    """Return what a training pass shows: the names of the parameters that have a gradient, of the buffers that it changes, and of
    the weights of linear layers that read the same input.

    Raises:
        RequestError: the model or its loss raised.
    """
    model.train()
    before = {name: each.clone() for name, each in model.named_buffers()}
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}

    def loss(mode: contextlib.AbstractContextManager[Any]) -> Tensor:
        with random_state_restored(devices_of(parameters.values())), mode:
            return family.loss_on(model, batch, "a batch (inputs, targets) of the data")

    shared = _SharedInputs()
    try:
        found = loss(shared)
    except Exception:  # the model's own, which it raises again, or because it cannot use views
        shared.reads.clear()
        found = loss(contextlib.nullcontext())
    gradients = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
    # Compare values: an update of running averages by a kernel is not always counted as a change of the tensor.
    moving = {name for name, each in model.named_buffers() if not torch.equal(each, before[name])}
    with torch.no_grad():
        for name, each in model.named_buffers():
            each.copy_(before[name])
    names = {id(each): name for name, each in parameters.items()}
    readers = [[names[id(weight)] for weight in weights if id(weight) in names] for weights in shared.reads.values()]
    trained = {name for name, each in zip(parameters, gradients, strict=True) if each is not None}
    return trained, moving, readers


def _empty(tensor: Tensor, *sizes: int) -> Tensor:
    return tensor.detach().new_empty((*sizes, *tensor.shape))


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
        clips: whether any model clips its gradients.
        precision: precision of matrix products under `torch.autocast`; that of the tensors if None.
        in_place: write parameters and optimizer states to those that are given; buffers are new in any case.
    """

    def __init__(self, stack: Stack, clips: bool, precision: Precision, in_place: bool = False) -> None:
        self.stack, self.clips, self.precision, self.in_place = stack, clips, precision, in_place

    def writing(self) -> TrainingStep:
        """Return the same step, which writes in place."""
        return TrainingStep(self.stack, self.clips, self.precision, True)

    def __call__(
        self, now: Moving, resting: Tensors, numbers: Tensors, gauges: Tensors, limit: Tensor, batch: Any
    ) -> tuple[Tensor, Moving]:
        """Return the losses ``[K]`` before the step, and the state after it.

        Args:
            now: current state; not changed unless the step writes in place.
            resting: the stack's parameters that are not trained, and masks.
            numbers: numbers of the optimizer for each kind of update, [N, K, P] (`numbers_at`).
            gauges: gauges of the parameters of each kind of update, [K, P] in float64.
            limit: maximum norm of the gradient, infinite for a model that does not clip; [K] in float64.
            batch: a separate batch for each model, [K, N, ...].
        """
        groups = self.stack.groups
        masks = {name.removeprefix(MASK): each for name, each in resting.items() if name.startswith(MASK)}
        tensors = {name: each for name, each in resting.items() if not name.startswith(MASK)}
        leaves: dict[str, list[Tensor]] = {}
        for name, each in now.trained.items():
            if is_in_pieces(
                groups[name].kind, each, self.in_place
            ):  # gradients of single parameters need not be stacked
                leaves[name] = [member.detach().requires_grad_() for member in each.unbind(1)]
                tensors |= zip(groups[name].names, leaves[name], strict=True)
            else:
                leaves[name] = [each.detach().requires_grad_()]
                tensors |= groups[name].members(leaves[name][0])
        losses, buffers = losses_of(self.stack, tensors, now.buffers, batch, self.precision)
        # Losses are means within each model, summed over the models: a value that is not finite stays within its model.
        found = iter(torch.autograd.grad(losses.sum(), [leaf for each in leaves.values() for leaf in each]))
        gradients = {
            name: [next(found).unsqueeze(1) if leaf.dim() < now.trained[name].dim() else next(found) for leaf in each]
            for name, each in leaves.items()
        }
        with torch.no_grad():
            for name, mask in masks.items():  # pruned weights are 0: without a gradient, they stay 0
                gradients[name] = [
                    each * (mask if len(gradients[name]) == 1 else mask[:, index : index + 1])
                    for index, each in enumerate(gradients[name])
                ]
            scale = clip_scale(gradients, groups, gauges, limit) if self.clips else None
            after = {
                name: updated(
                    group.kind, now.trained[name], gradients[name], now.states[name],
                    numbers[group.kind.name][..., group.columns], scale, self.in_place,
                )
                for name, group in groups.items()
            }  # fmt: skip
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
    with StackedKernels(), _casting(tensors, precision), warnings.catch_warnings():
        # An operation without a vmap rule runs model by model: slower, but correct.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return run(tensors, buffers, batch)


def clip_scale(
    gradients: Mapping[str, Sequence[Tensor]], groups: dict[str, Group], gauges: Tensors, limit: Tensor
) -> Tensor:
    """Return the factor on the gradients of each model that clips their norm to its ``limit`` (`Plan.clip_grad_norm_`), [K].

    ``gradients`` are those of each group: one tensor ``[K, n, ...]``, or n tensors ``[K, 1, ...]``.
    """
    dtype = next(iter(gradients.values()))[0].dtype
    norms, factors = [], []
    for name, parts in gradients.items():
        kind = groups[name].kind
        own = gauges[kind.name][:, groups[name].columns]
        for index, each in enumerate(parts):
            for more, piece in parted(each, kind.columns, leading=2):
                # Over an axis of size 1 as well, for pieces without any other.
                norms.append(torch.linalg.vector_norm(piece.unsqueeze(-1), dim=tuple(range(2, piece.dim() + 1))))
                factor = own[:, index : index + each.shape[1]]
                factors.append(factor if more == 1 else factor * more)
    weighted = torch.cat(norms, dim=1).to(dtype) * torch.cat(factors, dim=1).to(dtype)
    total = torch.linalg.vector_norm(weighted, dim=1)
    scale = torch.clamp(limit.to(total.dtype) / (total + 1e-6), max=1.0)
    return torch.where(limit.isfinite(), scale, 1.0)  # without clipping, keep even gradients that are not finite


@contextlib.contextmanager
def _casting(tensors: Tensors, precision: Precision) -> Iterator[None]:
    if precision is None:
        yield
        return
    device = next(iter(tensors.values())).device.type
    # Disable the cache of casts: it would keep casts of weights that have been replaced.
    with torch.autocast(device, precision, cache_enabled=False):
        yield
