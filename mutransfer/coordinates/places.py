"""Where to look in a model: which modules, under which name, in which role, and which parameters are their own."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..names import plain_name
from ..plans import Plan

__all__ = ["module_roles", "own_parameters", "places"]

ROOT = "(model)"  # what a module without a name, the whole model, is recorded under
# Of a module's own parameters the first role in this order is the module's.
FIRST = ("output", "attention", "hidden", "bottleneck", "input", "vector", "finite")


def module_roles(model: torch.nn.Module, planned: Plan, attention: Collection[str] = frozenset()) -> dict[str, str]:
    """Return the role of every module that owns trainable parameters: "output" (its result is a logit), "hidden" and so on.

    Those of the parameters in ``attention`` make queries and keys of a growing head dim: the role "attention".
    """
    roles: dict[str, str] = {}
    planned_roles = {row.name: row.role for row in planned.rows}
    frozen = {name for name, each in model.named_parameters(remove_duplicate=False) if not each.requires_grad}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            continue
        module = _owner(name)
        # A second name for a tied matrix is the readout's; the whole model's output is a logit, also where the model owns a
        # parameter of its own.
        role = planned_roles.get(plain_name(name), "output") if module else "output"
        role = "attention" if plain_name(name) in attention and role in ("hidden", "bottleneck") else role
        roles[module] = min(roles.get(module, role), role, key=FIRST.index)
    return roles


def own_parameters(model: torch.nn.Module) -> dict[str, dict[str, str]]:
    """Return, for every module that alone turns its parameters into its output, {local name: name in the model} of its vectors.

    They are what an update ΔW·x leaves out; a module of vectors only (a norm) has none to leave out. One whose children own
    parameters as well (the model itself, `nn.MultiheadAttention`) has no update of its own.
    """
    names = {id(each): name for name, each in model.named_parameters()}
    own: dict[str, dict[str, str]] = {}
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            continue
        inside = list(module.named_parameters(remove_duplicate=False))
        if inside and all(_owner(local) == "" for local, _ in inside):
            matrices = any(each.dim() > 1 for _, each in inside)
            own[name] = {local: names[id(each)] for local, each in inside if matrices and each.dim() < 2}
    return own


def places(model: torch.nn.Module, owners: set[str], stacks: dict[str, int] | None) -> dict[str, str]:
    """Return which modules to record, and under which name.

    For a check over widths those that own parameters. For one over depths (``stacks``: name of a stack of layers →
    number of layers) what the first and the last layer of every stack hand on, which is the residual stream, and the
    modules inside of the first layer and of the middle one, under these names. What enters the middle layer has seen half
    of the branches at every even depth; what enters the last one (L−1)/L of them, which alone reads as a slope of +0.2 over
    depths 2 to 32.
    """
    if stacks is None:
        return {name: plain_name(name) or ROOT for name, _ in model.named_modules() if name in owners}
    shown = {}
    for name, _ in model.named_modules():
        parts, kept, is_layer = name.split("."), True, False
        for i, part in enumerate(parts):
            count = stacks.get(".".join(name.split(".")[:i])) if part.isdigit() else None
            if count is not None:
                is_layer = i == len(parts) - 1
                other = {count - 1: "last"} if is_layer else {count // 2: "middle"}
                called = ({**other, 0: "first"}).get(int(part))
                kept = kept and called is not None
                parts[i] = called or part
        if kept and (name in owners or is_layer):
            shown[name] = ".".join(parts) or ROOT
    return shown


def _owner(name: str) -> str:
    """Return the module that a parameter belongs to: what makes a parametrized weight hands on the weight, no features."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else _local_owner(name)


def _local_owner(name: str) -> str:
    return "" if name.startswith("parametrizations.") else name.rpartition(".")[0]
