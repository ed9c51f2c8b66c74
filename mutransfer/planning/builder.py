"""Build a plan: compute the factors of every parameter and fold forward multipliers into parameters.

Factors that follow from the sizes (``size``) and from the recipe's α's (``alpha``) are stored separately, because only the
former compare the target with the base model under the same recipe.
"""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import LayerError, RequestError
from ..methods import Pruned
from ..optimizers.rules import Growth, OptimizerRule
from ..parametrizations.spec import FOLDS, Factors
from ..parametrizations.tables import Table
from ..recipe import Recipe, Scale
from ..tracing.specs import Observation, ParamSpec
from .multipliers import ColumnBlock

__all__ = ["PlanBuilder", "fold_all"]

DECAY_POLICIES = {"independent": -1.0, "coupled": 0.0, "sqrt": -0.5}  # power of the lr factor


@dataclass
class PlanBuilder:
    """A plan under construction: the target's parameters and the factors computed so far.

    Args:
        rules: the parametrization's table.
        rule: the optimizer's scaling rule.
        recipe: hyperparameters at base scale.
        seen: the observation of the family.
        scale: the target's scale.
        base: the base model's scale.
        shapes: shapes of the target's parameters, by name.
        origin: name of each parameter → the base model's parameter that it is scaled from.
        densities: name pattern → density ratio m_ρ of these hidden layers.
        pruned: name of each of the base's hidden matrices → its density, if the recipe's method prunes it.
        size: name → factors that follow from the sizes.
        alpha: name → factors that follow from the recipe's α's.
        notes: what a reader of the plan should know.
        apart: name → (init factor relative to the other columns, columns with their forward multipliers), for parameters whose
            fixed columns have factors of their own.
    """

    rules: Table
    rule: OptimizerRule
    recipe: Recipe
    seen: Observation
    scale: Scale
    base: Scale
    shapes: dict[str, tuple[int, ...]]
    origin: dict[str, str]
    densities: Mapping[str, float] = field(default_factory=dict)
    pruned: Mapping[str, float] = field(default_factory=dict)
    size: dict[str, Factors] = field(default_factory=dict)
    alpha: dict[str, Factors] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    apart: dict[str, tuple[float, tuple[ColumnBlock, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.notes += [*self.seen.notes, *([self.rule.about] if self.rule.about else [])]
        self.alpha = dict.fromkeys(self.shapes, Factors())
        self.size = {name: self._size(name) for name in self.shapes}
        for pattern, density in self.densities.items():
            found = [name for name in self.shapes if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                raise RequestError(
                    f"no parameter matches {pattern!r}, which has density {density:g}: give another pattern."
                )
            self.notes.append(f"SµPar: {pattern} ({len(found)} parameters) with density ratio {density:g}.")
        self._note_pruned()

    def _note_pruned(self) -> None:
        found = {name: density for name in self.shapes if (density := self.density(name)) != 1}
        if not found:
            return
        sizes = {name: math.prod(self.shapes[name]) for name in self.shapes if self.spec(name).role == "hidden"}
        for name, density in found.items():
            if round(density * sizes[name]) == 0:
                raise RequestError(
                    f"density {density:.3g} leaves none of the {sizes[name]} weights of {name}: raise method.density."
                )
        overall = sum(found.get(name, 1.0) * size for name, size in sizes.items()) / sum(sizes.values())
        low, high = min(found.values()), max(found.values())
        scaled = "scaled by SµPar" if self._scales_with_density else "not scaled with their density"
        self.notes.append(
            f"pruned: {len(found)} hidden matrices keep {overall:.3%} of their weights ({low:.3%} to {high:.3%} each), {scaled}."
        )

    @property
    def _scales_with_density(self) -> bool:
        """Whether pruned layers follow SµPar; without a rule for the width, as under SP, there is none for the density."""
        method = self.recipe.method
        return isinstance(method, Pruned) and method.rule == "supar" and self.rules.name != "sp"

    def density(self, name: str) -> float:
        """Return the fraction of the weights of one parameter that the recipe's method leaves."""
        return self.pruned.get(self.origin[name], 1.0)

    @property
    def wider(self) -> float:
        """Target width / base width."""
        return self.scale.width / self.base.width

    @property
    def deeper(self) -> float:
        """Target depth / base depth, m_L."""
        return self.scale.depth / self.base.depth

    def repeated(self, origin: str) -> float:
        """Return m_L for a parameter of the base: by how much the target's depth multiplies the number of its residual branches.

        It is 1 for a branch that occurs only once; if there are two stacks, each has its own m_L.
        """
        spec = self.seen.specs[origin]
        if spec.layer:
            base_layers, target_layers = self._layers[spec.layer[:-1]]
            return target_layers / base_layers
        a, b = spec.rounds
        return (a + b * self.scale.depth) / (a + b * self.base.depth)

    @cached_property
    def _layers(self) -> dict[tuple[str, ...], tuple[int, int]]:
        """Return, for each stack, how many layers with residual branches the base and the target have."""
        layers: dict[tuple[str, ...], tuple[set[Any], set[Any]]] = defaultdict(lambda: (set(), set()))
        for spec in self.seen.specs.values():
            if spec.layer and spec.inside:
                layers[spec.layer[:-1]][0].add(spec.layer)
        for name, origin in self.origin.items():
            spec = self.seen.specs[origin]
            if spec.layer and spec.inside:
                layers[spec.layer[:-1]][1].add(tuple(name.split(".")[: len(spec.layer)]))
        return {stack: (len(base), len(target)) for stack, (base, target) in layers.items()}

    @cached_property
    def _backward(self) -> float:
        """Return the factor of the gradients that the readout passes back, relative to µP's 1/m.

        They are proportional to the readout's weights. Where the shape caps initial weights, a readout that is wider than its
        number of logits starts at 1/fan-in, as in µP; one with more logits starts at fan-in^-1/2. Of several readouts, the one
        with the largest weights counts.
        """
        sizes = [
            self.rules.rows["output"].init(*self.multipliers(name)) * _aspect(spec, shape) * self.multipliers(name)[0]
            for name, shape in self.shapes.items()
            if (spec := self.spec(name)).role == "output" and len(shape) > 1
        ]
        return max(sizes, default=1.0)

    def spec(self, name: str) -> ParamSpec:
        """Return the spec of the base model's parameter that ``name`` is scaled from."""
        return self.seen.specs[self.origin[name]]

    def multipliers(self, name: str) -> tuple[float, float]:
        """Return (m_in, m_out) of one parameter of the target."""
        return self.spec(name).multipliers(self.shapes[name], name, self.deeper, apart=name in self.apart)

    def fold(self, names: Iterable[str], size: float = 1.0, alpha: float = 1.0) -> None:
        """Fold multipliers into the target's parameters that are scaled from the base model's ``names``."""
        if size == 1 and alpha == 1:
            return
        chosen = set(names)
        for name, origin in self.origin.items():
            if origin in chosen:
                kind = self.rule.of(self.spec(name)).fold
                self.size[name] = self.size[name].folded(size, kind)
                self.alpha[name] = self.alpha[name].folded(alpha, kind)

    def _size(self, name: str) -> Factors:
        """Return the table's factors: for the width and, on residual branches, for the depth."""
        spec, rule = self.spec(name), self.rule.of(self.spec(name))
        self._plan_columns(name)
        m = self.multipliers(name)
        row = self.rules.rows[spec.role]
        init = row.init(*m) * (_aspect(spec, self.shapes[name]) if self.rules.aspect else 1.0)
        density = self._density(name)
        init *= density**-0.5
        growth = Growth(m, spec.shape, self.shapes[name], init)
        lr, eps = rule.lr(row, growth), rule.eps(row, growth)
        lr /= density
        if self.rules.aspect and spec.role in ("input", "vector", "hidden"):
            eps *= self._backward if rule.eps_of_gradient else 1.0
            lr /= self._backward if rule.column == "sgd" else 1.0
        if self.rules.depth is not None and spec.inside:
            deeper = self.repeated(self.origin[name])
            lr *= deeper ** float(self.rules.depth.lr(rule.column))
            eps *= deeper ** float(self.rules.depth.eps) if rule.eps_of_gradient else 1.0
        if spec.mixed and m != (1.0, 1.0) and rule.column != "adam":
            raise LayerError(
                f"{name} {list(self.shapes[name])} is one matrix whose rows have different roles (some grow with the width, "
                f"some do not), and {self.rule.name} needs a learning rate for each: split it, or use adamw."
            )
        if spec.mixed and m != (1.0, 1.0):
            eps = 1.0
            self.notes.append(f"{name} has rows of different roles: its epsilon is not scaled.")
        decay = rule.decay(lr, growth) ** DECAY_POLICIES[self.recipe.decay_policy]
        return Factors(init, lr, decay, eps, row.gauge(*m))

    def _plan_columns(self, name: str) -> None:
        """Give fixed columns next to growing ones their own factors, by a forward multiplier on the inputs that they meet.

        A tensor has one learning rate. With a multiplier c on their inputs, fixed columns learn at the rate that their role
        would have in a parameter of its own (`fold`). If a role is given, all columns share one ratio, and a note says so.

        Raises:
            LayerError: no multiplier has this effect, or none can be registered.
        """
        spec, shape, rule = self.spec(name), self.shapes[name], self.rule.of(self.spec(name))
        if not spec.columns:
            return
        m = spec.multipliers(shape, name, self.deeper, apart=True)
        fixed = spec.role_of_fixed
        (row, lr), (fixed_row, fixed_lr) = (
            (row, rule.lr(row, Growth(m_, spec.shape, shape, row.init(*m_))))
            for row, m_ in ((self.rules.rows[spec.role], m), (self.rules.rows[fixed], (1.0, m[1])))
        )
        if lr == fixed_lr and not (rule.fold == "muon" and row.spectral):
            return
        described = spec.describe_columns(shape)
        if spec.insisted:
            self.notes.append(
                f"{name} {list(shape)} uses one ratio for all of its columns because its role is given, although {described}: "
                f"the latter should have {fixed_lr / lr:g} times the learning rate."
            )
            return
        power, decay_power, _ = FOLDS[rule.fold]
        c = (fixed_lr / lr) ** (1 / power) if power else 1.0
        decays = [
            rule.decay(each, Growth(m, spec.shape, shape, 1.0)) ** DECAY_POLICIES[self.recipe.decay_policy]
            for each in (lr, fixed_lr)
        ]
        why = spec.unsplittable
        if rule.fold not in ("adam", "adam-l2", "sgd"):
            why = f"{self.rule.name} updates a matrix as a whole"
        elif sum(each.grows for each in spec.columns) > 1:
            why = "there are several growing pieces"
        elif self.rules.aspect:
            why = f"{self.rules.name} scales a matrix by its whole shape"
        elif self.recipe.weight_decay and not math.isclose(decays[0], decays[1] * c**-decay_power):
            why = f"their weight decay under decay_policy {self.recipe.decay_policy!r} differs as well"
        elif self._density(name) != 1:
            why = "it is sparse"
        if why:
            raise LayerError(
                f"{name} {list(shape)} sums over two kinds of columns: {described}. {self.rules.name} scales the former as "
                f"{spec.role} and the latter as {fixed}, but a parameter has only one learning rate, and no multiplier on its "
                f"input makes up for that: {why}. {spec.split_advice(shape)} To use one ratio for all columns anyway, name the "
                f"role in the family, roles={{{name!r}: {spec.role!r}}}."
            )
        init, gauge = (getattr(fixed_row, key)(1.0, m[1]) / c / getattr(row, key)(*m) for key in ("init", "gauge"))
        self.apart[name] = (
            init,
            tuple(
                ColumnBlock(each.axis, each.begin, each.end, c, gauge)
                for each in spec.columns_at(shape)
                if not each.grows
            ),
        )
        self.notes.append(
            f"{name} {list(shape)} is planned with a forward multiplier of {c:g}: {described}, and the latter are scaled as "
            f"{fixed}. Call plan.attach(model) after building the model and before plan.initialize(model)."
        )

    def _density(self, name: str) -> float:
        """Return the density ratio m_ρ of one parameter, by which SµPar (2405.15743, Table 1) scales its remaining fan-in."""
        density = next((d for pattern, d in self.densities.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)
        density *= self.density(name) if self._scales_with_density else 1.0
        role, rule = self.spec(name).role, self.rule.of(self.spec(name))
        if density == 1:
            return density
        if not density > 0:
            raise RequestError(f"the density ratio of {name} is {density!r}: give a number greater than 0.")
        if role != "hidden" or not self.rules.sparse or rule.fold == "muon":
            why = (
                f"{name} has the role {role}"
                if role != "hidden"
                else f"{self.rules.name} with {rule.name} has no such rule"
            )
            raise RequestError(
                f"SµPar's rule for density {density:g} applies to hidden layers under µP, but {why}: leave it dense."
            )
        return density


def _aspect(spec: ParamSpec, shape: tuple[int, ...]) -> float:
    """Return by how much min(1, √(out/in)) of a matrix changes from the base's shape to ``shape``."""

    def capped(sizes: tuple[int, ...]) -> float:
        fan = {
            label: math.prod(n for n, each in zip(sizes, spec.axes, strict=True) if each == label)
            for label in spec.axes
        }
        return min(1.0, math.sqrt(fan.get("out", 1) / fan["in"])) if "in" in fan else 1.0

    return capped(shape) / capped(spec.shape)


def fold_all(builder: PlanBuilder) -> None:
    """Fold every multiplier that the table, the recipe and the model's own forward pass require into parameters.

    Raises:
        LayerError: no parameter can absorb a multiplier, or the one that could is also used elsewhere.
    """
    _fold_constants(builder)
    _fold_ends(builder)
    _fold_sizes(builder)
    _fold_ties(builder)
    _fold_attention(builder)
    _fold_dots(builder)
    _fold_branches(builder)


def _fold_constants(builder: PlanBuilder) -> None:
    """Divide out multipliers in the model's own forward pass that grow with the width (such as √width on embeddings)."""
    if not builder.rules.divides_out:
        return
    for name, spec in builder.seen.specs.items():
        c = builder.wider**-spec.constant
        builder.fold([name], size=c)
        if c != 1:
            builder.notes.append(
                f"the forward pass multiplies {name} by width^{spec.constant:g}: divided out of its settings ({c:.4g})."
            )


def _fold_ends(builder: PlanBuilder) -> None:
    """Fold alpha_input and alpha_output into the input and readout matrices, or into the g of weight-normalized ones."""
    sized = {spec.sizes: name for name, spec in builder.seen.specs.items() if spec.sizes}
    for name, spec in builder.seen.specs.items():
        if spec.role == "output":
            builder.fold([sized.get(name, name)], alpha=builder.recipe.alpha_output)
        elif spec.role in ("input", "finite") and spec.on_data and len(spec.shape) > 1 and not spec.sizes:
            builder.fold([sized.get(name, name)], alpha=builder.recipe.alpha_input)


def _fold_sizes(builder: PlanBuilder) -> None:
    """Give the rows of a weight-normalized matrix the norm that the table would give those of the plain matrix.

    The g of a row is its norm. A row of n entries with standard deviation s has norm s·√n: fan-in initialization keeps it
    constant, a readout's initialization does not.
    """
    for name, spec in builder.seen.specs.items():
        if not spec.sizes:
            continue
        target = next(each for each, origin in builder.origin.items() if origin == spec.sizes)
        m_in, m_out = builder.multipliers(target)
        builder.fold([name], size=builder.rules.rows[builder.spec(target).role].init(m_in, m_out) * m_in**0.5)


def _fold_ties(builder: PlanBuilder) -> None:
    """Fold the readout's multiplier of a matrix that is also the embedding into the final norm."""
    for name, spec in builder.seen.specs.items():
        if not spec.tied:
            continue
        target = next(each for each, origin in builder.origin.items() if origin == name)
        # Factors folded into the matrix as an embedding (a constant, alpha_input) also act in the readout: divide them out.
        m = builder.multipliers(target)[1]
        size = builder.rules.readout(m, 1.0) / builder.size[target].gauge * builder.wider**-spec.readout_constant
        alpha = builder.recipe.alpha_output / builder.alpha[target].gauge
        if size == 1 and alpha == 1:
            continue
        if not spec.carriers:
            raise LayerError(
                f"the readout is tied to {name}, but no parameter before it can absorb its factor {size * alpha:g}: give "
                "the model a final norm with a gain, or untie the readout."
            )
        _refuse_other_use(builder.seen, spec, name)
        builder.fold(spec.carriers, size=size, alpha=alpha)
        if size != 1:
            builder.notes.append(
                f"tied readout: its factor {size:g} is folded into {', '.join(sorted(spec.carriers))}."
            )


def _refuse_other_use(seen: Observation, tied: ParamSpec, readout: str) -> None:
    """Raise if a carrier also feeds something besides the readout, which would be scaled with it."""
    also = [name for name, spec in seen.specs.items() if name != readout and spec.meets & tied.carriers]
    if also or tied.shared_carriers:
        fed = also[0] if also else "something else"
        raise LayerError(
            f"the readout tied to {readout} passes its factor to {min(tied.carriers)}, which also feeds {fed}: give the "
            "readout its own norm, or untie it."
        )


def _fold_attention(builder: PlanBuilder) -> None:
    """Turn the model's own scaling of attention into α·√d₀/d by scaling the queries, where the head dim d grows.

    TP-V 2203.03466, Definition 4.1. The factor is relative to 1/√d; a model that already divides by d needs none.
    """
    seen, alpha = builder.seen, builder.recipe.alpha_attention
    if seen.heads.dim is None:
        if alpha != 1:
            raise RequestError(f"alpha_attention is {alpha:g}, but no attention was found in the model: leave it at 1.")
        return
    m_h = seen.heads.ratio
    c = builder.rules.attention(m_h, 1.0) ** (2 * (1 + seen.heads.power))  # the table is relative to 1/√d
    if c == 1 and alpha == 1:
        return
    if seen.shared_queries:
        raise LayerError(
            f"attention needs a factor {c * alpha:.4g} on the queries alone, but {min(seen.shared_queries)} "
            "also produces keys, values or something else: use a separate query "
            "projection, or keep the head dim fixed and alpha_attention at 1."
        )
    if not seen.queries:
        raise LayerError(
            "attention needs a factor on the queries, but no parameter can absorb it: use a query projection."
        )
    builder.fold(seen.queries, size=c, alpha=alpha)
    if c != 1:
        builder.notes.append(f"head dim grows {m_h:g}x: 1/d attention is folded into the queries ({c:.4g}).")


def _fold_dots(builder: PlanBuilder) -> None:
    """Scale every other dot product of activations whose length grew m times by 1/m, as for attention's logits."""
    for each in builder.seen.dots:
        c = builder.rules.attention(each.ratio, 1.0) ** (2 * (1 + each.power))
        if c == 1:
            continue
        if not each.carriers or any(builder.seen.specs[name].mixed for name in each.carriers):
            raise LayerError(each.refusal(c))
        builder.fold(each.carriers, size=c**0.5 if each.both else c)
        builder.notes.append(
            f"the result of {', '.join(sorted(each.carriers))} is multiplied by other activations and summed over "
            f"{each.ratio:g} times as many entries: a factor {c:.4g} is folded into {'both sides' if each.both else 'it'}."
        )


def _fold_branches(builder: PlanBuilder) -> None:
    """Fold the multiplier of residual branches, m_L^-α times the recipe's own, into the parameters that end each branch."""
    power = builder.rules.depth
    alpha = builder.recipe.alpha_residual
    ends = sorted(name for name, spec in builder.seen.specs.items() if spec.ends_branch)
    if power is None and builder.deeper != 1:
        builder.notes.append(builder.rules.without_depth(builder.base.depth, builder.scale.depth))
    if power is not None:
        _fold_depth_constants(builder)

    def size(name: str) -> float:
        return 1.0 if power is None else builder.repeated(name) ** float(power.branch)

    asked = 1.0 if power is None else builder.deeper ** float(power.branch)
    if asked == 1 and alpha == 1:
        return
    open_branches = [name for name in builder.seen.open_branches if size(name) != 1 or alpha != 1]
    if not ends or open_branches:
        found = (
            f"no parameter can absorb it in the branch of {open_branches[0]}"
            if open_branches
            else "no residual branch was found"
        )
        raise LayerError(
            f"residual branches need a factor {asked * alpha:.4g}, but {found}: end every branch in a linear layer or a gain."
        )
    for name in ends:
        if size(name) != 1 or alpha != 1:
            _refuse_way_out(builder.seen.specs[name])
            builder.fold([name], size=size(name), alpha=alpha)
    if once := [name for name in ends if asked != 1 and size(name) == 1]:
        builder.notes.append(
            f"{', '.join(once[:3])}{f' and {len(once) - 3} more' if once[3:] else ''}: the residual branch is not repeated with "
            "depth, so its scale is unchanged."
        )


def _fold_depth_constants(builder: PlanBuilder) -> None:
    """Divide out multipliers in the model's forward pass that change with depth; the table decides how branches shrink."""
    powers = {name: spec.depth_constant for name, spec in builder.seen.specs.items() if spec.depth_constant}
    for power in sorted(set(powers.values())):
        names = [name for name, each in powers.items() if each == power]
        c = builder.deeper**-power
        builder.fold(names, size=c)
        if c != 1:
            builder.notes.append(
                f"the forward pass multiplies {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} by "
                f"depth^{power:g}: divided out of their settings ({c:.4g})."
            )


def _refuse_way_out(spec: ParamSpec) -> None:
    if not spec.inside:
        raise LayerError(
            f"{spec.name} ends a residual branch and is also used outside of it: give the branch its own layer."
        )
