"""Models of equal shape, one per seed, trained side by side as one program.

Parameters are stacked along a first axis and the forward pass runs once under `torch.vmap`, so that a narrow model's many small
operations are launched once for all seeds. An optimizer that works entry by entry then steps the stacks as it stands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import functional_call

from ..family import Family
from .measure import Inputs, Pass, Tensors, Watched, watch

__all__ = ["StackedModels", "stacked_models"]

# Above this many parameters a matrix product keeps a core busy by itself, and stacking gains nothing (docs/benchmarks.md).
MOST_STACKED = 400_000


class _Loss(torch.nn.Module):
    """The loss as a module's output, so that `functional_call` can put other parameters under it."""

    def __init__(self, family: Family, model: torch.nn.Module, batch: Any) -> None:
        super().__init__()
        self.family, self.model, self.batch = family, model, batch

    def forward(self) -> torch.Tensor:
        return self.family.loss(self.model, self.batch)


class StackedModels:
    """The models of some seeds, and the optimizer over all of them.

    Args:
        family: whose loss on its example batch is trained on.
        models: one per seed, initialized; more than one are stacked, and the first lends them its structure.
        make_optimizer: over one model; its groups are taken over for the stacks.
        batch: the family's example batch on the models' device.
    """

    def __init__(
        self,
        family: Family,
        models: Sequence[torch.nn.Module],
        make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
        batch: Any,
    ) -> None:
        self.family, self.model, self.size, self.batch = family, models[0], len(models), batch
        self.program = _Loss(family, self.model, batch)
        own = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.model)
        if self.size == 1:
            self.parameters: Tensors = dict(own)
            self.buffers: Tensors = {}
        else:
            self.parameters = {name: _stacked(models, name).requires_grad_(own[name].requires_grad) for name in own}
            self.buffers = {
                name: torch.stack([_buffer(m, name) for m in models]) for name, _ in self.model.named_buffers()
            }
            self._take_over({id(each): self.parameters[name] for name, each in own.items()})

    def forward(self, watched: Watched, start: Pass | None, first: Tensors | None) -> tuple[torch.Tensor, Pass]:
        """Return the losses ``[seeds]`` and what was seen on the way, every size with the seeds as its one axis.

        Raises:
            RequestError: the model or its loss raised, and there is one seed.
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

        # The same masks in every pass: a change is of the weights, not of the dropout.
        devices = sorted({each.get_device() for each in self.parameters.values() if each.is_cuda})
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            before: tuple[Tensors, Inputs] = (start.outputs, start.inputs) if start else ({}, {})
            if self.size == 1:
                loss, sizes, *ends = observed({}, {}, before, first)
                return loss[None], Pass({key: each[None] for key, each in sizes.items()}, *ends)
            axes = (0, 0, 0, None if first is None else 0)
            run = torch.vmap(observed, in_dims=axes, randomness="different")
            with warnings.catch_warnings():
                # An operation without a batching rule runs seed by seed: slower, and as right.
                warnings.filterwarnings("ignore", "There is a performance drop")
                loss, *seen = run(self.parameters, self.buffers, before, first)
            return loss, Pass(*seen)

    def backward(self, losses: torch.Tensor) -> None:
        """Compute the gradients of each seed's own loss."""
        self.optimizer.zero_grad()
        losses.sum().backward()

    def _take_over(self, stacks: dict[int, torch.Tensor]) -> None:
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
    """Return what makes each stack of models: one for all seeds where that works and pays, else one per seed.

    Args:
        family: see `StackedModels`.
        build: seed → an initialized model.
        make_optimizer: see `StackedModels`.
        seeds: of the initial weights.
        batch: see `StackedModels`.
        stacked: whether the optimizer works entry by entry; one that looks at whole matrices (Muon, Adafactor) does not.
    """

    def one(seed: int) -> Callable[[], tuple[list[int], StackedModels]]:
        return lambda: ([seed], StackedModels(family, [build(seed)], make_optimizer, batch))

    separate = [one(seed) for seed in seeds]
    if not stacked or len(seeds) < 2:
        return separate
    model = build(seeds[0])
    if sum(each.numel() for each in model.parameters()) > MOST_STACKED or make_optimizer(model).state:
        return separate  # some optimizers (Adagrad) make their state before the first step
    stack = StackedModels(family, [model, *map(build, seeds[1:])], make_optimizer, batch)
    if not _works(stack):
        return separate
    return [lambda: (list(seeds), stack)]


def _works(stack: StackedModels) -> bool:
    """Say whether the model runs under vmap: control flow on values, and some operations, do not."""
    kept = {name: each.clone() for name, each in stack.buffers.items()}
    try:
        losses, _ = stack.forward(Watched({}, {}), None, None)
        if losses.shape != (stack.size,) or not losses.requires_grad:
            return False
        torch.autograd.grad(losses.sum(), [p for p in stack.parameters.values() if p.requires_grad], allow_unused=True)
    except Exception:  # whatever it is: where it is the model's own fault, it comes again seed by seed, and is said
        return False
    finally:
        for name, each in kept.items():
            stack.buffers[name].copy_(each)
    return True


def _stacked(models: Sequence[torch.nn.Module], name: str) -> torch.Tensor:
    return torch.stack([model.get_parameter(name).detach() for model in models])


def _buffer(model: torch.nn.Module, name: str) -> torch.Tensor:
    return model.get_buffer(name)
