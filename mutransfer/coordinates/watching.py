"""One forward pass with the sizes of what every module takes in, gives out, and owes to the update of each of its parameters.

Sizes are means of |x| (mup's "l1"). Nothing here keeps a tensor alive longer than the caller does, and everything is made of
tensor operations, so that the same pass runs under `torch.vmap` over several seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..gauges import as_entered
from ..observing.flows import storage_key

__all__ = ["Pass", "Unit", "Watched", "watch"]

Tensors = dict[str, torch.Tensor]
Inputs = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Unit:
    """A module that turns some parameters into its output, and so shows what an update of each does.

    Args:
        first: local name → name in the model, of every trainable parameter that takes part in the module's forward.
        updates: local name → (name to record under, role), of those whose update is measured here.
        owners: local name → the name that it was planned under; a tied parameter is planned once.
    """

    first: Mapping[str, str]
    updates: Mapping[str, tuple[str, str]]
    owners: Mapping[str, str]


@dataclass(frozen=True)
class Watched:
    """Which modules of a model to look at.

    Args:
        shown: module → the name that it is recorded under.
        roles: module → role (`roles.module_roles`), "output" where its result is a logit.
        units: module → what to measure of its parameters' updates.
        calls: module → how often a pass calls it; counted in the first pass.
        random: modules that draw random numbers (dropout); found in the first pass.
    """

    shown: Mapping[str, str]
    roles: dict[str, str]
    units: Mapping[str, Unit] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    random: set[str] = field(default_factory=set)

    def recorded_names(self) -> dict[str, list[str]]:
        """Return parameter → the names that its updates are recorded under: a tied one has one in each module that runs."""
        found: dict[str, dict[str, None]] = {}
        for unit in self.units.values():
            for local, (name, _) in unit.updates.items():
                found.setdefault(unit.owners[local], {})[name] = None
        return {owner: [*names] for owner, names in found.items()}


@dataclass(frozen=True)
class Pass:
    """What one forward pass showed: ``sizes`` by (module or parameter, statistic), and of a first pass what went in and came out.

    ``inputs`` holds a unit's tensors, in the order of its flattened arguments.
    """

    sizes: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)


@contextmanager
def watch(
    model: torch.nn.Module, watched: Watched, start: Pass | None, first: Tensors | None, *, survey: bool = False
) -> Iterator[Pass]:
    """Measure the forward passes of ``model`` inside of the context.

    Args:
        model: looked at through forward hooks, which are gone afterwards.
        watched: what to look at.
        start: the first pass, to measure the "change" against; None for the first itself, which has an "activation".
        first: initial parameters by name, to measure every parameter's "update" as well: what its module makes of the first
            pass's input with this parameter as it is now and all others as they were, less what it made of it then. It is
            the parameter's own, whatever else has changed. Of a module that is called several times the last call counts.
        survey: look at all modules, and correct the roles in ``watched`` by what only a pass can tell; not possible under
            `torch.vmap`.
    """
    named = {*watched.shown, *watched.units}
    names = {module: name for name, module in model.named_modules() if survey or name in named}
    seen = Pass()
    logits: dict[str, torch.Tensor] = {}  # kept, as a freed storage's address would be given to the next tensor
    calls: Counter[str] = Counter()
    entered: dict[str, Any] = {}
    inside = False

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        name = names[module]
        if not inside and (start is None or (first is not None and name in watched.random)):
            entered[name] = _random_state((args, kwargs))

    def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal inside
        if inside:
            return
        name = names[module]
        seen.ran.add(name)
        calls[name] += 1
        if start is None and name in watched.units:
            watched.calls[name] = calls[name]
            if not _same(entered[name], _random_state((args, kwargs))):
                watched.random.add(name)
        if name not in named or (result := first_floating(output)) is None:
            return
        detached = result.detach()
        if survey:
            _tell_role(watched.roles, logits, name, (args, kwargs), detached)
        given = first_floating((args, kwargs))
        if given is not None:
            seen.sizes[name, "input"] = size(given.detach())
        if start is None:
            seen.sizes[name, "activation"] = size(detached)
            # Copies: what follows may work in place (an activation, a residual sum).
            seen.outputs[name] = detached.clone()
            if name in watched.units:
                seen.inputs[name] = [leaf.detach().clone() for leaf in _replaced((args, kwargs))]
            return
        before = start.outputs.get(name)
        if before is None or before.shape != detached.shape:
            return
        seen.sizes[name, "change"] = size(detached - before)
        if first is not None and name in watched.units and calls[name] == watched.calls[name]:
            inside = True  # this is no pass of the model's
            try:
                args, kwargs = _with(start.inputs[name], args, kwargs)
                for local, (called, _) in watched.units[name].updates.items():
                    others = {
                        other: first[parameter].to(detached.device)
                        for other, parameter in watched.units[name].first.items()
                        if other != local
                    }
                    with _from(entered.get(name)):
                        again = _again(module, others, args, kwargs)
                    seen.sizes[called, "update"] = size(again - before)
            finally:
                inside = False

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in names]
    handles += [
        module.register_forward_pre_hook(enter, with_kwargs=True) for module in names if names[module] in watched.units
    ]
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


def _replaced(arguments: Any) -> list[torch.Tensor]:
    """Return the tensors among a module's arguments that may differ from pass to pass: none where no floating one is given.

    Integers beside features may have been chosen by them (a router's experts); alone they are the batch's.
    """
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    return leaves if any(leaf.is_floating_point() for leaf in leaves) else []


def _with(tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
    """Return the arguments with the first pass's tensors in place of today's."""
    leaves, structure = tree_flatten((args, kwargs))
    if len(tensors) != len(_replaced((args, kwargs))):
        return args, kwargs
    former = iter(tensors)
    leaves = [next(former) if tensors and isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return tree_unflatten(leaves, structure)


@torch.no_grad()
def _again(module: torch.nn.Module, others: Tensors, args: Any, kwargs: Any) -> torch.Tensor:
    """Return what ``module`` makes of these arguments with the parameters in ``others``."""
    # A batch norm moves its running averages in every pass.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with as_entered(module):
        result = first_floating(functional_call(module, {**buffers, **others}, args, kwargs))
    assert result is not None  # as in the pass that it repeats
    return result.detach()


def _random_state(arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    tensor = next((leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor) and leaf.is_cuda), None)
    device = -1 if tensor is None else tensor.get_device()
    return torch.get_rng_state(), None if tensor is None else torch.cuda.get_rng_state(device), device


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and (one[1] is None or torch.equal(one[1], other[1]))


@contextmanager
def _from(state: Any) -> Iterator[None]:
    """Draw the random numbers that follow from ``state``, and leave the generators as they were."""
    if state is None:
        yield
        return
    cpu, cuda, device = state
    with torch.random.fork_rng([] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield


def _tell_role(roles: dict[str, str], logits: Tensors, name: str, given: Any, output: torch.Tensor) -> None:
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    if leaves and not leaves[0].is_floating_point() and roles.get(name) == "output" and name:
        roles[name] = "input"  # a matrix that is embedding and readout is here the embedding
    # What hands a readout's result on is a readout too.
    if any(storage_key(output) == storage_key(each) for each in logits.values()):
        roles[name] = "output"
    if roles.setdefault(name, "stream") == "output":
        logits[name] = output
