"""Pruning at initialization: scores of weights, the masks that keep the highest, and the densities of the layers.

Sources: magnitude and random; SNIP (Lee et al. 1810.02340); GraSP (Wang et al. 2002.07376); SynFlow (Tanaka et al. 2006.05467),
all as compared by Frankle et al. (2009.08576).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mutransfer._torch_internals import tree_leaves, tree_map
from mutransfer.errors import RequestError
from mutransfer.family import Family, unwrapped
from mutransfer.planning.build import plan
from mutransfer.tracing.observe import observe
from mutransfer.tracing.specs import Observation

__all__ = ["SCORES", "kept", "layer_densities", "prune", "score", "shuffled"]

ROUNDS = 100  # of SynFlow
TINY = 1e-300  # in place of a division by 0
MASKED = -1e4  # attention scores below are those that a mask excludes

Masks = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


def layer_densities(
    family: Family, by: str, density: float, seed: int = 0, observation: Observation | None = None
) -> dict[str, float]:
    """Return the density of each hidden matrix of the base model that pruning by a score gives.

    Args:
        family: its base model is scored as its builder initializes it, on the example batch.
        by: one of `SCORES`.
        density: fraction of the hidden weights that remain, in (0, 1].
        seed: seed of the initial weights.
        observation: the result of `observe` for this family, to avoid repeating it.

    Raises:
        RequestError: the score leaves no weight in a layer.
    """
    seen = observation or observe(family)
    names = [name for name, spec in seen.specs.items() if spec.role == "hidden" and len(spec.shape) > 1]
    model = unwrapped(family.built(family.base))
    plan(family, family.base, "sp", observation=seen).initialize(model, seed)
    masks = prune(model, family.loss_on, family.batch, names, by, density, seed)
    densities = {name: float(mask.double().mean()) for name, mask in masks.items()}
    for name, each in densities.items():
        if each == 0:
            raise RequestError(
                f"pruning by {by} to density {density:g} leaves no weight in {name}: raise the density, or choose another "
                "score, such as erk."
            )
    return densities


def prune(model: nn.Module, loss: Loss, batch: Any, names: list[str], by: str, density: float, seed: int = 0) -> Masks:
    """Return masks (of zeros and ones) that keep the weights with the highest scores, over all ``names`` together.

    Args:
        model: an initialized model; it is left as it is.
        loss: (model, batch) → the loss, a scalar.
        batch: examples for the loss; SynFlow uses only its shapes and token indices.
        names: names of the parameters to prune.
        by: one of `SCORES`.
        density: fraction of their weights that remain, in (0, 1].
        seed: seed of random scores, and of weights that stand in for a readout of zeros.

    Raises:
        RequestError: the score is unknown, the density is out of range, or no parameters are named.
    """
    if by not in SCORES:
        raise RequestError(f"unknown score {by!r}: choose one of {', '.join(SCORES)}.")
    if not 0 < density <= 1:
        raise RequestError(f"the density is {density!r}: give a number greater than 0 and at most 1.")
    if not names:
        raise RequestError(
            "the model has no hidden matrix to prune: its widths do not grow on both sides of any layer."
        )
    scored = _prepared(model, seed)
    given = tree_map(_as_double, batch)
    if by != "synflow":
        return kept(SCORES[by](scored, loss, given, names, seed), density)
    masks: Masks = {}
    for step in range(1, ROUNDS + 1):
        scores = _synflow(scored, loss, given, names, seed)
        # A weight that an earlier round removed ranks last.
        found = {name: each.masked_fill(masks[name] == 0, -1.0) if masks else each for name, each in scores.items()}
        masks = kept(found, density ** (step / ROUNDS))
        with torch.no_grad():
            for name, each in _named(scored, names).items():
                each.mul_(masks[name])
    return masks


def score(model: nn.Module, loss: Loss, batch: Any, names: list[str], by: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the score of every weight of ``names``, in float64; see `prune` (for SynFlow, that of its first round)."""
    return SCORES[by](_prepared(model, seed), loss, tree_map(_as_double, batch), names, seed)


def kept(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Return masks that keep exactly round(density · size) of the weights, those with the highest scores over all tensors."""
    flat = torch.cat([each.flatten() for each in scores.values()])
    best = flat.argsort(descending=True, stable=True)[: max(1, round(density * flat.numel()))]
    chosen = torch.zeros_like(flat).index_fill_(0, best, 1.0)
    sizes = [each.numel() for each in scores.values()]
    return {name: part.view_as(each) for (name, each), part in zip(scores.items(), chosen.split(sizes), strict=True)}


def shuffled(masks: Mapping[str, Tensor], seed: int = 0) -> Masks:
    """Return each mask with its entries permuted at random, which keeps its density."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }


def _prepared(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy to be scored, in float64, in which matrices of zeros are drawn from a normal distribution with std 1/√fan-in.

    With a readout of zeros, or branches that end in zeros, no gradient arrives at the weights below, and their scores would be 0.
    """
    scored = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in scored.parameters():
            if each.dim() > 1 and not each.any():
                drawn = torch.randn(each.shape, generator=generator, dtype=each.dtype)
                each.copy_(drawn * each[0].numel() ** -0.5)
    return scored


def _named(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name) for name in names}


def _gradients(model: nn.Module, loss: Loss, batch: Any, names: list[str], *, twice: bool = False) -> Any:
    parameters = _named(model, names)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        value = loss(model, batch)
        return torch.autograd.grad(value, list(parameters.values()), create_graph=twice)


def _as_double(each: Any) -> Any:
    return each.double() if isinstance(each, Tensor) and each.is_floating_point() else each


def _magnitude(model: nn.Module, loss: Loss, batch: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """|θ|."""
    return {name: each.detach().abs() for name, each in _named(model, names).items()}


def _random(model: nn.Module, loss: Loss, batch: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """Uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(each.shape, generator=generator, dtype=torch.float64)
        for name, each in _named(model, names).items()
    }


def _snip(model: nn.Module, loss: Loss, batch: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """|g ⊙ θ|: the change of the loss if a weight is removed, to first order (1810.02340, Eq. 5)."""
    gradients = _gradients(model, loss, batch, names)
    return {
        name: (each * g).detach().abs() for (name, each), g in zip(_named(model, names).items(), gradients, strict=True)
    }


def _grasp(model: nn.Module, loss: Loss, batch: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """θ ⊙ Hg: how much removing a weight reduces the norm of the gradient (2002.07376, Eq. 8, with the other sign)."""
    gradients = _gradients(model, loss, batch, names, twice=True)
    flow = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(flow, list(_named(model, names).values()))
    return {name: (each * Hg).detach() for (name, each), Hg in zip(_named(model, names).items(), products, strict=True)}


def _synflow(model: nn.Module, loss: Loss, batch: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """|∂R/∂θ ⊙ θ| of the model with the magnitudes of its parameters, where R is the sum of its outputs for inputs of ones
    (2006.05467, Eq. 2).

    Token indices, which cannot be ones, are those of the batch. Normalization and softmax divide by constants (`_Linear`), as
    batch normalization does in evaluation: otherwise a layer that only feeds a softmax or a normalization would score 0.
    """
    with torch.no_grad():
        for each in model.parameters():
            each.abs_()
    parameters = _named(model, names)
    outputs: list[Tensor] = []

    def with_ones(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda each: torch.ones_like(each) if _is_float(each) else each, (args, kwargs))

    def keep(module: nn.Module, args: Any, result: Any) -> None:
        outputs.extend(
            each for each in tree_leaves(result) if _is_float(each) and each.requires_grad and each.dim() > 0
        )

    hooks = [model.register_forward_pre_hook(with_ones, with_kwargs=True), model.register_forward_hook(keep)]
    try:
        with _Linear():
            loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    total = torch.stack([each.sum() for each in outputs]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {name: (each * g).detach().abs() for (name, each), g in zip(parameters.items(), gradients, strict=True)}


class _Linear(TorchFunctionMode):
    """Mode in which normalization layers and softmax divide by constants, so that they are linear functions of their input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, F.rms_norm, torch.rms_norm, F.group_norm):
            return _scaled(*args, **kwargs) if func is not F.group_norm else _scaled_channels(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            return _shares(args[0], kwargs.get("dim", args[1] if len(args) > 1 else -1))
        if func is F.scaled_dot_product_attention:
            return _attended(*args, **kwargs)
        return func(*args, **kwargs)


def _scaled(x: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    size = x.detach().square().mean(dim=tuple(range(-len(shape), 0)), keepdim=True).sqrt()
    x = x / size.clamp(min=TINY)
    return x if weight is None else x * weight


def _scaled_channels(x: Tensor, groups: int, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    parts = x.detach().unflatten(1, (groups, -1))
    size = parts.square().mean(dim=tuple(range(2, parts.dim())), keepdim=True).sqrt().clamp(min=TINY)
    x = (x.unflatten(1, (groups, -1)) / size).view_as(x)
    return x if weight is None else x * weight.view(-1, *[1] * (x.dim() - 2))


def _shares(x: Tensor, dim: int) -> Tensor:
    """Divide by the sum of the magnitudes; entries that a mask has made very negative count as 0.

    Others may be negative, although all weights are positive: rotary embeddings have both signs.
    """
    x = x.masked_fill(x < MASKED, 0.0)
    return x / x.detach().abs().sum(dim, keepdim=True).clamp(min=TINY)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3) for each in (key, value))
    weights = query @ key.mT
    if is_causal:
        weights = weights.tril()
    if attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > MASKED
        weights = weights * seen
    return _shares(weights, -1) @ value


def _is_float(each: Any) -> bool:
    return isinstance(each, Tensor) and each.is_floating_point()


SCORES: dict[str, Callable[[nn.Module, Loss, Any, list[str], int], dict[str, Tensor]]] = {
    "synflow": _synflow,
    "snip": _snip,
    "grasp": _grasp,
    "magnitude": _magnitude,
    "random": _random,
}
