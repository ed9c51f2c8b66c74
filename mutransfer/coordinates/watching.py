"""One forward pass with the sizes of what every module takes in, gives out, and owes to its own update.

Sizes are means of |x| (mup's "l1"). Nothing here keeps a tensor alive longer than the caller does, and everything is made of
tensor operations, so that the same pass runs under `torch.vmap` over several seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..observing.flows import storage_key

__all__ = ["Pass", "Watched", "watch"]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Watched:
    """Which modules of a model to look at.

    Args:
        shown: module → the name that it is recorded under.
        roles: module → role (`roles.module_roles`), "output" where its result is a logit.
        own: module → {local name: name in the model} of its own parameters but matrices, for modules whose update is measured.
    """

    shown: Mapping[str, str]
    roles: dict[str, str]
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """What one forward pass showed: ``sizes`` by (module, statistic), and of a first pass what went in and came out."""

    sizes: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    inputs: Tensors = field(default_factory=dict)


@contextmanager
def watch(
    model: torch.nn.Module, watched: Watched, start: Pass | None, first: Tensors | None, *, survey: bool = False
) -> Iterator[Pass]:
    """Measure the forward passes of ``model`` inside of the context.

    Args:
        model: looked at through forward hooks, which are gone afterwards.
        watched: what to look at.
        start: the first pass, to measure the "change" against; None for the first itself, which has an "activation".
        first: initial parameters by name, to measure the "update" ΔW·x as well: what a module's matrices of today make of the
            first pass's input, less what they made of it then. It is the module's own, whatever came to it has changed.
        survey: also correct the roles in ``watched`` by what only a pass can tell; not possible under `torch.vmap`.
    """
    names = {module: name for name, module in model.named_modules() if name in watched.shown}
    seen = Pass()
    logits: dict[str, torch.Tensor] = {}  # kept, as a freed storage's address would be given to the next tensor
    inside = False

    def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal inside
        if inside or (result := first_floating(output)) is None:
            return
        name, detached = names[module], result.detach()
        if survey:
            _tell_role(watched.roles, logits, name, (args, kwargs), detached)
        given = first_floating((args, kwargs))
        if given is not None:
            seen.sizes[name, "input"] = size(given.detach())
        if start is None:
            seen.sizes[name, "activation"] = size(detached)
            seen.outputs[name] = detached
            if given is not None:
                seen.inputs[name] = given.detach()
            return
        before = start.outputs.get(name)
        if before is None or before.shape != detached.shape:
            return
        seen.sizes[name, "change"] = size(detached - before)
        if first is not None and name in watched.own:
            inside = True  # this is no pass of the model's
            try:
                own = {local: first[parameter] for local, parameter in watched.own[name].items()}
                again = _again(module, own, start.inputs.get(name), args, kwargs)
            finally:
                inside = False
            seen.sizes[name, "update"] = size(again - before)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def size(tensor: torch.Tensor) -> torch.Tensor:
    """Return mean |x|."""
    return tensor.abs().mean(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def first_floating(values: Any) -> torch.Tensor | None:
    """Return the first floating tensor of a tensor, tuple or dictionary, however nested."""
    leaves = tree_leaves(values)
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)


@torch.no_grad()
def _again(module: torch.nn.Module, own: Tensors, given: torch.Tensor | None, args: Any, kwargs: Any) -> torch.Tensor:
    """Return what ``module`` makes of ``given`` in place of its first floating argument, with the parameters in ``own``."""
    leaves, structure = tree_flatten((args, kwargs))
    replaced = first_floating((args, kwargs))
    if given is not None:
        leaves = [given if leaf is replaced else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(leaves, structure)
    # A batch norm moves its running averages in every pass.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    result = first_floating(functional_call(module, {**buffers, **own}, args, kwargs))
    assert result is not None  # as in the pass that it repeats
    return result.detach()


def _tell_role(roles: dict[str, str], logits: Tensors, name: str, given: Any, output: torch.Tensor) -> None:
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    if leaves and not leaves[0].is_floating_point() and roles.get(name) == "output" and name:
        roles[name] = "input"  # a matrix that is embedding and readout is here the embedding
    # What hands a readout's result on is a readout too.
    if any(storage_key(output) == storage_key(each) for each in logits.values()):
        roles[name] = "output"
    if roles.setdefault(name, "stream") == "output":
        logits[name] = output
