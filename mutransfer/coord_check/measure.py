"""Measurements of a coordinate check: sizes of inputs, outputs and ΔW·x by forward hooks, and sizes of parameters and steps.

Sizes are means of |x| (mup's "l1"). This module keeps no tensor alive longer than its caller does. All measurements are tensor
operations, so the same pass also runs under `torch.vmap` over several seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call

from .._torch_internals import storage_id, tree_flatten, tree_leaves, tree_unflatten
from ..optimizers.rules import OPTIMIZERS
from ..param_names import plain_name, planned_names
from ..parametrizations.spec import FOLDS
from ..parametrizations.tables import TABLES, table
from ..planning.multipliers import as_entered
from ..planning.plan import Plan

__all__ = [
    "Owned",
    "Pass",
    "Unit",
    "Watched",
    "decays",
    "module_roles",
    "naming",
    "owned",
    "places",
    "shrink",
    "sizes_of_gradients",
    "sizes_of_pulls",
    "sizes_of_steps",
    "sizes_of_weights",
    "units",
    "watch",
]

Tensors = dict[str, torch.Tensor]
Inputs = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Unit:
    """A module whose output shows the effect of updating each of its parameters.

    Args:
        first: local name → name in the model, for every trainable parameter used in the module's forward.
        updates: local name → (name to record under, role), for the parameters whose update is measured at this module.
        owners: local name → name in the plan; a tied parameter is planned once.
    """

    first: Mapping[str, str]
    updates: Mapping[str, tuple[str, str]]
    owners: Mapping[str, str]


@dataclass(frozen=True)
class Watched:
    """The modules of a model that are measured.

    Args:
        shown: module → the name that it is recorded under.
        roles: module → role (`module_roles`); "output" if its output is a logit.
        units: module → the parameter updates to measure at it.
        calls: module → number of calls in a pass; counted in the first pass.
        random: modules that draw random numbers (dropout); detected in the first pass.
    """

    shown: Mapping[str, str]
    roles: dict[str, str]
    units: Mapping[str, Unit] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    random: set[str] = field(default_factory=set)

    def recorded_names(self) -> dict[str, list[str]]:
        """Return, for each parameter, the names its updates are recorded under; a tied one has one per called module."""
        found: dict[str, dict[str, None]] = {}
        for unit in self.units.values():
            for local, (name, _) in unit.updates.items():
                found.setdefault(unit.owners[local], {})[name] = None
        return {owner: [*names] for owner, names in found.items()}


@dataclass(frozen=True)
class Pass:
    """Measurements of one forward pass.

    ``sizes`` is keyed by (module or parameter, statistic). ``outputs`` and ``inputs`` hold tensors of a first pass, by module;
    a unit's inputs are in the order of its flattened arguments. ``ran`` holds the modules that were called.
    """

    sizes: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)


@contextmanager
def watch(
    model: torch.nn.Module, watched: Watched, start: Pass | None, first: Tensors | None, *, survey: bool = False
) -> Iterator[Pass]:
    """Measure the forward passes of ``model`` inside the context.

    Args:
        model: measured with forward hooks, which are removed on exit.
        watched: the modules to measure.
        start: the first pass, relative to which "change" is measured; None for the first pass itself, which records
            "activation".
        first: initial parameters by name, to measure every parameter's "update" as well. An update is the difference between
            two outputs of the parameter's module on the first pass's input: with the current value of this parameter and the
            initial values of all others, and with all initial values. It does not depend on changes to any other parameter.
            If a module is called several times, the last call counts.
        survey: measure all modules, and correct the roles in ``watched`` with information that only a pass provides; not
            possible under `torch.vmap`.
    """
    named = {*watched.shown, *watched.units}
    names = {module: name for name, module in model.named_modules() if survey or name in named}
    seen = Pass()
    logits: dict[str, torch.Tensor] = {}  # kept alive, as the address of a freed storage may be reused
    calls: Counter[str] = Counter()
    entered: dict[str, Any] = {}
    replaying = False

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        name = names[module]
        if not replaying and (start is None or (first is not None and name in watched.random)):
            entered[name] = _random_state((args, kwargs))

    def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal replaying
        if replaying:
            return
        name = names[module]
        seen.ran.add(name)
        calls[name] += 1
        if start is None and name in watched.units:
            watched.calls[name] = calls[name]
            if not _same_random_state(entered[name], _random_state((args, kwargs))):
                watched.random.add(name)
        if name not in named or (result := first_floating(output)) is None:
            return
        detached = result.detach()
        if survey:
            _correct_role(watched.roles, logits, name, (args, kwargs), detached)
        entering = first_floating((args, kwargs))
        if entering is not None:
            seen.sizes[name, "input"] = size(entering.detach())
        if start is None:
            seen.sizes[name, "activation"] = size(detached)
            # Clone, because later operations may work in place (an activation function, a residual sum).
            seen.outputs[name] = detached.clone()
            if name in watched.units:
                seen.inputs[name] = [leaf.detach().clone() for leaf in _varying_inputs((args, kwargs))]
            return
        before = start.outputs.get(name)
        if before is None or before.shape != detached.shape:
            return
        seen.sizes[name, "change"] = size(detached - before)
        if first is not None and name in watched.units and calls[name] == watched.calls[name]:
            replaying = True  # the hooks ignore these calls, which are not part of the model's pass
            try:
                args, kwargs = _with_first_inputs(start.inputs[name], args, kwargs)
                for local, (called, _) in watched.units[name].updates.items():
                    others = {
                        other: first[parameter].to(detached.device)
                        for other, parameter in watched.units[name].first.items()
                        if other != local
                    }
                    with _using_random_state(entered.get(name)):
                        again = _rerun(module, others, args, kwargs)
                    seen.sizes[called, "update"] = size(again - before)
            finally:
                replaying = False

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
    """Return the first floating-point tensor in an arbitrarily nested structure, or None."""
    leaves = tree_leaves(values)
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)


def _varying_inputs(arguments: Any) -> list[torch.Tensor]:
    """Return the tensors among a module's arguments that may differ between passes; empty if none is floating-point.

    Integer tensors that accompany features may depend on them (the experts chosen by a router); on their own they come from the
    batch.
    """
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    return leaves if any(leaf.is_floating_point() for leaf in leaves) else []


def _with_first_inputs(tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
    """Return the arguments with their tensors replaced by those of the first pass."""
    leaves, structure = tree_flatten((args, kwargs))
    if len(tensors) != len(_varying_inputs((args, kwargs))):
        return args, kwargs
    former = iter(tensors)
    leaves = [next(former) if tensors and isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return tree_unflatten(leaves, structure)


@torch.no_grad()
def _rerun(module: torch.nn.Module, others: Tensors, args: Any, kwargs: Any) -> torch.Tensor:
    """Return the output of ``module`` for these arguments, with the parameters in ``others`` substituted."""
    # Clone the buffers, as a batch norm updates its running averages in every pass.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with as_entered(module):
        result = first_floating(functional_call(module, {**buffers, **others}, args, kwargs))
    assert result is not None  # as in the pass that is repeated
    return result.detach()


def _random_state(arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    tensor = next((leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor) and leaf.is_cuda), None)
    device = -1 if tensor is None else tensor.get_device()
    return torch.get_rng_state(), None if tensor is None else torch.cuda.get_rng_state(device), device


def _same_random_state(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and (one[1] is None or torch.equal(one[1], other[1]))


@contextmanager
def _using_random_state(state: Any) -> Iterator[None]:
    """Set the random number generators to ``state`` inside the context, and restore them on exit."""
    if state is None:
        yield
        return
    cpu, cuda, device = state
    with torch.random.fork_rng([] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield


def _correct_role(roles: dict[str, str], logits: Tensors, name: str, arguments: Any, output: torch.Tensor) -> None:
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    if leaves and not leaves[0].is_floating_point() and roles.get(name) == "output" and name:
        roles[name] = "input"  # a matrix shared by embedding and readout is used as the embedding here
    # A module that passes on a readout's output unchanged is a readout too.
    if any(storage_id(output) == storage_id(each) for each in logits.values()):
        roles[name] = "output"
    if roles.setdefault(name, "stream") == "output":
        logits[name] = output


ROOT = "(model)"  # recorded name of the whole model, whose module name is empty
# A module takes the first role in this order among the roles of the parameters it owns.
FIRST = ("output", "attention", "hidden", "bottleneck", "input", "vector", "finite")


def module_roles(model: torch.nn.Module, planned: Plan, attention: Collection[str] = frozenset()) -> dict[str, str]:
    """Return the role of every module that owns trainable parameters: "output" if its output is a logit, "hidden" and so on.

    The parameters in ``attention`` produce queries and keys of a growing head dim; their modules, including norms, get the role
    "attention".
    """
    roles: dict[str, str] = {}
    planned_roles = {row.name: row.role for row in planned.rows}
    owners = planned_names([name for name, _ in model.named_parameters()], planned_roles)
    frozen = {name for name, each in model.named_parameters(remove_duplicate=False) if not each.requires_grad}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            continue
        module = _owner(name)
        # The second name of a tied matrix belongs to the readout. The output of the whole model is a logit, even if the model
        # owns parameters directly.
        planned_name = owners.get(name, "")
        role = planned_roles.get(planned_name, "output") if module else "output"
        role = "attention" if planned_name in attention and role in ("hidden", "bottleneck", "vector") else role
        roles[module] = min(roles.get(module, role), role, key=FIRST.index)
    return roles


def units(
    model: torch.nn.Module, ran: Collection[str], roles: Mapping[str, str], known: Mapping[str, str]
) -> dict[str, Unit]:
    """Return the modules at which the updates of the trainable parameters are measured.

    A parameter is measured at the module that owns it or, if that module is never called (`nn.MultiheadAttention`'s output
    projection), at the nearest enclosing module that is. A tied parameter is measured at each owning module that is called.

    Args:
        model: the model that holds the parameters.
        ran: the modules that a pass calls.
        roles: module → role (`module_roles`).
        known: parameter → role.
    """
    names = {id(each): name for name, each in model.named_parameters()}
    owners = planned_names(names.values(), known)
    modules = dict(model.named_modules())
    found: dict[str, dict[str, tuple[str, str]]] = {}
    every = list(model.named_parameters(remove_duplicate=False))
    measured_at_owner = {id(parameter) for name, parameter in every if _owner(name) in ran}
    for name, parameter in every:
        unit = _owner(name)
        # Skip the second name of a parameter that is measured under another (T5's and BART's `shared`).
        if unit not in ran and id(parameter) in measured_at_owner:
            continue
        while unit not in ran and unit:
            unit = unit.rpartition(".")[0]
        if unit not in ran or not parameter.requires_grad:
            continue
        local = name[len(unit) + 1 :] if unit else name
        alone = all(
            not _owner(each) or _owner(each) not in _called_inside(unit, ran)
            for each, _ in modules[unit].named_parameters()
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


def _called_inside(unit: str, ran: Collection[str]) -> set[str]:
    """Return the local names of the modules inside ``unit`` that are called."""
    prefix = f"{unit}." if unit else ""
    return {name[len(prefix) :] for name in ran if name.startswith(prefix) and name != unit}


def _role_of_update(role: str, unit: str | None, matrix: bool, alone: bool) -> str:
    """Return the role under which a parameter's update is recorded.

    An update measured at the output of the whole model has passed through all later layers: its role is "stream", whatever the
    parameter is.
    """
    if unit == "output" and (matrix or not alone):
        return "output" if alone else "stream"
    if unit == "attention":
        return "attention" if matrix else "attention vector"
    return "vector" if not matrix and role == "feature" else role


def naming(model: torch.nn.Module, known: Collection[str]) -> Callable[[str], str]:
    """Return a function that names modules in a frame: as is, or without wrapper prefixes if a parameter is not in ``known``."""
    trainable = {name for name, each in model.named_parameters() if each.requires_grad}
    return str if trainable <= set(known) else plain_name


def places(
    model: torch.nn.Module, owners: set[str], stacks: dict[str, int] | None, called: Callable[[str], str] = plain_name
) -> dict[str, str]:
    """Return the modules to record, with the names to record them under.

    A check over widths records the modules that own parameters, named by ``called`` (`naming`). A check over depths
    (``stacks``: name of a stack of layers → number of layers) records the outputs of the first and the last layer of every
    stack, usually the residual stream, and the modules inside the first and the middle layer; "first", "middle" and "last"
    replace the layer numbers. The input of the middle layer has passed half of the branches at every even depth. The input of
    the last layer has passed (L−1)/L of them, which alone produces a slope of +0.2 over depths 2 to 32.
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
    """Return the module that owns a parameter, skipping modules that only compute a parametrized weight, not features."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else _local_owner(name)


def _local_owner(name: str) -> str:
    return "" if name.startswith("parametrizations.") else name.rpartition(".")[0]


COARSE = 0.01  # fraction of a step; if the last digit of the parameter is larger, rounding affects the step
ROUNDING = 1e-5  # fraction of the median gradient; smaller gradients are rounding (a key's bias, a bias before a norm)


@dataclass(frozen=True)
class Owned:
    """A parameter's role and the units of its size and of its first step.

    ``unit`` is µP's initial size, relative to the base model's; None for constants and structured weights, and for finite
    parameters, whose size is not scaled. ``step`` is µP's learning rate, relative to the base model's; None where it is not
    needed: under optimizers that operate on whole matrices, and where Adam's step equals the update because only the fan-out
    grows. ``pulled`` is True if a step is the learning rate times the gradient (SGD), not the learning rate itself (Adam);
    ``decoupled`` is True if weight decay is not part of the gradient.
    """

    role: str
    unit: float | None
    step: float | None = None
    pulled: bool = False
    decoupled: bool = False


def owned(planned: Plan) -> dict[str, Owned]:
    """Return the role and units of every planned parameter, including folded multipliers (TP-V 2203.03466, Table 3)."""
    rules, healthy, optimizer = table(planned.parametrization).rows, TABLES["mup"].rows, OPTIMIZERS[planned.optimizer]
    found = {}
    for row in planned.rows:
        m = row.m_in, row.m_out
        unit = healthy[row.role].init(*m) * row.gauge / rules[row.role].gauge(*m)
        random = row.role != "finite" and row.init_factor is not None and row.init.std > 0
        folded = (row.gauge / rules[row.role].gauge(*m)) ** float(FOLDS[optimizer.column][0])
        step = healthy[row.role].lr(optimizer.column)(*m) * folded
        pulled = optimizer.column == "sgd"
        decoupled = not pulled and not optimizer.l2
        moves = optimizer.entrywise and (pulled or row.role in ("hidden", "bottleneck", "output", "finite"))
        found[row.name] = Owned(row.role, unit if random else None, step if moves else None, pulled, decoupled)
    return found


def sizes_of_weights(
    parameters: Tensors, known: Mapping[str, Owned], stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, root mean square ``[seeds]``) in the parameter's unit, for the parameters that have one."""
    for name, owner in known.items():
        if owner.unit is not None and name in parameters:
            yield name, _per_seed(parameters[name].detach().square(), stacked).sqrt() / owner.unit


def sizes_of_pulls(
    parameters: Tensors, first: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer, stacked: bool
) -> Tensors:
    """Return name → factor on the learning rate in the optimizer's first step, for the entry that moved most ``[seeds]``.

    For SGD it is the largest |gradient + weight decay · W|. For Adam-like optimizers it is |g| / (|g| + epsilon) of the largest
    gradient, or 1 without an epsilon. It is 0 without a gradient. Parameters whose step is not measured are left out.

    Args:
        parameters: the parameters, with the gradients of the first step.
        first: the parameters before that step.
        known: parameter → role and units.
        optimizer: the optimizer that took the step; its groups hold the settings.
        stacked: whether the first axis runs over seeds.
    """
    groups, found = _groups(optimizer), {}
    for name, start in first.items():
        parameter = parameters.get(name)
        if parameter is None or name not in known or known[name].step is None or parameter.grad is None:
            continue
        # A sparse gradient has no entries for embedding rows without a token.
        gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        group = groups.get(id(parameter), {})
        eps = group.get("eps")
        if known[name].pulled:
            decay = float(group.get("weight_decay", 0.0) or group.get("lambd", 0.0))
            found[name] = _largest(gradient.add(start.to(gradient.device), alpha=decay) if decay else gradient, stacked)
        elif isinstance(eps, float) and eps > 0:
            # RMSprop's running average starts at (1 - alpha) g², without bias correction.
            largest = _largest(gradient, stacked) * math.sqrt(1 - float(group.get("alpha", 0.0)))
            found[name] = largest / (largest + eps)
        else:
            found[name] = (_largest(gradient, stacked) > 0).to(gradient.dtype)
    return found


def sizes_of_steps(
    parameters: Tensors,
    first: Tensors,
    pulls: Tensors,
    shrunk: Mapping[str, float],
    known: Mapping[str, Owned],
    stacked: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, learning rate implied by ΔW ``[seeds]``) in the unit of the parameter's step, for parameters that have one.

    The implied rate is the largest |ΔW|, divided by the factor for that entry from `sizes_of_pulls`. The largest entry is used
    because entries without a gradient do not move, and their number depends on seed and width. A step that hardly exceeds the
    last digit of the parameter's largest entry (bfloat16, tiny steps of a gain of 1) implies no rate and is left out.

    Args:
        parameters: the current parameters.
        first: the initial parameters.
        pulls: result of `sizes_of_pulls` for the first step; empty after later steps.
        shrunk: name → fraction of the initial value that decoupled weight decay has left (`shrink`); decay is not part of ΔW
            here.
        known: parameter → role and units.
        stacked: whether the first axis runs over seeds.
    """
    followed = [pull.cpu() for name, pull in pulls.items() if known[name].pulled]
    typical = torch.stack(followed).median(0).values if followed else None
    for name, start in first.items():
        if name not in known or name not in parameters or (unit := known[name].step) is None:
            continue
        now = parameters[name].detach()
        if known[name].pulled and (
            typical is None or name not in pulls or not (pulls[name].cpu() > ROUNDING * typical).any()
        ):
            continue
        start = start.to(now.device)
        largest = _largest(now - shrunk.get(name, 1.0) * start, stacked)
        rounded = torch.finfo(now.dtype).eps * _largest(start, stacked) > COARSE * largest
        if (rounded & (pulls[name] > 0 if name in pulls else largest > 0)).any():
            continue
        if name in pulls:
            # Without a gradient there is no step, and so no implied rate.
            pull = pulls[name]
            largest = torch.where(pull > 0, largest / pull, torch.zeros_like(pull))
        yield name, largest / unit


def shrink(
    shrunk: dict[str, float], parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer
) -> None:
    """Multiply the entries of ``shrunk`` by 1 - lr · weight decay, which decoupled weight decay leaves in the next step."""
    groups = _groups(optimizer)
    for name, owner in known.items():
        if name in parameters and owner.decoupled:
            group = groups.get(id(parameters[name]), {})
            taken = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0))
            shrunk[name] = shrunk.get(name, 1.0) * (1 - taken)


def sizes_of_gradients(
    parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer, stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, mean |gradient| / epsilon ``[seeds]``) for the parameters whose group has an epsilon."""
    groups = _groups(optimizer)
    for name, parameter in parameters.items():
        eps = groups.get(id(parameter), {}).get("eps")
        if name in known and parameter.grad is not None and isinstance(eps, float) and eps > 0:
            yield name, _per_seed(parameter.grad.abs(), stacked) / eps


def decays(
    parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, float]]:
    """Yield (name, lr · weight decay) for the parameters that decay, with the current settings of their group."""
    groups = _groups(optimizer)
    for name, parameter in parameters.items():
        group = groups.get(id(parameter), {})
        taken = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0) or group.get("lambd", 0.0))
        if name in known and taken > 0:
            yield name, taken


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def _per_seed(values: torch.Tensor, stacked: bool) -> torch.Tensor:
    if stacked:
        return values.flatten(1).mean(1) if values.dim() > 1 else values
    mean = values.mean()
    return (mean.full_tensor() if hasattr(mean, "full_tensor") else mean)[None]  # over all shards


def _largest(values: torch.Tensor, stacked: bool) -> torch.Tensor:
    if not values.numel():
        return values.new_zeros(len(values) if stacked else 1)
    return values.abs().reshape(len(values) if stacked else 1, -1).amax(1)
