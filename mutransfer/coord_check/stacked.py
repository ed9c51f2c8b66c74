"""Models of equal shape, one per seed, trained together as one program.

Parameters are stacked along a first axis and the forward pass runs once under `torch.vmap`, so that the many small operations of
a narrow model are launched once for all seeds. An elementwise optimizer then steps the stacked parameters without modification.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import functional_call, stack_module_state

from ..devices import devices_of, is_out_of_memory, seeded_generators
from ..family import Family
from .measure import Inputs, Pass, Tensors, Watched, watch

__all__ = ["StackedModels", "stacked_models"]

# Above this many parameters a single matrix product keeps a core busy: no gain from stacking (docs/explanation/benchmarks.md).
MOST_STACKED = 400_000


class _Loss(torch.nn.Module):
    """A module whose output is the loss, so that `functional_call` can replace the model's parameters."""

    def __init__(self, family: Family, model: torch.nn.Module, batch: Any) -> None:
        super().__init__()
        self.family, self.model, self.batch = family, model, batch

    def forward(self) -> torch.Tensor:
        return self.family.loss(self.model, self.batch)


class StackedModels:
    """The models of several seeds, and one optimizer for all of them.

    Args:
        family: the family whose loss is minimized on its example batch.
        models: initialized models, one per seed; several are stacked and use the structure of the first.
        make_optimizer: model → its optimizer; its groups are applied to the stacked parameters.
        batch: the family's example batch, on the models' device.
    """

    def __init__(
        self,
        family: Family,
        models: Sequence[torch.nn.Module],
        make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
        batch: Any,
    ) -> None:
        self.family, self.model, self.size, self.batch = family, models[0], len(models), batch
        # Wrapped, because `stack_module_state` compares classes, and a builder may define its model's class anew for each.
        programs = [_Loss(family, each, batch) for each in models]
        self.program = programs[0]
        originals = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.model)
        if self.size == 1:
            self.parameters: Tensors = dict(originals)
            self.buffers: Tensors = {}
        else:
            self.parameters, self.buffers = (
                {name.removeprefix("model."): each for name, each in stacks.items()}
                for stacks in stack_module_state(programs)
            )
            self._replace_parameters({id(each): self.parameters[name] for name, each in originals.items()})

    def forward(self, watched: Watched, start: Pass | None, first: Tensors | None) -> tuple[torch.Tensor, Pass]:
        """Return the losses ``[seeds]`` and the measurements of the pass, each size with shape ``[seeds]``.

        Raises:
            RequestError: the model or its loss raised an exception, and there is only one seed.
        """

        def observed(
            parameters: Tensors, buffers: Tensors, before: tuple[Tensors, Inputs], first: Tensors | None
        ) -> Any:
            with watch(self.model, watched, start and Pass({}, *before), first) as seen:
                if self.size == 1:
                    loss = self.family.loss_on(self.model, self.batch)
                else:
                    state = {f"model.{name}": each for name, each in {**parameters, **buffers}.items()}
                    loss = functional_call(self.program, state, ())
            return loss, seen.sizes, seen.outputs, seen.inputs

        # Use the same dropout masks in every pass, so that changes come from the weights alone.
        with seeded_generators(0, devices_of(self.parameters.values())):
            before: tuple[Tensors, Inputs] = (start.outputs, start.inputs) if start else ({}, {})
            if self.size == 1:
                loss, sizes, *ends = observed({}, {}, before, first)
                return loss[None], Pass({key: each[None] for key, each in sizes.items()}, *ends)
            axes = (0, 0, 0, None if first is None else 0)
            run = torch.vmap(observed, in_dims=axes, randomness="different")
            with warnings.catch_warnings():
                # An operation without a batching rule runs seed by seed, which is slower but equally correct.
                warnings.filterwarnings("ignore", "There is a performance drop")
                loss, *seen = run(self.parameters, self.buffers, before, first)
            return loss, Pass(*seen)

    def backward(self, losses: torch.Tensor) -> None:
        """Compute the gradients of each seed's loss."""
        self.optimizer.zero_grad()
        losses.sum().backward()

    def _replace_parameters(self, stacks: dict[int, torch.Tensor]) -> None:
        for group in self.optimizer.param_groups:
            group["params"] = [stacks[id(each)] for each in group["params"]]


def stacked_models(
    family: Family,
    build: Callable[[int], torch.nn.Module],
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
    seeds: Sequence[int],
    batch: Any,
    stacked: bool,
) -> list[Callable[[], tuple[list[int], StackedModels]]]:
    """Return functions that each build a stack of models: one for all seeds if possible and worthwhile, else one per seed.

    Each function returns the seeds of its stack and the `StackedModels`.

    Args:
        family: see `StackedModels`.
        build: seed → initialized model.
        make_optimizer: see `StackedModels`.
        seeds: seeds of the initial weights.
        batch: see `StackedModels`.
        stacked: whether the optimizer is elementwise; those that operate on whole matrices (Muon, Adafactor) are not.
    """

    def one(seed: int) -> Callable[[], tuple[list[int], StackedModels]]:
        return lambda: ([seed], StackedModels(family, [build(seed)], make_optimizer, batch))

    separate = [one(seed) for seed in seeds]
    if not stacked or len(seeds) < 2:
        return separate
    model = build(seeds[0])
    if sum(each.numel() for each in model.parameters()) > MOST_STACKED or make_optimizer(model).state:
        return separate  # some optimizers (Adagrad) create their state before the first step
    stack = StackedModels(family, [model, *map(build, seeds[1:])], make_optimizer, batch)
    if not _runs_under_vmap(stack):
        return separate
    return [lambda: (list(seeds), stack)]


def _runs_under_vmap(stack: StackedModels) -> bool:
    """Return whether the model runs under vmap, which does not support value-dependent control flow and some operations."""
    kept = {name: each.clone() for name, each in stack.buffers.items()}
    try:
        losses, _ = stack.forward(Watched({}, {}), None, None)
        if losses.shape != (stack.size,) or not losses.requires_grad:
            return False
        torch.autograd.grad(losses.sum(), [p for p in stack.parameters.values() if p.requires_grad], allow_unused=True)
    except Exception as error:  # if the model itself is at fault, it is raised again when the seeds run one by one
        if is_out_of_memory(error):
            raise
        return False
    finally:
        for name, each in kept.items():
            stack.buffers[name].copy_(each)
    return True
