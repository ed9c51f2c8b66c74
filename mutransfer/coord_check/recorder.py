"""Recorder for any training loop: returns the same frame as `record`, for a run that is driven by other code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import pandas as pd
import torch

from ..devices import devices_of, seeded_generators
from ..errors import RequestError, nearest
from ..optimizers.rules import OPTIMIZERS
from ..param_names import plain_name
from ..planning.plan import Plan, matched
from ..schemas import COORDINATES
from .measure import (
    ROOT,
    Owned,
    Pass,
    Tensors,
    Watched,
    decays,
    module_roles,
    naming,
    owned,
    places,
    shrink,
    sizes_of_gradients,
    sizes_of_pulls,
    sizes_of_steps,
    sizes_of_weights,
    units,
    watch,
)
from .recording import OWN, divisors

__all__ = ["Recorder"]


class Recorder:
    """Record how large a model's outputs, updates, gradients and weights are (mean |x|) while a loop trains it.

    ::

        with Recorder(model, optimizer, probe=lambda m: m(tokens), plan=plan, seed=0) as recorder:
            train(model, optimizer)  # any loop
        frames.append(recorder.frame())  # of this width; `verdict(pd.concat(frames))` judges several

    The recorder uses the optimizer's step hooks. A probe is a forward pass without gradients that restores buffers and random
    number generators, so training is bitwise unchanged.

    Args:
        model: the model, with any wrapper.
        optimizer: the optimizer that trains it.
        probe: runs ``model`` on a fixed batch; its return value is ignored.
        plan: the model's plan, which provides the roles, width and depth.
        width: width of the model, if there is no plan.
        depth: depth of the model, if there is no plan.
        seed: seed of the initial weights.
        steps: optimizer steps after which to probe, in addition to the start; by default 1, 2, 4, 8 and so on.
        outputs: names or patterns of the modules whose outputs are logits, if there is no plan; by default the module
            with parameters that runs last.
        name: the optimizer's name in `OPTIMIZERS`, if it cannot be derived from the class.

    Raises:
        RequestError: neither a plan nor a width is given, it is not known whether the optimizer scales like Adam or SGD, or
            the plan is for another model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        probe: Callable[[torch.nn.Module], Any],
        *,
        plan: Plan | None = None,
        width: int | None = None,
        depth: int = 1,
        seed: int = 0,
        steps: Collection[int] | None = None,
        outputs: Collection[str] = (),
        name: str | None = None,
    ) -> None:
        if plan is None and width is None:
            raise RequestError("a recorder needs the model's size to compare it with others: pass plan=…, or width=….")
        name = name or (plan.optimizer if plan else type(optimizer).__name__.lower())
        if name not in OPTIMIZERS:
            raise RequestError(
                f"it is not known whether {name!r} steps like Adam or like SGD: pass name=…; {nearest(name, OPTIMIZERS)}"
            )
        self.model = getattr(model, "_orig_mod", model)  # a compiled forward pass runs no hooks
        self.optimizer, self.probe, self.plan, self.steps, self.outputs = optimizer, probe, plan, steps, outputs
        self.step = 0
        scale = (plan.scale.width, plan.scale.depth) if plan else (width, depth)
        self.common = {"parametrization": plan.parametrization if plan else OWN, "optimizer": name, "seed": seed}
        self.common |= dict(zip(("width", "depth"), scale, strict=True))
        self.parameters: Tensors = (
            dict(matched(plan, self.model))
            if plan
            else {plain_name(each): parameter for each, parameter in _trainable(self.model).items()}
        )
        self.known = owned(plan) if plan else {each: Owned("feature", None) for each in self.parameters}
        self._divisors = divisors(plan, {}) if plan else {}
        self._start: Pass | None = None
        self._first: Tensors = {}
        self._known_first: Tensors = {}  # the same tensors by the plan's names
        self._pulls: Tensors = {}
        self._shrunk: dict[str, float] = {}
        self._watched = Watched({}, {})
        self._rows: list[dict[str, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._start, self._first, self._known_first = [], None, {}, {}

    def frame(self) -> pd.DataFrame:
        """Return what was recorded (schema COORDINATES).

        Raises:
            RequestError: the optimizer has not taken a step inside the context.
        """
        if not self._rows:
            raise RequestError(
                "nothing was recorded: train inside `with recorder:`, with the optimizer that was passed to it."
            )
        return COORDINATES.frame([row | self.common for row in self._rows])

    def _due(self, step: int) -> bool:
        return step & (step - 1) == 0 if self.steps is None else step in self.steps

    # The start is measured just before the first step, when the model is in the mode (train or eval) that it is trained in.
    def _before_step(self, *_: Any) -> None:
        if self.step == 0:
            self._watched = self._survey()
            wanted = {name for unit in self._watched.units.values() for name in unit.first.values()}
            # Kept in CPU memory; a module's tensors are moved to its device while its updates are measured.
            self._first = {
                name: each.detach().to("cpu", copy=True)
                for name, each in _trainable(self.model).items()
                if name in wanted
            }
            names = {id(each): name for name, each in self.parameters.items()}
            every = _trainable(self.model)
            self._known_first = {
                names[id(every[name])]: start for name, start in self._first.items() if id(every[name]) in names
            }
            self._measure()
            for name, taken in decays(self.parameters, self.known, self.optimizer):
                self._add_row(name, self.known[name].role, "decay", taken)
        shrink(self._shrunk, self.parameters, self.known, self.optimizer)

    def _after_step(self, *_: Any) -> None:
        # Read gradients after the step, because a closure computes them during it.
        first = self.step == 0
        self._pulls = (
            sizes_of_pulls(self.parameters, self._known_first, self.known, self.optimizer, False) if first else {}
        )
        if first or self._due(self.step + 1):
            for name, value in sizes_of_gradients(self.parameters, self.known, self.optimizer, False):
                self._add_row(name, self.known[name].role, "gradient", value)
        self.step += 1
        if self._due(self.step):
            self._measure()

    def _measure(self) -> None:
        first = self._first if self._start is not None else None
        with self._state_restored(), watch(self.model, self._watched, self._start, first) as seen:
            self.probe(self.model)
        updates = {
            name: (module, role) for module, unit in self._watched.units.items() for name, role in unit.updates.values()
        }
        for (name, statistic), value in seen.sizes.items():
            if statistic == "update":
                module, role = updates[name]
                folded = self._divisors.get(module, 1.0) if role != "output" else 1.0
                self._add_row(name, role, statistic, value / folded)
                continue
            role = self._watched.roles.get(name, "stream")
            folded = self._divisors.get(name, 1.0) if role != "output" and statistic != "input" else 1.0
            self._add_row(self._watched.shown[name], role, statistic, value / folded)
        for name, value in sizes_of_weights(self.parameters, self.known, False):
            self._add_row(name, self.known[name].role, "weight", value)
        moved, names = (self._known_first if first else {}), self._watched.recorded_names()
        for name, value in sizes_of_steps(self.parameters, moved, self._pulls, self._shrunk, self.known, False):
            for recorded in names.get(name, ()):
                self._add_row(recorded, self.known[name].role, "step", value)
        self._start = self._start or seen

    def _add_row(self, name: str, role: str, statistic: str, value: torch.Tensor | float) -> None:
        row = {"module": name, "role": role, "statistic": statistic, "step": self.step, "value": float(value)}
        self._rows.append(row)

    def _survey(self) -> Watched:
        """Return the modules to measure, which are all that own parameters, and mark those whose outputs are logits."""
        roles = module_roles(self.model, self.plan) if self.plan else dict.fromkeys(_owners(self.model), "feature")
        called = naming(self.model, self.known)
        watched = Watched(places(self.model, set(roles), None, called), roles)
        with self._state_restored(), watch(self.model, watched, None, None, survey=self.plan is not None) as seen:
            self.probe(self.model)
        if self.plan is None:
            ran = list(seen.outputs)
            chosen = [name for name in ran if any(fnmatchcase(name, each) for each in self.outputs)]
            if self.outputs and not chosen:
                raise RequestError(
                    f"no module that ran matches {', '.join(self.outputs)}: choose from {', '.join(ran)}."
                )
            # The output of the whole model comes last and consists of the logits as well.
            last = [name for name in ran if name][-1:]
            roles |= dict.fromkeys(chosen or [*last, *(name for name in ran if not name)], "output")
        known = {name: owner.role for name, owner in self.known.items()}
        measured = units(self.model, seen.ran, roles, known)
        sharded = {
            name
            for name in measured
            if any(hasattr(p, "placements") for p in self.model.get_submodule(name).parameters())
        }
        whole = {name: each for name, each in measured.items() if name not in sharded}
        return Watched({name: called(name) or ROOT for name in whole} | dict(watched.shown), roles, whole)

    @contextmanager
    def _state_restored(self) -> Iterator[None]:
        """Restore buffers and random number generators on exit."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            with (
                torch.no_grad(),
                seeded_generators(0, devices_of(self.parameters.values())),
            ):  # the same dropout masks in every probe
                yield
        finally:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])


def _trainable(model: torch.nn.Module) -> Tensors:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _owners(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
