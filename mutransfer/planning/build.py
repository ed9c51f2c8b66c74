"""From a family, a scale and a recipe to the settings of every parameter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RequestError
from ..family import Family
from ..initialization import Init, InitWatcher
from ..optimizers.rules import optimizer_rule
from ..parametrizations.spec import Factors
from ..parametrizations.tables import table
from ..recipe import Recipe
from ..scale import Scale
from ..tracing.observe import at_target, observe, shapes_of, with_depth_constants
from ..tracing.run import build, on_fake_tensors
from ..tracing.specs import Observation, fits, kinds, match_layers
from .builder import Draft, fold_all
from .laws import Ratios, averaged, law
from .plan import ParameterPlan, Plan

__all__ = ["Target", "apply_law", "finished", "plan", "target_of"]


@dataclass(frozen=True)
class Target:
    """All that a plan needs of the model at one scale, whatever the recipe: shapes, own inits, and its layers' origins."""

    scale: Scale
    parametrization: str
    seen: Observation
    shapes: dict[str, tuple[int, ...]]
    inits: dict[str, Init]
    origin: dict[str, str]


def target_of(
    family: Family, scale: Scale, parametrization: str = "mup", observation: Observation | None = None
) -> Target:
    """Look at ``family`` at ``scale``, built on fake tensors, for plans under ``parametrization``.

    Raises:
        RequestError: as `plan`.
    """
    seen = observation or observe(family)
    if scale.depth != family.base.depth and table(parametrization).depth is not None:
        seen = with_depth_constants(family, seen)
    seen = at_target(family, seen, scale)
    with on_fake_tensors(), InitWatcher() as watcher:
        model = build(family, scale)
    shapes, inits = shapes_of(model), watcher.named(model)
    if scale.depth == family.base.depth and shapes.keys() != seen.specs.keys():
        odd = sorted(shapes.keys() ^ seen.specs.keys())[0]
        raise RequestError(
            f"{odd} is there at width {scale.width} or at the base, not at both: build the same modules."
        )
    base_axes = {name: len(spec.shape) for name, spec in seen.specs.items()}
    axes = {name: len(shape) for name, shape in shapes.items()}
    origin = match_layers(axes, base_axes, fits(shapes, seen.specs), kinds(seen.specs))
    return Target(scale, parametrization, seen, shapes, inits, origin)


def plan(
    family: Family,
    scale: Scale,
    parametrization: str = "mup",
    optimizer: str = "adamw",
    recipe: Recipe | str | os.PathLike[str] | None = None,
    *,
    observation: Observation | None = None,
    target: Target | None = None,
    densities: Mapping[str, float] | None = None,
) -> Plan:
    """Plan the settings of every parameter of ``family`` at ``scale``. Nothing is built for real, so any size will do.

    Args:
        family: the model at any size; its base is where every factor is 1.
        scale: the model to plan for.
        parametrization: one of `tables.TABLES`, such as "mup" (TP-V 2203.03466, Table 3), "completep" or "sp".
        optimizer: name of an optimizer in lower case, one of `optimizers.OPTIMIZERS`.
        recipe: hyperparameters at base scale, or the path of a saved recipe; torch-like defaults if None.
        observation: what `observe` returned for this family, to save doing it again.
        target: what `target_of` returned for this family, scale and parametrization, to save that as well.
        densities: name pattern → m_ρ, the density of these hidden layers at the target / at the base (SµPar 2405.15743).

    Raises:
        RequestError: an unknown name, a model whose parameters cannot be told, an axis that changed but does not grow.
    """
    if recipe is None or not isinstance(recipe, Recipe):
        recipe = Recipe() if recipe is None else Recipe.load(recipe)
    rules, rule = table(parametrization), optimizer_rule(optimizer, recipe)
    there = target or target_of(family, scale, parametrization, observation)
    if (there.scale, there.parametrization) != (scale, parametrization):
        raise RequestError(
            f"the target was looked at at {there.scale} for {there.parametrization}, and the plan is of {scale} under "
            f"{parametrization}: call target_of for these."
        )
    draft = Draft(rules, rule, recipe, there.seen, scale, family.base, there.shapes, there.origin, densities or {})
    planned = finished(draft, optimizer, there.inits)
    base = sum(math.prod(spec.shape) for spec in there.seen.specs.values())
    grown = sum(map(math.prod, there.shapes.values())) / base
    return apply_law(planned, scale, family.base, grown)


def finished(draft: Draft, optimizer: str, inits: dict[str, Init]) -> Plan:
    """Fold all multipliers of ``draft`` and return its plan; ``inits`` are the target's own, as its constructor set them."""
    fold_all(draft)
    if draft.wider < 1:
        draft.notes.append(
            f"the target's width {draft.scale.width} is smaller than the base's {draft.base.width}: factors invert."
        )
    rows = tuple(_row(draft, name, inits[name]) for name in draft.shapes)
    draft.notes += _constants(draft, rows)
    return Plan(draft.scale, draft.base, draft.rules.name, optimizer, draft.recipe, rows, tuple(draft.notes))


def _constants(draft: Draft, rows: tuple[ParameterPlan, ...]) -> list[str]:
    """Name the constants that carry a multiplier: their standard deviation, which the table shows, is 0 all the same."""
    changed: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        own = draft.spec(row.name).init
        if row.init.kind == own.kind == "constant" and row.init.a != own.a:
            changed.setdefault((own.a, row.init.a), []).append(row.name)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: initially the constant {new:.4g} instead "
        f"of {old:.4g}, which init_std and init_factor do not show."
        for (old, new), names in changed.items()
    ]


def _row(draft: Draft, name: str, target: Init) -> ParameterPlan:
    spec, recipe, rule = draft.spec(name), draft.recipe, draft.rule.of(draft.spec(name))
    size, total = draft.size[name], draft.size[name] * draft.alpha[name]
    m_in, m_out = draft.multipliers(name)
    is_matrix = len(spec.shape) > 1
    factor = total.init * (recipe.init_scale if is_matrix else 1.0)
    try:
        # Table factors are for random weights; a constant (a gain of 1, a bias of 0) only follows a change of gauge.
        init = spec.init.carried(target, factor, total.gauge, matrix=bool({"in", "gather"} & {*spec.axes}))
    except RequestError as error:
        raise RequestError(f"{name} {list(draft.shapes[name])} {error}") from None
    apart, columns = draft.apart.get(name, (1.0, ()))
    if columns and init.kind != "constant":
        if init.parts or init.program:
            raise RequestError(
                f"{name} {list(draft.shapes[name])} has columns of two kinds and is drawn in pieces, or by operations of its "
                "own: draw it from one distribution, or split the layer in two."
            )
        init = init.with_columns([(each.axis, each.begin, each.end) for each in columns], draft.shapes[name], apart)
    if spec.shift:  # a gain used as s + w: that is what the factor is for, not w
        init = init.shifted((total.gauge - 1) * spec.shift)
    # What is scaled is s + w: decay must not pull w to where s + w is 1.
    decays = (recipe.decay == "all" or is_matrix) and not (spec.shift and total.gauge != 1)
    base_lr, base_eps = rule.base(recipe)
    settings: dict[str, Any] = {
        "lr": base_lr * total.lr,
        "weight_decay": recipe.weight_decay * total.weight_decay if decays else 0.0,
        "eps": base_eps * total.eps if rule.has_eps else None,
    }
    return ParameterPlan(
        name=name,
        shape=draft.shapes[name],
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
    )


def apply_law(plan: Plan, scale: Scale, tuned: Scale, parameters: float | None = None) -> Plan:
    """Return ``plan`` for the batch and the tokens of ``scale``, from a recipe tuned at those of ``tuned``.

    A size that neither states is not part of the question; one that only one of them states may have changed.

    Args:
        plan: with no law applied yet.
        scale: what the plan is for.
        tuned: what the recipe was tuned at.
        parameters: m_N, which only some laws need.

    Raises:
        RequestError: the law is unknown, was found with other optimizers, or needs something that is not given.
    """
    sizes = {size: (getattr(tuned, size), getattr(scale, size)) for size in ("batch", "tokens")}
    moved = [
        f"{size} {old or 'not stated'} → {new or 'not stated'}" for size, (old, new) in sizes.items() if old != new
    ]
    if not moved:
        return plan
    name, stated = plan.recipe.law, {"batch": scale.batch, "tokens": scale.tokens}
    if name == "none":
        note = f"{', '.join(moved)}: no batch or duration law was named, so lr, weight decay, betas and eps are carried as "
        note += "they are."
        return replace(plan, scale=plan.scale.with_(**stated), notes=(*plan.notes, note))
    chosen = law(name)
    if plan.optimizer not in chosen.optimizers:
        raise RequestError(
            f"the law {name} was found with {' and '.join(chosen.optimizers)} ({chosen.source}), and the optimizer is "
            f"{plan.optimizer}: name the law 'none', or use one of these."
        )
    for size in chosen.needs:
        if None in sizes[size]:
            raise RequestError(
                f"the law {name} needs {' and '.join(chosen.needs)} of base and target, and this is {', '.join(moved)}: give "
                f"both Scales their {size}."
            )
    batch, tokens = (new / old if old and new else 1.0 for old, new in sizes.values())
    m = Ratios(batch, tokens, parameters)
    change = chosen.change(m)
    factors = Factors(lr=change.lr, weight_decay=change.weight_decay, eps=change.eps)
    rows = tuple(row.times(factors) for row in plan.rows)
    symbols = {"m_B": "batch", "m_D": "tokens"}
    said = ", ".join(f"{key} = {getattr(m, size):g}" for key, size in symbols.items() if None not in sizes[size])
    note = f"law {name} ({chosen.source}): {chosen.says}; {said}."
    changed = replace(
        plan,
        rows=rows,
        scale=plan.scale.with_(**stated),
        base=plan.base.with_(batch=tuned.batch, tokens=tuned.tokens),
        notes=(*plan.notes, note),
    )
    averaged(plan.recipe, changed.scale, changed.base)  # refuse now, not when the optimizer is made
    return changed
