"""Where to look in a model: which modules, under which name, in which role, and which parameters are their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from ..names import plain_name, planned_names
from ..plans import Plan
from .watching import Unit

__all__ = ["module_roles", "naming", "places", "units"]

ROOT = "(model)"  # what a module without a name, the whole model, is recorded under
# Of a module's own parameters the first role in this order is the module's.
FIRST = ("output", "attention", "hidden", "bottleneck", "input", "vector", "finite")


def module_roles(model: torch.nn.Module, planned: Plan, attention: Collection[str] = frozenset()) -> dict[str, str]:
    """Return the role of every module that owns trainable parameters: "output" (its result is a logit), "hidden" and so on.

    Those of the parameters in ``attention`` make queries and keys of a growing head dim: the role "attention", also of norms.
    """
    roles: dict[str, str] = {}
    planned_roles = {row.name: row.role for row in planned.rows}
    owners = planned_names([name for name, _ in model.named_parameters()], planned_roles)
    frozen = {name for name, each in model.named_parameters(remove_duplicate=False) if not each.requires_grad}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            continue
        module = _owner(name)
        # A second name for a tied matrix is the readout's; the whole model's output is a logit, also where the model owns a
        # parameter of its own.
        own = owners.get(name, "")
        role = planned_roles.get(own, "output") if module else "output"
        role = "attention" if own in attention and role in ("hidden", "bottleneck", "vector") else role
        roles[module] = min(roles.get(module, role), role, key=FIRST.index)
    return roles


def units(
    model: torch.nn.Module, ran: Collection[str], roles: Mapping[str, str], known: Mapping[str, str]
) -> dict[str, Unit]:
    """Return the modules at which the update of every trainable parameter is measured.

    That is the parameter's own module, or where that does not run itself (`nn.MultiheadAttention`'s output projection) the
    nearest one around it that does. A tied parameter is measured in each of its own modules that run.

    Args:
        model: whose parameters they are.
        ran: the modules that a pass calls.
        roles: module → role (`module_roles`).
        known: parameter → role.
    """
    names = {id(each): name for name, each in model.named_parameters()}
    owners = planned_names(names.values(), known)
    modules = dict(model.named_modules())
    found: dict[str, dict[str, tuple[str, str]]] = {}
    every = list(model.named_parameters(remove_duplicate=False))
    at_home = {id(parameter) for name, parameter in every if _owner(name) in ran}
    for name, parameter in every:
        unit = _owner(name)
        if (
            unit not in ran and id(parameter) in at_home
        ):  # another name of one that is measured (T5's and BART's `shared`)
            continue
        while unit not in ran and unit:
            unit = unit.rpartition(".")[0]
        if unit not in ran or not parameter.requires_grad:
            continue
        local = name[len(unit) + 1 :] if unit else name
        alone = all(
            not _owner(each) or _owner(each) not in _inside(unit, ran) for each, _ in modules[unit].named_parameters()
        )
        matrix = sum(size > 1 for size in parameter.shape) > 1
        role = known.get(owners[names[id(parameter)]], "feature")
        role = _role_of_update(role, roles.get(unit), matrix, alone)
        if roles.get(unit) == "output" and role == "finite" and "parametrizations." in name[len(unit) :]:
            role = "gain"  # of a weight-normalized readout
        found.setdefault(unit, {})[local] = owners.get(name) or plain_name(name), role
    return {
        unit: Unit(
            {local: names[id(each)] for local, each in modules[unit].named_parameters() if each.requires_grad},
            {local: row for local, row in updates.items() if local in dict(modules[unit].named_parameters())},
            {local: owners[names[id(each)]] for local, each in modules[unit].named_parameters() if each.requires_grad},
        )
        for unit, updates in found.items()
    }


def _inside(unit: str, ran: Collection[str]) -> set[str]:
    """Return the local names of the modules inside of ``unit`` that run."""
    prefix = f"{unit}." if unit else ""
    return {name[len(prefix) :] for name in ran if name.startswith(prefix) and name != unit}


def _role_of_update(role: str, unit: str | None, matrix: bool, alone: bool) -> str:
    """Return the role under which a parameter's update is recorded.

    What the whole model makes of a parameter has gone through all behind it: "stream", whatever the parameter is.
    """
    if unit == "output" and (matrix or not alone):
        return "output" if alone else "stream"
    if unit == "attention":
        return "attention" if matrix else "attention vector"
    return "vector" if not matrix and role == "feature" else role


def naming(model: torch.nn.Module, known: Collection[str]) -> Callable[[str], str]:
    """Return how a frame calls modules: by their names, or without wrappers where some parameter is not known by its name."""
    trainable = {name for name, each in model.named_parameters() if each.requires_grad}
    return str if trainable <= set(known) else plain_name


def places(
    model: torch.nn.Module, owners: set[str], stacks: dict[str, int] | None, called: Callable[[str], str] = plain_name
) -> dict[str, str]:
    """Return which modules to record, and under which name; ``called`` names them in a check over widths (`naming`).

    For a check over widths those that own parameters. For one over depths (``stacks``: name of a stack of layers →
    number of layers) what the first and the last layer of every stack hand on, which is the residual stream, and the
    modules inside of the first layer and of the middle one, under these names. What enters the middle layer has seen half
    of the branches at every even depth; what enters the last one (L−1)/L of them, which alone reads as a slope of +0.2 over
    depths 2 to 32.
    """
    if stacks is None:
        return {name: called(name) or ROOT for name, _ in model.named_modules() if name in owners}
    shown = {}
    for name, _ in model.named_modules():
        parts, kept, is_layer = name.split("."), True, False
        for i, part in enumerate(parts):
            count = stacks.get(".".join(name.split(".")[:i])) if part.isdigit() else None
            if count is not None:
                is_layer = i == len(parts) - 1
                other = {count - 1: "last"} if is_layer else {count // 2: "middle"}
                which = ({**other, 0: "first"}).get(int(part))
                kept = kept and which is not None
                parts[i] = which or part
        if kept and (name in owners or is_layer):
            shown[name] = ".".join(parts) or ROOT
    return shown


def _owner(name: str) -> str:
    """Return the module that a parameter belongs to: what makes a parametrized weight hands on the weight, no features."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else _local_owner(name)


def _local_owner(name: str) -> str:
    return "" if name.startswith("parametrizations.") else name.rpartition(".")[0]
