"""One short training run with every module's output measured: its size at the start and the size of its change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..family import Family
from ..observing.flows import storage_key
from ..plans import Plan

__all__ = ["module_roles", "one_run", "places"]

ROOT = "(model)"  # what a module without a name, the whole model, is recorded under


def one_run(
    family: Family,
    planned: Plan,
    model: torch.nn.Module,
    scales: dict[str, float],
    shown: dict[str, str],
    steps: int,
    device: str,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Train ``model`` on the family's example batch and yield a row per module and step (`frames.COORDINATES`).

    ``scales`` says by what a module's features are to be divided, ``shown`` under which name they are recorded.
    """
    batch = family.batch_on(device)
    optimizer = planned.make_optimizer(model)
    roles = module_roles(model, planned)
    initial: dict[str, torch.Tensor] = {}
    with _outputs(model, roles, shown) as outputs:
        for step in range(steps + 1):
            loss = family.loss_on(model, batch)
            if step == 0:
                initial = {name: output.clone() for name, output in outputs.items()}
            sizes = outputs if step == 0 else {name: output - initial[name] for name, output in outputs.items()}
            values = torch.stack([size.abs().mean().double() for size in sizes.values()]).tolist()
            for name, value in zip(sizes, values, strict=True):
                yield {
                    "module": shown[name],
                    "role": roles[name],
                    "statistic": "activation" if step == 0 else "change",
                    "step": step,
                    # A feature that carries a folded multiplier (queries, a final norm before a tied readout) is compared as
                    # it is without it; a logit is what it is.
                    "value": value / scales.get(name, 1.0) if roles[name] == "feature" else value,
                }
            if step < steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@contextmanager
def _outputs(model: torch.nn.Module, roles: dict[str, str], shown: dict[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the output of every module in ``shown``, and set the roles that only a forward pass can tell."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[str, torch.Tensor] = {}
    logits: dict[str, torch.Tensor] = {}  # kept, as a freed storage's address would be given to the next tensor

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        name = names[module]
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if not tensors:
            return
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if given and not given[0].is_floating_point() and roles.get(name) == "output" and name:
            roles[name] = "feature"  # a matrix that is embedding and readout is here the embedding
        # What hands a readout's result on is a readout too.
        if any(storage_key(tensors[0]) == storage_key(each) for each in logits.values()):
            roles[name] = "output"
        outputs[name] = tensors[0].detach()
        if roles.setdefault(name, "feature") == "output":
            logits[name] = outputs[name]

    handles = [module.register_forward_hook(keep) for name, module in model.named_modules() if name in shown]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def module_roles(model: torch.nn.Module, planned: Plan) -> dict[str, str]:
    """Return, for every module that owns parameters, whether its output is a "feature" or an "output" (a logit)."""
    roles: dict[str, str] = {}
    planned_roles = {row.name: row.role for row in planned.rows}
    frozen = {name for name, each in model.named_parameters(remove_duplicate=False) if not each.requires_grad}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            continue
        # What makes a parametrized weight hands on the weight, no features: its owner does.
        module = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        # A second name for a tied matrix is the readout's.
        is_output = planned_roles.get(name, "output") == "output"
        # The whole model's output is a logit, also where the model owns a parameter of its own.
        roles[module] = "output" if is_output or not module else roles.get(module, "feature")
    return roles


def places(model: torch.nn.Module, owners: set[str], stacks: dict[str, int] | None) -> dict[str, str]:
    """Return which modules to record, and under which name.

    For a check over widths those that own parameters. For one over depths (``stacks``: name of a stack of layers →
    number of layers) what the first and the last layer of every stack hand on, which is the residual stream, and the
    modules inside of the first layer and of the middle one, under these names. What enters the middle layer has seen half
    of the branches at every even depth; what enters the last one (L−1)/L of them, which alone reads as a slope of +0.2 over
    depths 2 to 32.
    """
    if stacks is None:
        return {name: name or ROOT for name, _ in model.named_modules() if name in owners}
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
