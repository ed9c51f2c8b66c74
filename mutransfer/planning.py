"""From a family, a scale and a recipe to the settings of every parameter."""

from __future__ import annotations

import os
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import RequestError
from .family import Family
from .fold import Factors
from .inits import Init, InitWatcher
from .observe import WIDER, Observation, ParamSpec, build, observe, shapes_of
from .optimizers import OptimizerRule, optimizer_rule
from .plans import ParameterPlan, Plan
from .recipe import Recipe
from .scale import Scale
from .tables import Table, table

__all__ = ["plan"]

DECAY_POLICIES = {"independent": -1.0, "coupled": 0.0, "sqrt": -0.5}  # power of the lr factor


def plan(
    family: Family,
    scale: Scale,
    parametrization: str = "mup",
    optimizer: str = "adamw",
    recipe: Recipe | str | os.PathLike[str] | None = None,
    *,
    observation: Observation | None = None,
) -> Plan:
    """Plan the settings of every parameter of ``family`` at ``scale``. Nothing is built for real, so any size will do.

    Args:
        family: the model at any size; its base is where every factor is 1.
        scale: the model to plan for.
        parametrization: "mup" (TP-V 2203.03466, Table 3) or "sp".
        optimizer: name of a torch optimizer in lower case.
        recipe: hyperparameters at base scale, or the path of a saved recipe; torch-like defaults if None.
        observation: what `observe` returned for this family and depth, to save doing it again.

    Raises:
        RequestError: an unknown name, a model whose parameters cannot be told, an axis that changed but does not grow.
    """
    if recipe is None or not isinstance(recipe, Recipe):
        recipe = Recipe() if recipe is None else Recipe.load(recipe)
    rules, rule = table(parametrization), optimizer_rule(optimizer, recipe)
    seen = observation or observe(family, scale.depth)
    with FakeTensorMode(allow_non_fake_inputs=True), InitWatcher() as watcher:
        model = build(family, scale)
    shapes, inits = shapes_of(model), watcher.named(model)
    if shapes.keys() != seen.specs.keys():
        odd = sorted(shapes.keys() ^ seen.specs.keys())[0]
        raise RequestError(
            f"{odd} is there at width {scale.width} or at the base, not at both: build the same modules."
        )
    width = {name: _table_factors(rules, rule, recipe, spec, shapes[name]) for name, spec in seen.specs.items()}
    alpha = dict.fromkeys(shapes, Factors())
    notes = _fold_shared(rules, rule, recipe, seen, shapes, width, alpha)
    notes += _fold_attention(rules, rule, recipe, seen, scale.width / family.base.width, width, alpha)
    if scale.depth != family.base.depth:
        notes.append(
            f"{parametrization} has no rule for depth: the change from {family.base.depth} to {scale.depth} layers is carried "
            "without any factor."
        )
    if scale.width < family.base.width:
        notes.append(
            f"the target's width {scale.width} is smaller than the base's {family.base.width}: factors invert."
        )
    rows = tuple(
        _row(spec, shapes[name], inits[name], rule, recipe, width[name], alpha[name])
        for name, spec in seen.specs.items()
    )
    return Plan(scale, family.base, parametrization, optimizer, recipe, rows, tuple(notes))


def _table_factors(
    rules: Table, rule: OptimizerRule, recipe: Recipe, spec: ParamSpec, shape: tuple[int, ...]
) -> Factors:
    m = spec.multipliers(shape)
    row = rules.rows[spec.role]
    lr = row.lr(rule.column)(*m)
    gauge = rules.readout(*m) if spec.role == "output" else 1.0
    decay = lr ** DECAY_POLICIES[recipe.decay_policy]
    return Factors(init=row.init(*m), lr=lr, weight_decay=decay, eps=row.eps(*m), gauge=gauge)


def _fold_shared(
    rules: Table, rule: OptimizerRule, recipe: Recipe, seen: Observation, shapes: dict[str, tuple[int, ...]],
    width: dict[str, Factors], alpha: dict[str, Factors],
) -> list[str]:  # fmt: skip
    """Write the input and output multipliers into their matrices; a tied matrix passes its readout's to the final norm."""
    notes: list[str] = []
    for name, spec in seen.specs.items():
        if spec.role == "output":
            alpha[name] = alpha[name].folded(recipe.alpha_output, rule.column)
        elif spec.role in ("input", "finite") and spec.on_data and len(spec.shape) > 1:
            alpha[name] = alpha[name].folded(recipe.alpha_input, rule.column)
        if not spec.tied:
            continue
        c_width = rules.readout(_growth(spec, shapes[name]), 1.0)
        c_alpha = recipe.alpha_output / recipe.alpha_input
        if not spec.carriers and (c_width != 1 or c_alpha != 1):
            raise RequestError(
                f"the readout is tied to {name} and nothing before it can carry its factor {c_width * c_alpha:g}: give the "
                "model a final norm with a gain, or untie the readout."
            )
        if c_width != 1 or c_alpha != 1:
            _refuse_other_use(seen, spec.carriers, name)
        for carrier in sorted(spec.carriers):
            width[carrier] = width[carrier].folded(c_width, rule.column)
            alpha[carrier] = alpha[carrier].folded(c_alpha, rule.column)
        if c_width != 1:
            notes.append(f"tied readout: its factor {c_width:g} is folded into {', '.join(sorted(spec.carriers))}.")
    return notes


def _refuse_other_use(seen: Observation, carriers: frozenset[str], readout: str) -> None:
    """What a carrier feeds besides the readout would be scaled with it."""
    for name, spec in seen.specs.items():
        if name != readout and spec.meets & carriers:
            raise RequestError(
                f"the readout tied to {readout} passes its factor to {min(carriers)}, which also feeds {name}: give it a norm of "
                "its own, or untie the readout."
            )


def _growth(spec: ParamSpec, shape: tuple[int, ...]) -> float:
    """Fan-in ratio of a tied matrix as a readout: its growing axis, which as an embedding is the output one."""
    return spec.multipliers(shape)[1]


def _fold_attention(
    rules: Table, rule: OptimizerRule, recipe: Recipe, seen: Observation, ratio: float,
    width: dict[str, Factors], alpha: dict[str, Factors],
) -> list[str]:  # fmt: skip
    """Turn the model's own scaling of attention into α·√d₀/d by scaling the queries, where the head dim d grows.

    TP-V 2203.03466, Definition 4.1, which starts from 1/√d; a model that already divides by d needs no factor.
    """
    if seen.head_dim is None:
        if recipe.alpha_attention != 1:
            raise RequestError(
                f"alpha_attention is {recipe.alpha_attention:g} and the model has no attention that could be seen: leave it at 1."
            )
        return []
    m_h = ratio if seen.head_dim_ratio == WIDER else 1.0
    if seen.head_dim_ratio not in (1, WIDER):
        raise RequestError(
            f"the head dim grows {seen.head_dim_ratio:g}x when the width grows {WIDER}x: keep it fixed or proportional."
        )
    c = rules.attention(m_h, 1.0) ** (2 * (1 + seen.scale_power))  # the table counts from 1/√d
    if c == 1 and recipe.alpha_attention == 1:
        return []
    if seen.shared_queries:
        raise RequestError(
            f"attention asks for a factor {c * recipe.alpha_attention:.4g} on the queries alone, and {min(seen.shared_queries)} "
            "also makes keys or values: split it into its own query projection, or keep the head dim fixed and alpha_attention 1."
        )
    if not seen.queries:
        raise RequestError(
            "attention asks for a factor on the queries, and no parameter carries it: use a query projection."
        )
    for name in sorted(seen.queries):
        width[name] = width[name].folded(c, rule.column)
        alpha[name] = alpha[name].folded(recipe.alpha_attention, rule.column)
    return [] if c == 1 else [f"head dim grows {m_h:g}x: 1/d attention is folded into the queries ({c:.4g})."]


def _row(
    spec: ParamSpec,
    shape: tuple[int, ...],
    target: Init,
    rule: OptimizerRule,
    recipe: Recipe,
    width: Factors,
    alpha: Factors,
) -> ParameterPlan:
    total = width * alpha
    m_in, m_out = spec.multipliers(shape)
    is_matrix = len(spec.shape) > 1
    # Table factors are for random weights; a constant (a gain of 1, a bias of 0) only follows a change of gauge.
    factor = total.init * (recipe.init_scale if is_matrix else 1.0)
    try:
        init = spec.init.carried(target, factor, total.gauge, is_matrix)
    except RequestError as error:
        raise RequestError(f"{spec.name} {list(shape)} {error}") from None
    decays = recipe.decay == "all" or is_matrix
    eps = recipe.eps * total.eps if rule.has_eps else None
    settings: dict[str, Any] = {
        "lr": recipe.lr * total.lr,
        "weight_decay": recipe.weight_decay * total.weight_decay if decays else 0.0,
        "eps": eps,
    }
    return ParameterPlan(
        name=spec.name,
        shape=shape,
        role=spec.role,
        m_in=m_in,
        m_out=m_out,
        init=init,
        **settings,
        lr_factor=width.lr,
        wd_factor=width.weight_decay,
        eps_factor=width.eps if rule.has_eps else None,
        init_factor=None if spec.init.fixed else width.init,
        gauge=total.gauge,
    )
