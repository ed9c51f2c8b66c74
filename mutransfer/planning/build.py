"""Compute the settings of every parameter from a family, a scale and a recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InitError, LayerError, RequestError
from ..family import Family
from ..initialization import Init, InitTracer
from ..methods import ForwardGradient
from ..optimizers.rules import OptimizerRule, optimizer_rule
from ..parametrizations.spec import Factors
from ..parametrizations.tables import table
from ..recipe import Recipe, Scale
from ..run_dir import tuned_base
from ..tracing.observe import at_target, observe, shapes_of, with_depth_constants
from ..tracing.run import build, on_fake_tensors
from ..tracing.specs import Observation, fits, kinds, match_layers
from .builder import PlanBuilder, fold_all
from .laws import Ratios, averaged, law
from .plan import ParameterPlan, Plan

__all__ = ["ObservedModel", "apply_law", "finished", "plan", "observed_model"]


@dataclass(frozen=True)
class ObservedModel:
    """What a plan needs to know about the model at one scale, independent of the recipe.

    Args:
        scale: the target's scale.
        parametrization: name of the table that it was observed for.
        seen: the observation of the family, with what depends on the target's scale.
        shapes: shape of every trainable parameter, by name.
        inits: the model's own initialization of every parameter, by name, as observed in its constructor.
        origin: name of each parameter → the base model's parameter that it is scaled from.
    """

    scale: Scale
    parametrization: str
    seen: Observation
    shapes: dict[str, tuple[int, ...]]
    inits: dict[str, Init]
    origin: dict[str, str]


def observed_model(
    family: Family, scale: Scale, parametrization: str = "mup", observation: Observation | None = None
) -> ObservedModel:
    """Observe ``family`` at ``scale``, built on fake tensors, and return what plans under ``parametrization`` need.

    Raises:
        LayerError: as `plan`.
    """
    seen = observation or observe(family)
    if scale.depth != family.base.depth and table(parametrization).depth is not None:
        seen = with_depth_constants(family, seen)
    seen = at_target(family, seen, scale)
    with on_fake_tensors(), InitTracer() as watcher:
        model = build(family, scale)
    shapes, inits = shapes_of(model), watcher.named(model)
    if scale.depth == family.base.depth and shapes.keys() != seen.specs.keys():
        unmatched = sorted(shapes.keys() ^ seen.specs.keys())[0]
        raise LayerError(
            f"{unmatched} exists at width {scale.width} or in the base model, but not in both: build the same modules."
        )
    base_axes = {name: len(spec.shape) for name, spec in seen.specs.items()}
    axes = {name: len(shape) for name, shape in shapes.items()}
    origin = match_layers(axes, base_axes, fits(shapes, seen.specs), kinds(seen.specs))
    return ObservedModel(scale, parametrization, seen, shapes, inits, origin)


def plan(
    family: Family,
    scale: Scale,
    parametrization: str = "mup",
    optimizer: str = "adamw",
    recipe: Recipe | str | os.PathLike[str] | None = None,
    *,
    observation: Observation | None = None,
    target: ObservedModel | None = None,
    densities: Mapping[str, float] | None = None,
    pruned: Mapping[str, float] | None = None,
) -> Plan:
    """Return the settings of every parameter of ``family`` at ``scale``.

    Models are built on fake tensors, which take no memory; the documentation of `observe` says when a pass has to run for real.

    Args:
        family: the model family; at its base scale every factor is 1.
        scale: the scale to plan for.
        parametrization: one of `parametrizations.tables.TABLES`, such as "mup" (TP-V 2203.03466, Table 3), "completep" or "sp".
        optimizer: lower-case name of an optimizer, one of `optimizers.rules.OPTIMIZERS`.
        recipe: hyperparameters at base scale, or the path of a saved recipe; None uses ``Recipe()``. The best.json of a run
            folder is refused if the run was tuned at another base.
        observation: the result of `observe` for this family, to avoid repeating it.
        target: the result of `observed_model` for this family, scale and parametrization, to avoid repeating that as well.
        densities: for models whose hidden layers are sparse by themselves, ratios of densities by name pattern: the fraction of
            nonzero weights in the target divided by that in the base, m_ρ of SµPar (2405.15743).
        pruned: the density of each hidden matrix of the base model by name, for a recipe whose method prunes by a score
            (`proxies.methods.pruned_densities`).

    Raises:
        RequestError: a name is unknown, or a law does not apply.
        ModelError: the model cannot be planned. It is raised as one of its subclasses: `BuildError` (building the model or
            its forward pass fails), `RoleError` or `InitError` (the role or the initialization of a parameter cannot be
            determined) or `LayerError` (the model at the base and at the target differ in more than width and depth).
    """
    recipe = recipe_for(family, recipe, parametrization)
    rules, rule = table(parametrization), optimizer_rule(optimizer, recipe)
    observed = target or observed_model(family, scale, parametrization, observation)
    if isinstance(recipe.method, ForwardGradient) and recipe.clip is not None:
        raise RequestError(
            "the norm of a forward gradient grows with the number of parameters, so a limit on it does not transfer: leave clip "
            "out."
        )
    if isinstance(recipe.method, ForwardGradient) and optimizer != "sgd":
        raise RequestError(
            f"forward-gradient has a rule for sgd alone, because {optimizer} would normalize the noise of its estimates: set "
            "the optimizer to sgd."
        )
    if (observed.scale, observed.parametrization) != (scale, parametrization):
        raise RequestError(
            f"the target was observed at {observed.scale} for {observed.parametrization}, but the plan is for {scale} under "
            f"{parametrization}: call observed_model with these."
        )
    builder = PlanBuilder(
        rules, rule, recipe, observed.seen, scale, family.base, observed.shapes, observed.origin, densities or {},
        _pruned(recipe, rule, observed.seen, pruned),
    )  # fmt: skip
    planned = finished(builder, optimizer, observed.inits)
    base = sum(math.prod(spec.shape) for spec in observed.seen.specs.values())
    grown = sum(map(math.prod, observed.shapes.values())) / base
    return apply_law(planned, scale, family.base, grown)


def _pruned(
    recipe: Recipe, rule: OptimizerRule, seen: Observation, measured: Mapping[str, float] | None
) -> dict[str, float]:
    """Return the density of each hidden matrix of the base model that the recipe's method prunes.

    Raises:
        RequestError: the densities have not been measured, or the optimizer has no rule for pruned matrices.
    """
    hidden = {name: spec.shape for name, spec in seen.specs.items() if spec.role == "hidden" and len(spec.shape) > 1}
    found = {name: density for name, density in recipe.method.densities(hidden, measured).items() if density != 1}
    if found and not rule.entrywise:
        raise RequestError(
            f"{rule.name} does not update every weight by itself, and pruning has no rule for it: use adamw, adam or sgd."
        )
    return found


def recipe_for(family: Family, recipe: Recipe | str | os.PathLike[str] | None, parametrization: str) -> Recipe:
    """Return the recipe that ``recipe`` names: a path is read, and None is ``Recipe()``.

    Raises:
        RequestError: the file cannot be read, or was tuned at a base that makes its numbers mean something else for ``family``.
    """
    if isinstance(recipe, Recipe):
        return recipe
    _require_base(family, recipe, parametrization)
    return Recipe() if recipe is None else Recipe.load(recipe)


def _require_base(family: Family, recipe: str | os.PathLike[str] | None, parametrization: str) -> None:
    tuned = None if recipe is None else tuned_base(recipe)
    if tuned is None or parametrization == "sp":  # under which no learning rate depends on the base
        return
    deep = table(parametrization).depth is not None and tuned.depth != family.base.depth
    if tuned.width != family.base.width or deep:
        raise RequestError(
            f"{recipe} was tuned with the base width {tuned.width} and depth {tuned.depth}, but the base of {family.name} is "
            f"width {family.base.width} and depth {family.base.depth}, where its learning rate would mean another one: use "
            f"family.with_base(family.base.with_(width={tuned.width}, depth={tuned.depth})) or --base-width {tuned.width} "
            f"--base-depth {tuned.depth}; Recipe.load(path) takes the numbers as they are."
        )


def finished(builder: PlanBuilder, optimizer: str, inits: dict[str, Init]) -> Plan:
    """Fold all multipliers of ``builder`` and return its plan; ``inits`` are the target's own, as its constructor set them."""
    fold_all(builder)
    if builder.wider < 1:
        builder.notes.append(
            f"the target's width {builder.scale.width} is smaller than the base's {builder.base.width}, so factors invert."
        )
    rows = tuple(_row(builder, name, inits[name]) for name in builder.shapes)
    builder.notes += _constants(builder, rows)
    return Plan(builder.scale, builder.base, builder.rules.name, optimizer, builder.recipe, rows, tuple(builder.notes))


def _constants(builder: PlanBuilder, rows: tuple[ParameterPlan, ...]) -> list[str]:
    """Return notes that name constants whose value changes, since the table shows a standard deviation of 0 either way."""
    changed: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        base = builder.spec(row.name).init
        if row.init.kind == base.kind == "constant" and row.init.a != base.a:
            changed.setdefault((base.a, row.init.a), []).append(row.name)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: initially the constant {new:.4g} instead "
        f"of {old:.4g}, which init_std and init_factor do not show."
        for (old, new), names in changed.items()
    ]


def _row(builder: PlanBuilder, name: str, target: Init) -> ParameterPlan:
    spec, recipe, rule = builder.spec(name), builder.recipe, builder.rule.of(builder.spec(name))
    size, total = builder.size[name], builder.size[name] * builder.alpha[name]
    m_in, m_out = builder.multipliers(name)
    is_matrix = len(spec.shape) > 1
    factor = total.init * (recipe.init_scale if is_matrix else 1.0)
    try:
        # Table factors apply to random weights; a constant (a gain of 1, a bias of 0) is only scaled by the gauge.
        init = spec.init.carried(target, factor, total.gauge, matrix=bool({"in", "gather"} & {*spec.axes}))
    except InitError as error:
        raise InitError(f"{name} {list(builder.shapes[name])} {error}") from None
    apart, columns = builder.apart.get(name, (1.0, ()))
    if columns and init.kind != "constant":
        if init.parts or init.program:
            raise InitError(
                f"{name} {list(builder.shapes[name])} has both growing and fixed columns, and is initialized in pieces or by "
                "recorded operations: draw it from one distribution, or split the layer in two."
            )
        init = init.with_columns([(each.axis, each.begin, each.end) for each in columns], builder.shapes[name], apart)
    if spec.shift:  # a gain used as s + w: the factor applies to s + w, not to w
        init = init.shifted((total.gauge - 1) * spec.shift)
    # The factor applies to s + w: decay of w would pull s + w back to the unscaled s.
    decays = (recipe.decay == "all" or is_matrix) and not (spec.shift and total.gauge != 1)
    base_lr, base_eps = rule.base(recipe)
    lr, weight_decay, tangent = total.lr, total.weight_decay, 1.0
    if isinstance(recipe.method, ForwardGradient) and recipe.method.covariance == "preconditioned":
        # The tangents carry the factor of the learning rate; lr · weight decay stays what it was.
        lr, weight_decay, tangent = 1.0, total.lr * total.weight_decay, total.lr**0.5
        size = replace(size, lr=1.0, weight_decay=size.lr * size.weight_decay)
    settings: dict[str, Any] = {
        "lr": base_lr * lr,
        "weight_decay": recipe.weight_decay * weight_decay if decays else 0.0,
        "eps": base_eps * total.eps if rule.has_eps else None,
    }
    return ParameterPlan(
        name=name,
        shape=builder.shapes[name],
        role=spec.role,
        m_in=m_in,
        m_out=m_out,
        init=init,
        **settings,
        lr_factor=size.lr,
        wd_factor=size.weight_decay,
        eps_factor=size.eps if rule.has_eps else None,
        init_factor=None if spec.init.fixed and not init.std else size.init,
        gauge=total.gauge,
        columns=columns,
        density=builder.density(name),
        tangent=tangent,
    )


def apply_law(plan: Plan, scale: Scale, tuned: Scale, parameters: float | None = None) -> Plan:
    """Return ``plan`` adjusted to the batch and tokens of ``scale`` by its recipe's law, for a recipe tuned at ``tuned``.

    A size (batch or tokens) that neither scale states is ignored; a size that only one of them states is treated as changed.

    Args:
        plan: a plan with no law applied yet.
        scale: the scale that the plan is for.
        tuned: the scale that the recipe was tuned at.
        parameters: m_N, the ratio of parameter counts, which only some laws need.

    Raises:
        RequestError: the law is unknown, was found with other optimizers, or needs a value that is not given.
    """
    sizes = {size: (getattr(tuned, size), getattr(scale, size)) for size in ("batch", "tokens")}
    moved = [
        f"{size} {old or 'not stated'} → {new or 'not stated'}" for size, (old, new) in sizes.items() if old != new
    ]
    if not moved:
        return plan
    name, stated = plan.recipe.law, {"batch": scale.batch, "tokens": scale.tokens}
    if name == "none":
        note = f"{', '.join(moved)}: no batch or duration law is named, so lr, weight decay, betas and eps are carried over "
        note += "unchanged."
        return replace(plan, scale=plan.scale.with_(**stated), notes=(*plan.notes, note))
    chosen = law(name)
    if plan.optimizer not in chosen.optimizers:
        raise RequestError(
            f"the law {name} was found with {' and '.join(chosen.optimizers)} ({chosen.source}), but the optimizer is "
            f"{plan.optimizer}: set the law to 'none', or use one of these optimizers."
        )
    for size in chosen.needs:
        if None in sizes[size]:
            raise RequestError(
                f"the law {name} needs {' and '.join(chosen.needs)} of both base and target, but got {', '.join(moved)}: set "
                f"{size} on both Scales."
            )
    batch, tokens = (new / old if old and new else 1.0 for old, new in sizes.values())
    m = Ratios(batch, tokens, parameters)
    change = chosen.change(m)
    factors = Factors(lr=change.lr, weight_decay=change.weight_decay, eps=change.eps)
    rows = tuple(row.times(factors) for row in plan.rows)
    symbols = {"m_B": "batch", "m_D": "tokens"}
    ratio_text = ", ".join(f"{key} = {getattr(m, size):g}" for key, size in symbols.items() if None not in sizes[size])
    note = f"law {name} ({chosen.source}): {chosen.says}; {ratio_text}."
    changed = replace(
        plan,
        rows=rows,
        scale=plan.scale.with_(**stated),
        base=plan.base.with_(batch=tuned.batch, tokens=tuned.tokens),
        notes=(*plan.notes, note),
    )
    averaged(plan.recipe, changed.scale, changed.base)  # raise now rather than when the optimizer is built
    return changed
