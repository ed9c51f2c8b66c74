"""K vectorized trainings of equal shape, each equivalent to a separate `proxies.training.Training`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mutransfer._torch_internals import tree_map
from mutransfer.family import Family, unwrapped
from mutransfer.planning.plan import Plan
from mutransfer.proxies.data import Data
from mutransfer.proxies.training import FINITE_EVERY, multiplier

from .compile import Graphed, Step, compiled, graphed
from .step import (
    Clock,
    Kind,
    Moving,
    Stack,
    Tensors,
    TrainingStep,
    blank_state,
    kind_of,
    losses_of,
    moving_parts,
    numbers_of,
)

__all__ = ["Slot", "Snapshot", "VectorizedTraining"]

Snapshot = dict[str, Any]

# Tolerance between a compiled and an uncompiled first step; with bfloat16, as in Muon, values are rounded at other places.
FINE, ROUGH = 1e-3, 5e-2
BATCHES = 256  # cached batches: trials with the same seed use the same batches a few steps apart


@dataclass
class Slot:
    """State of one training.

    Attributes:
        plan: plan of the model and its optimizer.
        seed: seed of the initial weights and the batches.
        marks: steps at which the loss is checked, in addition to the regular checks.
        step: number of steps done.
        finite: whether the loss was finite at the last check; the training does not advance once it is not.
    """

    plan: Plan
    seed: int
    marks: frozenset[int] = frozenset()
    step: int = 0
    finite: bool = True


class VectorizedTraining:
    """Trainings that advance together; single ones can be validated, saved, added and removed.

    Args:
        family: the model at any size and its loss.
        slots: one per training, all with the same scale and optimizer.
        data: training and validation batches.
        steps: length of every run, which the schedules cover.
        batch_size: examples per step and training.
        device: where to train.
        precision: precision of matrix products under `torch.autocast`; that of the tensors if None.
        clips: whether any training, including those added later, may clip its gradients.
        compile: compile the step and the validation of all trainings, for this number of trainings. With fewer trainings, or if
            compilation fails (with a warning that gives the reason), they continue uncompiled.
        known: programs already compiled for the same family, scale, data and number of trainings; new ones are added to it.
        snapshots: snapshots of trainings to continue, one for each slot, or None for new trainings.

    Raises:
        RequestError: the model or its loss raised.
    """

    def __init__(
        self, family: Family, slots: Sequence[Slot], data: Data, *, steps: int, batch_size: int, device: str = "cpu",
        precision: torch.dtype | None = None, clips: bool = True, compile: bool = False,
        known: dict[str, Step | None] | None = None, snapshots: Sequence[Snapshot | None] = (),
    ) -> None:  # fmt: skip
        self.family, self.data, self.steps, self.batch_size, self.device = family, data, steps, batch_size, device
        self.slots, self.precision = list(slots), precision
        first = slots[0].plan
        model = unwrapped(family.built(first.scale, device))
        first.attach(model)
        self._batch = functools.lru_cache(maxsize=BATCHES)(lambda step, seed: data.batch(step, batch_size, seed))
        self._held_out = [tree_map(lambda each: each.to(device), batch) for batch in data.validation()]
        trained, moving = moving_parts(family, model, self._to_device(self._batch(0, slots[0].seed)))
        self.stack = Stack(family, model, len(slots), trained, moving)
        self.kinds: dict[str, Kind] = {
            row.name: kind_of(first, row, device) for row in first.rows if row.name in trained
        }
        states = {name: blank_state(kind, self.stack.trained[name]) for name, kind in self.kinds.items()}
        self.now = Moving(self.stack.trained, self.stack.buffers, states)
        self.settings = {
            row.name: {key: self._column(row.shape) for key in numbers_of(first, row)}
            for row in first.rows
            if row.name in trained
        }
        self.limit = torch.full((len(slots),), math.inf, dtype=torch.float64, device=device)
        self._compile, self._known = compile, {} if known is None else known
        self._graphs = device.startswith("cuda")
        rough = precision is not None or any(kind.name == "muon" for kind in self.kinds.values())
        self._tolerance = ROUGH if rough else FINE
        self.step: Step
        self._use(TrainingStep(self.stack, self.kinds, clips, precision))
        for index, slot in enumerate(slots):
            self.begin(index, slot, snapshots[index] if snapshots else None)

    @torch.no_grad()
    def begin(self, index: int, slot: Slot, snapshot: Snapshot | None = None) -> None:
        """Start a training in a slot, or continue one from its ``snapshot``, replacing the slot's previous content."""
        if snapshot is None:
            model = self.family.build(slot.plan.scale).to(self.device)
            slot.plan.attach(model)
            slot.plan.initialize(model, slot.seed)
            self.stack.put(index, model)
            tree_map(lambda stack: stack[index].zero_(), self.now.states)
        else:
            everything = (self.now.trained, self.stack.resting, self.now.buffers, self.now.states)
            tree_map(lambda stack, saved: stack[index].copy_(saved), everything, tuple(snapshot["tensors"]))
            slot.step = snapshot["step"]
        for row in slot.plan.rows:
            for key, value in numbers_of(slot.plan, row).items():
                if row.name in self.settings:
                    self.settings[row.name][key][index] = value
        clip = slot.plan.recipe.clip
        self.limit[index] = math.inf if clip is None else clip
        if clip is not None and not self._uncompiled.clips:
            self._use(TrainingStep(self.stack, self.kinds, True, self.precision))
        self.slots[index] = slot

    def snapshot(self, index: int) -> Snapshot:
        """Return the state of one training except its plan and seed, on the CPU; `begin` continues from it."""
        everything = (self.now.trained, self.stack.resting, self.now.buffers, self.now.states)
        tensors = tree_map(lambda stack: stack[index].to("cpu", copy=True), everything)
        return {"step": self.slots[index].step, "tensors": list(tensors)}

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only the trainings at ``indices``, in this order."""
        chosen = torch.tensor(list(indices), device=self.device)
        everything = (self.now, self.stack.resting, self.settings, self.limit)
        # Assign all at once: if memory runs out, nothing has changed.
        self.now, self.stack.resting, self.settings, self.limit = tree_map(lambda each: each[chosen], everything)
        self.stack.trained, self.stack.buffers = self.now.trained, self.now.buffers
        if len(indices) != len(self.slots):
            self._compile = False
            self._use(self._uncompiled)
        self.slots = [self.slots[index] for index in indices]

    def advance(self, count: int) -> None:
        """Train ``count`` steps, then mark the trainings whose loss was not finite at a step where `Training` checks it."""
        self.stack.model.train()
        begun = [slot.step for slot in self.slots]
        losses: list[Tensor] = []
        try:
            for step in range(count):
                losses.append(self._stepped(begun, step))
        finally:  # also after a step that failed, such as for lack of memory
            if losses:
                self._note(begun, torch.stack(losses, 1).tolist())

    def _stepped(self, begun: list[int], step: int) -> Tensor:
        clock, batch = self._clock(begun, step), self._batches(begun, step)
        inputs = (self.now, self.stack.resting, self.settings, self.limit, clock, batch)
        if self.compiles and self.step is self._uncompiled:
            self.step = self._compiled(f"step, clips: {self._uncompiled.clips}", self.step, inputs)
            self._compile = self.step is not self._uncompiled
        if self._graphs and not isinstance(self.step, Graphed):
            replayed = graphed(self.step, inputs, self._tolerance)
            self.step, self._graphs = replayed or self.step, replayed is not None
        losses, self.now = self.step(*inputs)
        self.stack.trained, self.stack.buffers = self.now.trained, self.now.buffers  # frees the previous tensors
        return losses

    def _note(self, begun: list[int], histories: list[list[float]]) -> None:
        """Advance the slots by the steps done, and mark those as not finite whose separate training would have ended."""
        for slot, before, history in zip(self.slots, begun, histories, strict=True):
            for step, loss in enumerate(history, before + 1):
                if not slot.finite or step > self.steps:
                    break
                slot.step = step
                if step % FINITE_EVERY == 0 or step in slot.marks or step == self.steps:
                    slot.finite = math.isfinite(loss)

    @torch.no_grad()
    def validate(self, indices: Sequence[int]) -> list[float]:
        """Return the mean losses of the trainings at ``indices`` over the held-out batches, in nats; NaN if not finite."""
        self.stack.model.eval()
        chosen = torch.tensor(list(indices), device=self.device)
        whole = len(chosen) == len(self.slots)
        pick = lambda part: {name: each if whole else each[chosen] for name, each in part.items()}  # noqa: E731
        tensors, buffers = pick({**self.stack.resting, **self.now.trained}), pick(self.now.buffers)
        sizes = [len(targets) for _, targets in self._held_out]
        judge: Step = self._judge
        # Do not compile for validation at the start: trials that end at different times would never use the program again.
        known = "validation" in self._known or self.slots[0].step > 0
        if whole and self.compiles and known and len(set(sizes)) == 1:
            example = self._for_each(self._held_out[0], len(chosen))
            judge = self._compiled("validation", judge, (tensors, buffers, example))
        losses = [
            judge(tensors, buffers, self._for_each(batch, len(chosen)))[0] * size
            for batch, size in zip(self._held_out, sizes, strict=True)
        ]
        means = (sum(losses) / sum(sizes)).tolist()
        return [mean if self.slots[index].finite else math.nan for index, mean in zip(indices, means, strict=True)]

    @property
    def compiles(self) -> bool:
        """Whether the step is compiled for this number of trainings, or will be before the next step."""
        return self._compile

    def _use(self, program: TrainingStep) -> None:
        self.step = self._uncompiled = program

    def _compiled(self, name: str, step: Step, inputs: tuple[Any, ...]) -> Step:
        """Return the compiled step, or ``step`` itself if it cannot be compiled."""
        if name not in self._known:
            self._known[name] = compiled(step, inputs, self._tolerance)
        return self._known[name] or step

    def _judge(self, tensors: Tensors, buffers: Tensors, batch: Any) -> tuple[Tensor, Moving]:
        return losses_of(self.stack, tensors, buffers, batch, self.precision)[0], Moving({}, {}, {})

    def _for_each(self, batch: Any, count: int) -> Any:
        """Expand one batch to a separate one per model: values read from a shared batch would be compiled in as constants."""
        return tree_map(lambda each: each.expand(count, *each.shape), batch)

    def _clock(self, begun: list[int], step: int) -> Clock:
        at = [min(each + step, self.steps - 1) for each in begun]
        factors = [multiplier(slot.plan.recipe, k, self.steps) for slot, k in zip(self.slots, at, strict=True)]
        both = torch.tensor([factors, [k + 1 for k in at]], dtype=torch.float64).to(self.device)
        return Clock(both[0], both[1])

    def _batches(self, begun: list[int], step: int) -> Any:
        """Return the stacked batches of all trainings; a training that has ended repeats its last batch."""
        at = [min(each + step, self.steps - 1) for each in begun]
        batches = [self._batch(k, slot.seed) for k, slot in zip(at, self.slots, strict=True)]
        return self._to_device(tree_map(lambda *each: torch.stack(each), *batches))

    def _to_device(self, batch: Any) -> Any:
        return tree_map(lambda each: each.to(self.device, non_blocking=True), batch)

    def _column(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros((len(self.slots), *[1] * len(shape)), dtype=torch.float64, device=self.device)
