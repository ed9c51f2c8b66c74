"""K vectorized trainings of equal shape, each equivalent to a separate `Training`, and whether a model allows this."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mutransfer._torch_internals import tree_map
from mutransfer.devices import devices_of, float32_products, is_out_of_memory, seeded_generators, uploaded
from mutransfer.errors import describe
from mutransfer.family import Family, unwrapped
from mutransfer.initialization.init import draw_
from mutransfer.methods import ForwardGradient, Pruned
from mutransfer.planning.multipliers import drawn_mask
from mutransfer.planning.plan import ParameterPlan, Plan, matched
from mutransfer.proxies.data import Data
from mutransfer.proxies.training import FINITE_EVERY, Training, multiplier
from mutransfer.recipe import Scale

from ..jobs import RunContext
from .compile import Graphed, Step, compiled, graphed
from .step import MASK, Moving, Stack, Tensors, TrainingStep, grouped, losses_of, moving_parts
from .updates import FUSED, OptimSettings, blank_state, kind_of, numbers_at, settings_of

__all__ = ["NOT_FOR_ONE", "Precision", "Slot", "Snapshot", "VectorizedTraining", "refusal"]

Snapshot = dict[str, Any]
Precision = Literal["float32", "tf32", "bfloat16"]

# Tolerance between a compiled and an uncompiled first step; with bfloat16, as in Muon, values are rounded at other places.
FINE, ROUGH = 1e-3, 5e-2
BATCHES = 256  # cached batches on the device: trials with the same seed use the same batches a few steps apart
AHEAD = 32  # steps whose optimizer numbers are computed at once
NOT_FOR_ONE = "there is not enough memory for one trial: lower batch_size or the proxy's width in the experiment."


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
        precision: precision of matrix products: "float32", "tf32" (on a GPU), or "bfloat16" under `torch.autocast`.
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
        precision: Precision = "float32", clips: bool = True, compile: bool = False,
        known: dict[str, Step | None] | None = None, snapshots: Sequence[Snapshot | None] = (),
    ) -> None:  # fmt: skip
        self.family, self.data, self.steps, self.batch_size, self.device = family, data, steps, batch_size, device
        self.slots, self.precision = list(slots), precision
        first = slots[
            0
        ].plan.dense()  # gradients are masked instead of weights, so that each training may have its own mask
        model = unwrapped(family.built(first.scale, device))
        first.attach(model)
        # Without a reference to this object, whose memory would then be freed by garbage collection only.
        self._batch = functools.lru_cache(maxsize=BATCHES)(
            lambda step, seed: uploaded(data.batch(step, batch_size, seed), device)
        )
        self._held_out = uploaded(data.validation(), device)
        trained, moving, readers = moving_parts(family, model, self._batch(0, slots[0].seed))
        parameters = dict(model.named_parameters())
        names = {id(each): name for name, each in parameters.items()}
        # The model's own name of each planned parameter.
        self._names = {name: names[id(each)] for name, each in matched(first, model).items()}
        kinds = {self._names[row.name]: kind_of(first, row, device) for row in first.rows}
        self.groups = grouped({name: each for name, each in parameters.items() if name in trained}, kinds, readers)
        self.stack = Stack(family, model, len(slots), self.groups, moving)
        if isinstance(first.recipe.method, Pruned):
            hidden = {self._names[row.name] for row in first.rows if row.role == "hidden" and len(row.shape) > 1}
            for name, group in self.groups.items():
                if not hidden.isdisjoint(group.names):
                    self.stack.resting[MASK + name] = torch.ones_like(self.stack.trained[name], dtype=torch.bool)
        states = {name: blank_state(group.kind, self.stack.trained[name]) for name, group in self.groups.items()}
        self.now = Moving(self.stack.trained, self.stack.buffers, states)
        # Where the settings of each parameter are: the kind of its update, and its column.
        self._columns = {
            name: (group.kind.name, group.start + index)
            for group in self.groups.values()
            for index, name in enumerate(group.names)
        }
        self.settings: dict[str, OptimSettings] = {}
        for row in first.rows:
            if (place := self._columns.get(self._names[row.name])) is not None:
                width = sum(kind == place[0] for kind, _ in self._columns.values())
                columns = {key: self._float64(len(slots), width) for key in settings_of(first, row)}
                self.settings.setdefault(place[0], columns)
        self.limit = self._float64(len(slots)).fill_(math.inf)
        # The type in which numbers of the optimizer are used: float64 only for models in float64.
        self._dtype = max((each.dtype for each in self.now.trained.values()), key=lambda each: each.itemsize)
        self._compile, self._known = compile, {} if known is None else known
        self._graphs = device.startswith("cuda")
        rough = precision != "float32" or any(group.kind.name == "muon" for group in self.groups.values())
        self._tolerance = ROUGH if rough else FINE
        self.step: Step
        self._narrow = torch.bfloat16 if precision == "bfloat16" else None
        self._use(TrainingStep(self.stack, clips, self._narrow))
        saved = snapshots or [None] * len(slots)
        for index, (slot, snapshot) in enumerate(zip(self.slots, saved, strict=True)):
            if snapshot is not None:
                self._restore(index, slot, snapshot)
            self._set(index, slot)
        self._initialize([index for index, snapshot in enumerate(saved) if snapshot is None])

    def begin(self, index: int, slot: Slot, snapshot: Snapshot | None = None) -> None:
        """Start a training in a slot, or continue one from its ``snapshot``, replacing the slot's previous content."""
        self.slots[index] = slot
        if snapshot is None:
            self._initialize([index])
        else:
            self._restore(index, slot, snapshot)
        self._set(index, slot)

    @torch.no_grad()
    def _restore(self, index: int, slot: Slot, snapshot: Snapshot) -> None:
        everything = (self.now.trained, self.stack.resting, self.now.buffers, self.now.states)
        tree_map(lambda stack, saved: stack[index].copy_(saved), everything, tuple(snapshot["tensors"]))
        slot.step = snapshot["step"]

    @torch.no_grad()
    def _initialize(self, indices: Sequence[int]) -> None:
        """Draw the weights of the trainings at ``indices`` as `Plan.initialize` does, and reset their buffers and states.

        No model is built: what the plan does not draw is as in the one that provides the structure. Weights for a GPU are drawn
        on the CPU, and copied once for all trainings.
        """
        if not indices:
            return
        rows = [{self._names[row.name]: row for row in self.slots[index].plan.rows} for index in indices]
        given = {**dict(self.stack.model.named_parameters()), **dict(self.stack.model.named_buffers())}
        names = {first: group.names for first, group in self.groups.items()}
        for first, stack in {**self.now.trained, **self.stack.resting}.items():
            if first.startswith(MASK):
                continue
            if first not in rows[0]:  # frozen
                stack[list(indices)] = given[first].detach()
                continue
            direct = stack.device.type == "cpu"
            region = stack if direct else torch.empty((len(indices), *stack.shape[1:]), dtype=stack.dtype)
            drawn: dict[Any, Tensor] = {}
            for place, (index, own) in enumerate(zip(indices, rows, strict=True)):
                whole = region[index if direct else place]
                parts = whole.unbind() if first in names else (whole,)
                for name, each in zip(names.get(first, (first,)), parts, strict=True):
                    seed, row = self.slots[index].seed, own[name]
                    if (before := drawn.get((name, seed, row.init))) is not None:
                        each.copy_(before)
                    else:
                        draw_(each, row.init, seed, row.name)
                        drawn[name, seed, row.init] = each
            if not direct:
                stack[list(indices)] = uploaded(region, self.device)
        self._prune(indices, rows)
        for name, stack in self.now.buffers.items():
            stack[list(indices)] = given[name]
        for state in self.now.states.values():
            for each in state:
                each[list(indices)] = 0

    def _prune(self, indices: Sequence[int], rows: Sequence[Mapping[str, ParameterPlan]]) -> None:
        """Draw the masks of the trainings at ``indices`` as `Plan.initialize` does; ``rows`` are their planned parameters."""
        for first, group in self.groups.items():
            if (masks := self.stack.resting.get(MASK + first)) is None:
                continue
            for index, own in zip(indices, rows, strict=True):
                for place, row in enumerate(own[name] for name in group.names):
                    drawn = (
                        None
                        if row.density == 1
                        else drawn_mask(row.shape, row.density, self.slots[index].seed, row.name)
                    )
                    masks[index, place] = True if drawn is None else uploaded(drawn.bool(), self.device)
                self.now.trained[first][index] *= masks[index]

    @torch.no_grad()
    def _set(self, index: int, slot: Slot) -> None:
        """Set the optimizer settings of a training."""
        places = {row.name: self._columns.get(self._names[row.name]) for row in slot.plan.rows}
        rows = {places[row.name]: settings_of(slot.plan, row) for row in slot.plan.rows if places[row.name]}
        for kind, settings in self.settings.items():
            for key, column in settings.items():
                values = [rows[kind, place][key] for place in range(column.shape[1])]
                column[index] = torch.tensor(values, dtype=torch.float64)
        clip = slot.plan.recipe.clip
        self.limit[index] = math.inf if clip is None else clip
        if clip is not None and not self._uncompiled.clips:
            self._use(TrainingStep(self.stack, True, self._narrow))

    def snapshots(self, indices: Sequence[int], *, last: bool = False) -> list[Snapshot]:
        """Return the states of the trainings at ``indices``, except plans and seeds, on the CPU; `begin` continues from one.

        Every stack is copied from a GPU as a whole.

        Args:
            indices: indices of the trainings.
            last: this object is not used afterwards, so the snapshots are views of its tensors instead of copies.
        """
        everything = (self.now.trained, self.stack.resting, self.now.buffers, self.now.states)
        if not indices or not self.device.startswith("cuda"):
            copied = everything
        else:
            copied = tree_map(lambda stack: stack.to("cpu", non_blocking=True), everything)
            torch.cuda.synchronize(self.device)
        own = lambda index: list(tree_map(lambda stack: stack[index] if last else stack[index].clone(), copied))  # noqa: E731
        return [{"step": self.slots[index].step, "tensors": own(index)} for index in indices]

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only the trainings at ``indices``, in this order."""
        chosen = uploaded(torch.tensor(list(indices)), self.device)
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
                if step % AHEAD == 0:
                    numbers = self._numbers(begun, range(step, min(step + AHEAD, count)))
                losses.append(self._stepped(begun, step, {k: each[step % AHEAD] for k, each in numbers.items()}))
        finally:  # also after a step that failed, such as for lack of memory
            if losses:
                self._note(begun, torch.stack(losses, 1).tolist())

    def inputs(self) -> tuple[Any, ...]:
        """Return the arguments of ``step`` for the next step of all trainings, those of `TrainingStep`."""
        begun = [slot.step for slot in self.slots]
        numbers = {kind: each[0] for kind, each in self._numbers(begun, range(1)).items()}
        return self._inputs(begun, 0, numbers)

    def _inputs(self, begun: list[int], step: int, numbers: Tensors) -> tuple[Any, ...]:
        gauges = {kind: each["gauge"] for kind, each in self.settings.items()}
        return self.now, self.stack.resting, numbers, gauges, self.limit, self._batches(begun, step)

    def _stepped(self, begun: list[int], step: int, numbers: Tensors) -> Tensor:
        with float32_products(self.device, self.precision == "tf32"):
            return self._step_on(self._inputs(begun, step, numbers))

    def _step_on(self, inputs: tuple[Any, ...]) -> Tensor:
        if self.compiles and self.step is self._uncompiled:
            self.step = self._compiled(f"step, clips: {self._uncompiled.clips}", self.step, inputs)
            self._compile = self.step is not self._uncompiled
        if self._graphs and not isinstance(self.step, Graphed):
            replayed = graphed(self.step, inputs, self._tolerance)
            self.step, self._graphs = replayed or self.step, replayed is not None
        # On a CPU without memory for Muon's iteration, an update in place would stop halfway.
        in_place = self.device == "cpu" and self.step is self._uncompiled and "muon" not in self.settings
        losses, self.now = (self._writing if in_place else self.step)(*inputs)
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
        chosen = uploaded(torch.tensor(list(indices)), self.device)
        whole = list(indices) == list(range(len(self.slots)))
        pick = lambda part: {name: each if whole else each[chosen] for name, each in part.items()}  # noqa: E731
        tensors = {**pick(self.stack.resting), **self.stack.parameters(pick(self.now.trained))}
        buffers = pick(self.now.buffers)
        sizes = [len(targets) for _, targets in self._held_out]
        judge: Step = self._judge
        # Do not compile for validation at the start: trials that end at different times would never use the program again.
        known = "validation" in self._known or self.slots[0].step > 0
        if whole and self.compiles and known and len(set(sizes)) == 1:
            example = self._for_each(self._held_out[0], len(chosen))
            judge = self._compiled("validation", judge, (tensors, buffers, example))
        with float32_products(self.device, self.precision == "tf32"):
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

    @property
    def is_fixed(self) -> bool:
        """Whether the step is compiled or captured for this number of trainings, or will be: another number costs that again."""
        return self._compile or self._graphs or isinstance(self.step, Graphed)

    def _use(self, program: TrainingStep) -> None:
        self.step, self._writing = program, program.writing()
        self._uncompiled = program

    def _compiled(self, name: str, step: Step, inputs: tuple[Any, ...]) -> Step:
        """Return the compiled step, or ``step`` itself if it cannot be compiled."""
        if name not in self._known:
            self._known[name] = compiled(step, inputs, self._tolerance)
        return self._known[name] or step

    def _judge(self, tensors: Tensors, buffers: Tensors, batch: Any) -> tuple[Tensor, Moving]:
        return losses_of(self.stack, tensors, buffers, batch, self._narrow)[0], Moving({}, {}, {})

    def _for_each(self, batch: Any, count: int) -> Any:
        """Expand one batch to a separate one per model: values read from a shared batch would be compiled in as constants."""
        return tree_map(lambda each: each.expand(count, *each.shape), batch)

    def _numbers(self, begun: list[int], steps: range) -> Tensors:
        """Return the optimizer's numbers for some steps after ``begun``, [steps, N, K, P] for each kind of update.

        One upload and a few operations serve all of them. A training that has ended stays at its last step.
        """
        at = [[min(each + step, self.steps - 1) for each in begun] for step in steps]
        factors = [
            [multiplier(slot.plan.recipe, k, self.steps) for slot, k in zip(self.slots, row, strict=True)] for row in at
        ]
        multipliers, numbers_of_steps = uploaded(torch.tensor([factors, at], dtype=torch.float64), self.device)
        return {
            kind: numbers_at(kind, settings, multipliers, numbers_of_steps + 1).to(self._dtype)
            for kind, settings in self.settings.items()
        }

    def _batches(self, begun: list[int], step: int) -> Any:
        """Return the stacked batches of all trainings; a training that has ended repeats its last batch."""
        at = [min(each + step, self.steps - 1) for each in begun]
        batches = [self._batch(k, slot.seed) for k, slot in zip(at, self.slots, strict=True)]
        return tree_map(lambda *each: torch.stack(each), *batches)

    def _float64(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


STEPS = 3
EXAMPLES = 8
# Relative, of the loss after three steps: rounding is far below this, interaction between trials far above.
TOLERANCE = 1e-3
SEEDS = (0, 1)
SLOWER = (
    1.0,
    2.0**-6,
    2.0**-12,
)  # fractions of the recipe's learning rate, of which the first without divergence is compared


def refusal(context: RunContext, scale: Scale | None = None, device: str = "cpu") -> str | None:
    """Return why trials of the experiment at ``scale`` (default: the proxy's) cannot be fused, or None if they can.

    Two fused trials are compared with two separate ones.

    Raises:
        RequestError: the trials cannot be trained at all.
    """
    experiment = context.experiment
    if experiment.trainer is not None:
        return f"{experiment.trainer} trains them, one at a time"
    if isinstance(experiment.recipe.method, ForwardGradient):
        return "forward gradients are estimated for one trial at a time"
    if experiment.optimizer not in FUSED:
        return f"{experiment.optimizer} has no update of many trials at once ({', '.join(FUSED)} have)"
    scale, asked = scale or experiment.proxy_scale, experiment.model_dump_json(exclude={"trials"})
    with float32_products(device, tf32=False):
        return context.once(("refusal", asked, scale, device), lambda: _tried(context, scale, device))


def _tried(context: RunContext, scale: Scale, device: str) -> str | None:
    experiment = context.experiment
    try:
        for slower in SLOWER:
            recipe = experiment.recipe.with_(lr=experiment.recipe.lr * slower)
            plan = context.plan(scale, experiment.parametrization, recipe)
            apart = _apart(context, plan, device, 0)
            if all(map(math.isfinite, apart)):
                break
        else:
            return (
                f"the model's loss after {STEPS} steps is not finite at any learning rate, so they cannot be compared"
            )
        why = _compared(context, plan, device, apart, STEPS)
        if why is None or _apart(context, plan, device, 1) == apart:
            return why
        # The loss is random, as with dropout, so it is comparable only in evaluation mode.
        return _compared(context, plan, device, _apart(context, plan, device, 0, 0), 0)
    except Exception as error:
        if is_out_of_memory(error):
            return "there is no memory for two of them at once"
        raise


def _compared(context: RunContext, plan: Plan, device: str, apart: list[float], steps: int) -> str | None:
    try:
        together = _together(context, plan, device, steps)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"the model does not run under torch.vmap ({describe(error)})"
    for alone, joint in zip(apart, together, strict=True):
        if not abs(alone - joint) <= TOLERANCE * abs(alone):
            return f"next to another trial, the model's loss after {steps} steps is {joint:.6g} instead of {alone:.6g}"
    return None


def _together(context: RunContext, plan: Plan, device: str, steps: int) -> list[float]:
    slots = [Slot(plan, seed) for seed in SEEDS]
    training = VectorizedTraining(
        context.family, slots, context.required_data, steps=STEPS, batch_size=_size(context), device=device
    )
    training.advance(STEPS)
    if steps < STEPS:
        for index, seed in enumerate(SEEDS):
            training.begin(index, Slot(plan, seed))
    return training.validate(range(len(SEEDS)))


def _apart(context: RunContext, plan: Plan, device: str, draws: int, steps: int = STEPS) -> list[float]:
    losses = []
    for seed in SEEDS:
        training = Training(
            context.family,
            plan,
            context.required_data,
            steps=STEPS,
            batch_size=_size(context),
            seed=seed,
            device=device,
        )
        with seeded_generators(draws, devices_of(training.model.parameters())):
            training.advance(steps)
        losses.append(training.validate())
    return losses


def _size(context: RunContext) -> int:
    return min(context.experiment.batch_size, EXAMPLES)
