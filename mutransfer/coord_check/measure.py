"""What a coordinate check measures: input, output and ΔW·x sizes by forward hooks, and the sizes of parameters and steps.

Sizes are means of |x| (mup's "l1"). Nothing here keeps a tensor alive longer than the caller does, and everything is made of
tensor operations, so that the same pass runs under `torch.vmap` over several seeds.
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

from .._torch_internals import tree_flatten, tree_leaves, tree_unflatten
from ..optimizers.rules import OPTIMIZERS
from ..param_names import plain_name, planned_names
from ..parametrizations.spec import FOLDS
from ..parametrizations.tables import TABLES, table
from ..planning.plan import Plan, as_entered
from ..tracing.dataflow import storage_key

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

    def called(self, parameter: str) -> list[str]:
        """Return the names under which a parameter's updates are recorded: a tied one's are those of the modules that run."""
        return list(
            dict.fromkeys(
                called
                for unit in self.units.values()
                for local, (called, _) in unit.updates.items()
                if unit.owners[local] == parameter
            )
        )


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


COARSE = 0.01  # of a step: where the parameter's last digit is greater, rounding takes part
ROUNDING = 1e-5  # of the median gradient: below, a gradient is none (a key's bias, a bias before a norm)


@dataclass(frozen=True)
class Owned:
    """A parameter's role, and the unit of its size: µP's own initial size there, relative to the base model's.

    The unit is None for constants and structured weights, and for the finite ones, whose size is not scaled. ``step`` is the
    unit of its first step, µP's own learning rate relative to the base model's; None where it is not needed: under optimizers
    that look at whole matrices, and where Adam's step is the update itself, as only the fan-out grows. ``pulled`` says that a
    step is the rate times the gradient (SGD), and not the rate itself (Adam); ``decoupled`` that weight decay is no part of the
    gradient.
    """

    role: str
    unit: float | None
    step: float | None = None
    pulled: bool = False
    decoupled: bool = False


def owned(planned: Plan) -> dict[str, Owned]:
    """Return every planned parameter's role and unit, folded multipliers counted in (TP-V 2203.03466, Table 3)."""
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
    """Yield (name, root mean square ``[seeds]``) in the parameter's unit, of those that have one."""
    for name, owner in known.items():
        if owner.unit is not None and name in parameters:
            yield name, _per_seed(parameters[name].detach().square(), stacked).sqrt() / owner.unit


def sizes_of_pulls(
    parameters: Tensors, first: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer, stacked: bool
) -> Tensors:
    """Return name → what the optimizer multiplied with the rate in its first step, of the entry that moved most ``[seeds]``.

    For SGD it is the largest |gradient + weight decay · W|; for Adam and its like |g| / (|g| + epsilon) of the largest gradient,
    or 1 where there is no epsilon; 0 where there is no gradient. Left out are parameters whose step is not looked at.

    Args:
        parameters: with the gradients of the first step.
        first: the parameters before that step.
        known: what they are.
        optimizer: that took it, whose groups hold the settings.
        stacked: whether a first axis runs over seeds.
    """
    groups, found = _groups(optimizer), {}
    for name, start in first.items():
        parameter = parameters.get(name)
        if parameter is None or name not in known or known[name].step is None or parameter.grad is None:
            continue
        # Rows of an embedding that no token chose have no entry.
        gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        group = groups.get(id(parameter), {})
        eps = group.get("eps")
        if known[name].pulled:
            decay = float(group.get("weight_decay", 0.0) or group.get("lambd", 0.0))
            found[name] = _largest(gradient.add(start.to(gradient.device), alpha=decay) if decay else gradient, stacked)
        elif isinstance(eps, float) and eps > 0:
            # RMSprop's average begins at (1 - alpha) g², and is not corrected for it.
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
    """Yield (name, learning rate that ΔW shows ``[seeds]``) in the unit of the parameter's step, of those that have one.

    It is the largest |ΔW| over the pull on that entry, as `sizes_of_pulls` returns it. The largest, as entries without a gradient
    do not move, and how many these are depends on seed and width. Where a step is hardly more than the last digit of the
    parameter's largest entry (bfloat16, tiny steps of a gain of 1), it shows no rate and is left out.

    Args:
        parameters: as they are now.
        first: as they were at the start.
        pulls: of the first step; empty after later ones.
        shrunk: name → what decoupled weight decay has left of the start (`shrink`), which is no part of ΔW here.
        known: what they are.
        stacked: whether a first axis runs over seeds.
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
            # Without a gradient there is no step, and no rate to be seen.
            pull = pulls[name]
            largest = torch.where(pull > 0, largest / pull, torch.zeros_like(pull))
        yield name, largest / unit


def shrink(
    shrunk: dict[str, float], parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer
) -> None:
    """Note what the decoupled weight decay of the step to come leaves of every parameter: 1 - lr · weight decay."""
    groups = _groups(optimizer)
    for name, owner in known.items():
        if name in parameters and owner.decoupled:
            group = groups.get(id(parameters[name]), {})
            taken = float(group.get("lr", 0.0)) * float(group.get("weight_decay", 0.0))
            shrunk[name] = shrunk.get(name, 1.0) * (1 - taken)


def sizes_of_gradients(
    parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer, stacked: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, mean |gradient| / epsilon ``[seeds]``) of the parameters whose group has an epsilon."""
    groups = _groups(optimizer)
    for name, parameter in parameters.items():
        eps = groups.get(id(parameter), {}).get("eps")
        if name in known and parameter.grad is not None and isinstance(eps, float) and eps > 0:
            yield name, _per_seed(parameter.grad.abs(), stacked) / eps


def decays(
    parameters: Tensors, known: Mapping[str, Owned], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, float]]:
    """Yield (name, lr · weight decay) of the parameters that decay, as their group has it in force."""
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
    return (mean.full_tensor() if hasattr(mean, "full_tensor") else mean)[None]  # of all shards


def _largest(values: torch.Tensor, stacked: bool) -> torch.Tensor:
    if not values.numel():
        return values.new_zeros(len(values) if stacked else 1)
    return values.abs().reshape(len(values) if stacked else 1, -1).amax(1)
