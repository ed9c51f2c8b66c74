"""Plans: the settings of every parameter of one model, printable before any model is modified.

Most plans fold every forward multiplier into initial weights and optimizer settings. `unit` keeps them in the forward pass
instead, as u-µP does (2407.17465), so that the entries of weights, activations and gradients have a size of about 1 at any
width, as low-precision formats such as float8 require. Both train identically (`parametrizations.spec.FOLDS`), and
`clip_grad_norm_` clips by a norm that is the same for both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from torch import nn
from torch.nn.utils import parametrize

from .._torch_internals import multiply_all_
from ..config import Number, Settings, Whole, exact, read_by
from ..errors import LayerError, RequestError, SettingsError, nearest
from ..family import is_lazy
from ..initialization import Init, draw_
from ..io import read_json, write_json
from ..optimizers.rules import OPTIMIZERS
from ..param_names import plain_name, planned_names
from ..parametrizations.spec import Factors
from ..parametrizations.tables import table
from ..recipe import Recipe, Scale
from ..schemas import PARAMETERS
from . import schedulers
from .laws import averaged
from .multipliers import (
    ColumnBlock,
    ColumnMultiplier,
    Multiplier,
    columns_of,
    drawn_mask,
    masks_of,
    register_mask,
)

__all__ = [
    "ParameterPlan", "Plan", "attach", "clip_grad_norm_", "matched", "parted", "plain_name", "refuse_other_gauge", "unit",
]  # fmt: skip

FORMAT = "mutransfer-plan/1"


@exact
@dataclass(frozen=True)
class ParameterPlan:
    """Initialization and optimizer settings of one parameter; the columns are those of `schemas.PARAMETERS`.

    The ``*_factor`` fields compare with the base model under the same recipe. ``gauge`` is c in
    W = c·W': W is the weight of the plain model, W' that of the paper's model, which multiplies it by c in its forward pass.
    ``multiplier`` is the multiplier that remains in the forward pass (`unit`). ``columns`` are multipliers on single columns of
    the input, for layers whose input joins fixed and growing columns (`attach`). ``density`` is the fraction of the weights that
    are not pruned (`multipliers.Mask`). ``tangent`` is the standard deviation of the tangents of a forward gradient.
    """

    name: str
    shape: tuple[Whole, ...]
    role: str
    m_in: Number
    m_out: Number
    init: Annotated[Init, read_by(Init.from_dict)]
    lr: Number
    weight_decay: Number
    eps: Number | None
    lr_factor: Number
    wd_factor: Number
    eps_factor: Number | None
    init_factor: Number | None
    gauge: Number
    multiplier: Number = 1.0
    columns: tuple[ColumnBlock, ...] = ()
    density: Annotated[Number, Field(gt=0, le=1)] = 1.0
    tangent: Annotated[Number, Field(gt=0)] = 1.0

    def times(self, settings: Factors, factors: Factors | None = None) -> ParameterPlan:
        """Return the parameter with its settings multiplied.

        The ``*_factor`` fields are multiplied by ``factors``, which defaults to ``settings``.
        """
        factors = factors or settings
        return replace(
            self,
            lr=self.lr * settings.lr,
            weight_decay=self.weight_decay * settings.weight_decay,
            eps=None if self.eps is None else self.eps * settings.eps,
            gauge=self.gauge * settings.gauge,
            lr_factor=self.lr_factor * factors.lr,
            wd_factor=self.wd_factor * factors.weight_decay,
            eps_factor=None if self.eps_factor is None else self.eps_factor * factors.eps,
            init_factor=None if self.init_factor is None else self.init_factor * factors.init,
        )

    def as_row(self) -> dict[str, Any]:
        """Return the parameter as plain data, with the shape as a list."""
        row = vars(self) | {"shape": list(self.shape), "init": self.init.as_dict(), "init_std": self.init.std}
        row["columns"] = [vars(each) for each in self.columns]
        usual = {"multiplier": 1.0, "columns": [], "density": 1.0, "tangent": 1.0}
        more = [key for key, default in usual.items() if row[key] != default]
        return {key: row[key] for key in (*PARAMETERS.columns, "gauge", "init", *more)}


@dataclass(frozen=True)
class Plan:
    """The settings of every parameter of the model at ``scale``.

    ``notes`` lists folded multipliers, and changes of the scale (depth, batch, tokens) for which nothing was adjusted.
    """

    scale: Scale
    base: Scale
    parametrization: str
    optimizer: str
    recipe: Recipe
    rows: tuple[ParameterPlan, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return one line with the parametrization, the optimizer, the sizes and the number of parameters."""
        old, new = self.base, self.scale
        grown = f"width {old.width} → {new.width}, depth {old.depth} → {new.depth}"
        return f"<Plan {self.parametrization} {self.optimizer}: {grown}, {len(self.rows)} parameters>"

    def __str__(self) -> str:
        """Return the table of the parameters with the notes below it."""
        text = self.frame().to_string(index=False, na_rep="–", float_format="{:.4g}".format)
        return "\n".join([repr(self)[1:-1], text, *(f"note: {note}" for note in self.notes)])

    def frame(self) -> pd.DataFrame:
        """Return one row per parameter (`schemas.PARAMETERS`)."""
        rows = [row.as_row() | {"shape": "x".join(map(str, row.shape))} for row in self.rows]
        return PARAMETERS.frame([{key: row[key] for key in PARAMETERS.columns} for row in rows])

    @torch.no_grad()
    def initialize(self, model: torch.nn.Module, seed: int = 0) -> None:
        """Draw new values for every weight of ``model``, in place.

        Each parameter has its own random numbers, which depend only on ``seed`` and its name: the result does not depend on
        what ran before, and is the same on every device and under any sharding (`initialization.init.draw_`). Parameters that
        are DTensors are filled shard by shard; a model built on the meta device needs ``to_empty`` first. The weights that a
        pruned matrix keeps are drawn in the same way.

        Raises:
            RequestError: the model's parameters are not the plan's, or have no memory yet.
        """
        parameters, masks = matched(self, model), masks_of(model)
        for row in self.rows:
            parameter = parameters[row.name]
            draw_(parameter, row.init, seed, row.name)
            for mask in masks.get(id(parameter), ()):
                mask.set(drawn_mask(row.shape, row.density, seed, row.name), parameter)

    def param_groups(self, model: torch.nn.Module, *, tensor_lr: bool = False) -> list[dict[str, Any]]:
        """Return parameter groups for the plan's `torch.optim` class: one per distinct setting, with parameter names.

        Args:
            model: the model at the plan's scale, wrapped or not.
            tensor_lr: give each group its own float32 tensor as learning rate, on the device of its parameters. A compiled or
                captured optimizer step reads it at every step, whereas a Python number would be compiled in as a constant.

        Raises:
            RequestError: the model's parameters are not the plan's.
        """
        parameters = matched(self, model)
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self.rows:
            group = groups.setdefault(self._key(row), {"params": [], **self.settings_of(row)})
            group["params"].append((row.name, parameters[row.name]))
        if tensor_lr:
            for group in groups.values():
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0][1].device)
        return list(groups.values())

    def settings_of(self, row: ParameterPlan) -> dict[str, Any]:
        """Return all settings of one parameter, as a dictionary keyed by the optimizer's argument names."""
        rule = OPTIMIZERS[self.optimizer].of(row)
        return {**rule.varying(row.lr, row.weight_decay, row.eps), **rule.shared(self.in_force)}

    @property
    def in_force(self) -> Recipe:
        """The recipe, with its betas adjusted if it names a ``law``. Whatever else the law changes is already in ``rows``."""
        return averaged(self.recipe, self.scale, self.base)

    def unit(self) -> Plan:
        """Return the equivalent plan in u-µP's form: weights start at size 1, and `attach` registers the forward multipliers."""
        return unit(self)

    def dense(self) -> Plan:
        """Return the plan without masks, for a trainer that keeps pruned weights at 0 by itself."""
        return replace(self, rows=tuple(replace(row, density=1.0) for row in self.rows))

    def attach(self, model: torch.nn.Module) -> None:
        """Register the plan's forward multipliers and masks on ``model``; call it before `initialize`.

        Multipliers of whole parameters (`unit`), and the masks of pruned ones, are registered with
        `torch.nn.utils.parametrize`: the parameter's name then ends in ``parametrizations.weight.original``, in the model's
        state_dict as well. Multipliers of single columns are registered as forward pre-hooks, which leave names and state_dict
        unchanged. Frozen copies of such layers inside ``model`` (the target network of reinforcement learning, say) get the same
        hooks, and copy.deepcopy keeps the hooks.
        Without multipliers and masks, nothing happens.

        Raises:
            RequestError: the model already has multipliers or masks, or lacks a parameter of the plan.
        """
        attach(self, model)

    def make_optimizer(
        self,
        model: torch.nn.Module,
        cls: type[torch.optim.Optimizer] | None = None,
        *,
        tensor_lr: bool = False,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Return the plan's optimizer over ``model``.

        The optimizer's default learning rate, which some schedulers read, is the recipe's; every group has its own.

        Args:
            model: built at the plan's scale.
            cls: the optimizer class; needed if torch, transformers and lion_pytorch do not have it, as for Signum.
            tensor_lr: as in `param_groups`.
            options: for its constructor, such as fused and foreach.

        Raises:
            RequestError: there is no class, the plan itself sets one of the options, or the parameters are not the plan's.
        """
        groups, rule = self.param_groups(model, tensor_lr=tensor_lr), OPTIMIZERS[self.optimizer]
        for name in options:
            if any(name in group for group in groups):
                raise RequestError(f"{name} is set by the plan, parameter by parameter: change it in the recipe.")
        default: dict[str, Any] = {"lr": self.recipe.lr} if cls is None and rule.home == "torch.optim" else {}
        return (cls or rule.load())(groups, **default, **options)

    def per_group(self, target: torch.optim.Optimizer | torch.nn.Module, value: float) -> list[float]:
        """Return the learning rate of each parameter group, in the groups' order, for a given rate at base scale.

        torch's schedulers accept such a list in place of a single number (``max_lr``, ``base_lr``, ``min_lr``, ``swa_lr``).

        Args:
            target: an optimizer with the plan's groups, or the model that they will be made from.
            value: the learning rate at base scale; ``recipe.lr`` gives the planned rates.

        Raises:
            RequestError: the optimizer's groups have no parameter names, mix different rates, or belong to another plan.
        """
        groups = target.param_groups if isinstance(target, torch.optim.Optimizer) else self.param_groups(target)
        return schedulers.per_group(self._rates(), self.recipe.lr, groups, value)

    def check_scheduler(self, scheduler: Any, steps: int = 100) -> None:
        """Raise if a learning rate scheduler would not keep the planned ratios between groups.

        Args:
            scheduler: a scheduler of an optimizer with the plan's groups; those inside SequentialLR and ChainedScheduler are
                checked one by one.
            steps: number of steps for which a copy of the scheduler is run to check the ratios; fewer if it ends before.

        Raises:
            RequestError: the scheduler changes the ratios (the message says which argument to replace), or as in `per_group`.
        """
        schedulers.check(self._rates(), self.recipe.lr, scheduler, steps)

    def _rates(self) -> dict[str, float]:
        return {row.name: row.lr for row in self.rows}

    def _key(self, row: ParameterPlan) -> tuple[Any, ...]:
        return row.lr, row.weight_decay, row.eps, OPTIMIZERS[self.optimizer].of(row).name

    def groups(self) -> list[dict[str, Any]]:
        """Return the distinct settings and the number of parameters that share each."""
        counts: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self.rows:
            key = self._key(row)
            group = counts.setdefault(key, {"lr": row.lr, "weight_decay": row.weight_decay, "eps": row.eps, "count": 0})
            group["count"] += 1
        return list(counts.values())

    @torch.no_grad()
    def clip_grad_norm_(self, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
        """Clip the gradients of ``model`` to ``max_norm`` and return their norm before clipping (a scalar tensor).

        The norm is that of the gradients of an equivalent model, which has multipliers in its forward pass in place of the plan's
        scaled initial weights and learning rates. To compute it, each gradient is multiplied by its parameter's ``gauge``
        (`ParameterPlan`); the gradients themselves are not. Without this factor, the readout would make the norm grow with
        the width, and wide models would be clipped more.
        """
        parameters = matched(self, model)
        columns = {row.name: row.columns for row in self.rows if row.columns}
        gauged = [(row.gauge, parameters[row.name], columns.get(row.name, ())) for row in self.rows]
        return clip_grad_norm_(gauged, max_norm)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, atomically."""
        return write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data that `from_dict` reads."""
        return {
            "format": FORMAT,
            "scale": self.scale.as_dict(),
            "base": self.base.as_dict(),
            "parametrization": self.parametrization,
            "optimizer": self.optimizer,
            "recipe": self.recipe.model_dump(mode="json"),
            "parameters": [row.as_row() for row in self.rows],
            "notes": list(self.notes),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote; raises RequestError if the file is missing or is not a plan."""
        return cls.from_dict(read_json(path, "a plan, as Plan.save writes it"), str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        """Rebuild a plan from the data of `as_dict`.

        Raises:
            SettingsError: the data is not a plan; the message names its source, ``where``.
        """
        if not isinstance(data, dict) or "parameters" not in data or "recipe" not in data:
            raise SettingsError(f"{where} is not a plan: expected the keys scale, base, recipe and parameters.")
        found = _PlanFile.read(data, where, "write it again")
        if found.optimizer not in OPTIMIZERS:
            raise SettingsError(
                f"{where} is for the optimizer {found.optimizer!r}: {nearest(found.optimizer, OPTIMIZERS)}"
            )
        recipe = Recipe.read(found.recipe, f"{where}, recipe")
        return cls(
            found.scale, found.base, found.parametrization, found.optimizer, recipe, found.parameters, found.notes
        )


def matched(plan: Plan, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters of ``model``, wrapped or not, by their names in ``plan``.

    Raises:
        LayerError: a parameter exists on one side only or has another shape.
        RequestError: the forward multipliers are not the plan's, or a parameter is lazy.
    """
    planned = {row.name: row.shape for row in plan.rows}
    found = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if (name := is_lazy(model)) is not None:
        raise RequestError(f"{name} is lazy and has no shape yet: run one batch through the model first.")
    owners = planned_names(found, planned)
    parameters = {owners[name]: parameter for name, parameter in found.items()}
    refuse_other_gauge(plan, model)
    _refuse_difference(parameters.keys() - planned.keys(), "the model has", "the plan does not")
    _refuse_difference(planned.keys() - parameters.keys(), "the plan has", "the model does not")
    for name, shape in planned.items():
        if tuple(parameters[name].shape) != shape:
            raise LayerError(
                f"{name} has shape {list(parameters[name].shape)} in the model and {list(shape)} in the plan for width "
                f"{plan.scale.width}: build the model at the plan's scale."
            )
    masks = masks_of(model)
    for row in plan.rows:
        if (id(parameters[row.name]) in masks) != (row.density != 1):
            raise RequestError(
                f"{row.name} has density {row.density:g} in the plan, and {'a' if row.density == 1 else 'no'} mask in the model: "
                "call plan.attach(model) once, on a freshly built model, before plan.initialize(model)."
            )
    return parameters


def _refuse_difference(names: Iterable[str], here: str, there: str) -> None:
    for name in sorted(names):
        raise LayerError(
            f"{here} a parameter {name!r} that {there}: plan and build the same family, with the same tying."
        )


def _without_std(row: Any) -> Any:
    """Return a row without the standard deviation, which follows from ``init``."""
    return {key: value for key, value in row.items() if key != "init_std"} if isinstance(row, dict) else row


class _PlanFile(Settings):
    """A plan as `Plan.save` writes it; a target config holds the same keys among others."""

    model_config = ConfigDict(extra="ignore")

    scale: Annotated[Scale, read_by(lambda data: Scale(**data))]
    base: Annotated[Scale, read_by(lambda data: Scale(**data))]
    parametrization: Annotated[str, AfterValidator(lambda name: table(name).name)]
    optimizer: str
    recipe: Any
    parameters: tuple[Annotated[ParameterPlan, BeforeValidator(_without_std)], ...]
    notes: tuple[str, ...] = ()


def unit(plan: Plan) -> Plan:
    """Return a plan that trains identically, whose random weights start with standard deviation 1 under forward multipliers.

    Constants (gains, biases) are unchanged, with what is folded into them.
    """
    return replace(plan, rows=tuple(_unit(row, OPTIMIZERS[plan.optimizer].of(row).fold) for row in plan.rows))


def _unit(row: ParameterPlan, kind: str) -> ParameterPlan:
    c = row.init.std
    if c == 0:
        return row
    change = Factors().folded(1 / c, kind)
    factor = Factors().folded(1 / (row.init_factor or 1.0), kind)  # the base model has another multiplier
    scaled = row.init.scaled(1 / c)
    return replace(row.times(change, factor), init=scaled, multiplier=row.multiplier * c, init_factor=1.0)


@torch.no_grad()
def attach(plan: Plan, model: nn.Module) -> None:
    """Register the plan's multipliers and masks (of ones) on ``model``, in place, without changing what it computes.

    Raises:
        RequestError: the model already has multipliers or masks, or lacks a parameter of the plan.
    """
    owners = list(_owners(model))
    named = {f"{prefix}.{key}".lstrip("."): getattr(module, key) for module, prefix, key in owners}
    for row in plan.rows:
        if row.columns:
            _attach_columns(row, model)
        if row.multiplier == row.density == 1:
            continue
        if row.name not in named:
            raise RequestError(
                f"{row.name} is not a plain parameter of the model: attach the plan once, to a freshly built model."
            )
        parameter = named[row.name]
        value = parameter / row.multiplier
        for module, _, key in owners:
            if getattr(module, key, None) is parameter:  # a tied matrix is multiplied wherever it is used
                if row.multiplier != 1:
                    parametrize.register_parametrization(module, key, Multiplier(row.multiplier))
                if row.density != 1:
                    register_mask(module, key, row.name)
        parameter.copy_(value)


def _attach_columns(row: ParameterPlan, model: nn.Module) -> None:
    """Multiply the columns of a layer and of its copies that are not trained, such as a target network's."""
    owner, _, key = row.name.rpartition(".")
    layer = dict(model.named_modules()).get(owner)
    weight = getattr(layer, key, None)
    if layer is None or weight is None or columns_of(layer):
        raise RequestError(
            f"{row.name} is not a plain parameter of the model: attach the plan once, to a freshly built model."
        )
    copies = [
        each for each in model.modules() if type(each) is type(layer) and _copies(getattr(each, key, None), weight)
    ]
    hook = ColumnMultiplier(row.columns, weight.dim())
    for each in (layer, *copies):
        each.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        parameter = getattr(each, key)
        parameter.copy_(hook.multiplied(parameter, row.columns[0].axis, divide=True))


def _copies(other: torch.Tensor | None, weight: torch.Tensor) -> bool:
    if other is None or other is weight or other.requires_grad or other.shape != weight.shape or weight.is_meta:
        return False
    return bool(torch.equal(other, weight))


def refuse_other_gauge(plan: Plan, model: nn.Module) -> None:
    """Raise if the forward multipliers of a model are not the plan's."""
    found = {
        f"{prefix}.{key}".lstrip("."): list_[0].c
        for prefix, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for key, list_ in module.parametrizations.items()
        if isinstance(list_[0], Multiplier)
    }
    columns = {
        plain_name(f"{prefix}.weight".lstrip(".")): each
        for prefix, module in model.named_modules()
        if (each := columns_of(module))
    }
    for row in plan.rows:
        actual = found.get(row.name, 1.0)
        if row.columns != columns.get(plain_name(row.name), ()):
            raise RequestError(
                f"{row.name} has columns whose forward multipliers differ between the plan and the model: call "
                "plan.attach(model) once, on a freshly built model, before plan.initialize(model)."
            )
        if actual != row.multiplier:
            raise RequestError(
                f"{row.name} has the forward multiplier {actual:g} in the model and {row.multiplier:g} in the plan: call "
                "plan.attach(model) once, with the plan that you train with."
            )


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for prefix, module in model.named_modules():
        for key in list(module._parameters):
            if module._parameters[key] is not None:
                yield module, prefix, key


@torch.no_grad()
def clip_grad_norm_(
    gauged: Iterable[tuple[float, torch.Tensor, tuple[ColumnBlock, ...]]], max_norm: float
) -> torch.Tensor:
    """Scale gradients in place so that their total norm is at most ``max_norm``; return the norm before (a scalar tensor).

    Args:
        gauged: (gauge, parameter, columns) per parameter. Its gradient is multiplied by ``gauge`` in the norm, and that of
            each of the columns by the columns' gauge as well. DTensors count as a whole on every process.
        max_norm: in units of the gradient's norm.
    """
    live: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for gauge, parameter, columns in gauged:
        if parameter.grad is None:
            continue
        for more, grad in parted(parameter.grad, columns):  # sharded gradients are combined only within their own mesh
            live.setdefault((getattr(grad, "device_mesh", None), grad.device, gauge * more), []).append(grad)
    if not live:
        return torch.zeros(())
    norms = [_whole(torch.nn.utils.get_total_norm(grads)) * key[-1] for key, grads in live.items()]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for (_, device, _), grads in live.items():
        multiply_all_(grads, scale.to(device))
    return total


def parted(
    tensor: torch.Tensor, columns: tuple[ColumnBlock, ...], *, leading: int = 0
) -> list[tuple[float, torch.Tensor]]:
    """Return the pieces of a parameter's gradient as (gauge relative to the whole, piece).

    ``leading`` is the number of axes in front of the parameter's own.
    """
    if not columns:
        return [(1.0, tensor)]
    end, pieces, dim = 0, [], columns[0].axis + leading
    for each in columns:
        pieces.append((1.0, tensor.narrow(dim, end, each.begin - end)))
        pieces.append((each.gauge, tensor.narrow(dim, each.begin, each.end - each.begin)))
        end = each.end
    pieces.append((1.0, tensor.narrow(dim, end, tensor.shape[dim] - end)))
    return [(gauge, each) for gauge, each in pieces if each.numel()]


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """Return a tensor's full value on every process; `full_tensor` exists on DTensors and not on plain tensors."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
