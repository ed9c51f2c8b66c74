"""Determine what every parameter of a family is used for, by tracing a forward pass at two widths rather than from names.

The family need not be observed at its base's depth: a few layers are enough if the deeper ones match them. What depends on the
target (its head dim, and constants in the forward pass that are powers of the depth) is added by `at_target` and
`with_depth_constants`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from .._torch_internals import ConvNd
from ..errors import BuildError, LayerError, ModelError, RoleError
from ..family import Family
from ..initialization import Init, InitTracer
from ..param_names import pattern_of
from ..recipe import Scale
from .aliases import uneven, union
from .columns import Columns, Joins, Labels, mixed_columns
from .dataflow import Use
from .growing_products import Heads, at_sizes, compared, contractions, in_attention
from .residual import residual_branches, unrecognized_branches
from .roles import check_patterns, check_roles, possible, role_given, roles_of, settled, unused
from .run import LAYERS, WIDER, build, forward, on_fake_tensors
from .scales import SizePower, common, constants, loose
from .specs import Observation, ParamSpec, kinds, match_layers
from .tracer import ForwardPass

__all__ = ["at_target", "observe", "observe_in_full", "shapes_of", "extended_in_depth", "with_depth_constants"]

DEEPER, FEW = 2, 4
LONG = 8  # base depth from which doubling is enough to see which layers repeat


def with_depth_constants(family: Family, seen: Observation) -> Observation:
    """Return ``seen`` with the information that depends on the depth.

    Added are the power of the depth in the constant that multiplies each parameter's output (−½ for 1/√layers), and how often
    each residual branch is repeated.

    Raises:
        LayerError: the layers of one stack multiply by different powers of the depth.
    """
    if seen.depths_compared:
        return seen
    shallow = family.base.with_(depth=min(family.base.depth, LAYERS))
    deep = shallow.with_(depth=DEEPER * shallow.depth)
    try:
        few, many = (_watched(family, scale, seen.seed) for scale in (shallow, deep))
    except BuildError:  # some models have a fixed or minimum depth
        return replace(seen, depths_compared=True)
    uses, more = few.uses(), many.uses()
    powers: dict[str, set[float]] = {}
    for name, each in uses.items():
        if name in more:
            powers.setdefault(pattern_of(name), set()).add(common(constants(each, more[name], DEEPER)).power)
    conflicting = sorted(template for template, found in powers.items() if len(found) > 1)
    if conflicting:
        raise LayerError(
            f"the forward pass multiplies {conflicting[0]} by different powers of the depth "
            f"({sorted(powers[conflicting[0]])}) in different layers, but a rule for the depth needs a single one: use the "
            "same multiplier in all layers."
        )
    layers, rounds = _layers(family, seen), _rounds(few, many, shallow.depth, deep.depth)
    specs = {
        name: replace(
            spec,
            depth_constant=next(iter(powers.get(pattern_of(name), {0.0}))),
            layer=layers.get(name, ()),
            rounds=rounds.get(name, spec.rounds),
        )
        for name, spec in seen.specs.items()
    }
    notes = [
        f"the forward pass multiplies by a number that grows as depth^{power:+.2f} and acts on no parameter's result: it is "
        "left unchanged, so check it."
        for power in loose(few.scales, many.scales, DEEPER)
    ]
    return replace(seen, specs=specs, notes=(*seen.notes, *notes), depths_compared=True)


def _layers(family: Family, seen: Observation) -> dict[str, tuple[str, ...]]:
    """Return the innermost layer that each parameter belongs to, if a deeper model has more layers of its kind."""
    deeper = FEW if family.base.depth < LONG else DEEPER  # one layer in eight may be of another kind
    try:
        with on_fake_tensors():
            names = shapes_of(build(family, family.base.with_(depth=deeper * family.base.depth))).keys()
    except BuildError:
        return {}
    counts, more = (Counter(map(pattern_of, each)) for each in (seen.specs, names))
    length, longer = _stacks(seen.specs), _stacks(names)
    found = {}
    for name in seen.specs:
        parts = tuple(name.split("."))
        grows = [i for i in range(len(parts)) if longer.get(parts[:i], set()) - length.get(parts[:i], set())]
        if more[pattern_of(name)] > counts[pattern_of(name)] and grows:
            found[name] = parts[: grows[-1] + 1]
    return found


def _stacks(names: Iterable[str]) -> dict[tuple[str, ...], set[str]]:
    """Return the layer numbers that follow each prefix of a name."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        parts = tuple(name.split("."))
        for i, part in enumerate(parts):
            if part.isdecimal():
                found[parts[:i]].add(part)
    return found


def _rounds(few: ForwardPass, many: ForwardPass, shallow: int, deep: int) -> dict[str, tuple[float, float]]:
    """Return (a, b) for every parameter that is on a + b·depth residual branches."""
    before, after = (
        Counter(name for branch in residual_branches(each.graph, each.uses()) for name in branch.inside)
        for each in (few, many)
    )
    found = {}
    for name, count in before.items():
        slope = (after[name] - count) / (deep - shallow)
        if name in after and slope >= 0:
            found[name] = count - slope * shallow, slope
    return found


def at_target(family: Family, seen: Observation, scale: Scale) -> Observation:
    """Return ``seen`` with the head dims of the model at ``scale``, traced with as many layers as the base.

    Raises:
        LayerError: as in `compared`.
        BuildError: the model cannot be built at ``scale``, or does not run.
    """
    if not seen.attentions and not seen.dots:
        return seen
    if scale.width == family.base.width:
        return replace(seen, heads=Heads(seen.heads.dim), dots=tuple(replace(each, ratio=1.0) for each in seen.dots))
    few = family.base.with_(width=scale.width, depth=min(family.base.depth, LAYERS))
    try:
        target = _watched(family, few, seen.seed)
    except BuildError:  # some models have a minimum depth
        few = few.with_(depth=family.base.depth)
        target = _watched(family, few, seen.seed)
    if len(target.dots.attentions) != len(seen.attentions):
        few = few.with_(depth=family.base.depth)
        target = _watched(family, few, seen.seed)
    dots = (
        at_sizes(seen.dots, _watched(family, few.with_(width=family.base.width), seen.seed), target)
        if seen.dots
        else ()
    )
    return replace(seen, heads=compared(seen.attentions, target.dots.attentions), dots=dots)


def _watched(family: Family, scale: Scale, seed: int) -> ForwardPass:
    with on_fake_tensors():
        with InitTracer() as inits:
            model = build(family, scale)
        return forward(family, model, scale, inits, seed)


def extended_in_depth(
    seen: Observation, shapes: Mapping[str, tuple[int, ...]], inits: Mapping[str, Init]
) -> Observation | None:
    """Return the observation of a deeper model of the same width, or None if its layers do not match those observed.

    Args:
        seen: the observation of the shallow model.
        shapes: shapes of the deep model's parameters, by name.
        inits: initializations of the deep model's parameters, by name; they are kept, as they may depend on the depth.
    """
    try:
        origin = match_layers(
            {name: len(shape) for name, shape in shapes.items()},
            {name: len(spec.shape) for name, spec in seen.specs.items()},
            lambda name, origin: shapes[name] == seen.specs[origin].shape,
            kinds(seen.specs),
        )
    except LayerError:
        return None
    if any(seen.specs[origin[name]].shape != shape for name, shape in shapes.items()):
        return None
    copies: dict[str, set[str]] = defaultdict(set)
    for name, seen_name in origin.items():
        copies[seen_name].add(name)

    def all_of(names: frozenset[str]) -> frozenset[str]:
        return frozenset().union(*(copies[name] for name in names))

    sets = {
        names: all_of(names)
        for spec in seen.specs.values()
        for names in (spec.carriers, spec.meets, spec.shared_carriers)
    }
    specs = {}
    for name, seen_name in origin.items():
        spec = seen.specs[seen_name]
        sizes = next((each for each in copies.get(spec.sizes, ()) if _siblings(each, name)), "")
        carriers, meets, shared = sets[spec.carriers], sets[spec.meets], sets[spec.shared_carriers]
        specs[name] = replace(
            spec, name=name, init=inits[name], carriers=carriers, meets=meets, shared_carriers=shared, sizes=sizes
        )
    dots = tuple(replace(each, carriers=all_of(each.carriers)) for each in seen.dots)
    return replace(
        seen, specs=specs, queries=all_of(seen.queries), shared_queries=all_of(seen.shared_queries), dots=dots
    )


def _siblings(a: str, b: str) -> bool:
    return a.rpartition(".")[0] == b.rpartition(".")[0]


_Met = tuple[Joins, list[tuple[Labels, ...]], list[Use]]  # joins, labels and uses of one parameter in one pass
PASSES = 8  # forward passes of a model that draws random numbers or seems not to use a parameter
MOST_PASSES = 32  # limit while a parameter is unused whose role only its use can determine


def observe(family: Family) -> Observation:
    """Observe the family at base size, using only the first few layers of a deep base if the others match them.

    The builds and the forward pass run on fake tensors, so nothing is allocated. The exception is a forward pass that reads
    values (such as the experts chosen by a router): it is run for real if the model is small, and refused otherwise.

    Raises:
        RoleError: the role of a parameter cannot be determined; the message gives its name and shape and the operation.
        InitError: the initialization of a parameter cannot be determined.
        LayerError: a parameter or an attention layer exists at one width only.
        BuildError: the model cannot be built, or does not run on the example batch.
    """
    family = family.printing_once()
    if family.base.depth > LAYERS:
        with on_fake_tensors(), InitTracer() as inits:
            model = build(family, family.base)
        try:
            seen = observe_in_full(family.with_base(family.base.with_(depth=LAYERS)))
        except ModelError:  # a few layers may not build, or may leave parameters unused that the whole model uses
            return observe_in_full(family)
        return extended_in_depth(seen, shapes_of(model), inits.named(model)) or observe_in_full(family)
    return observe_in_full(family)


def observe_in_full(family: Family) -> Observation:
    """Observe ``family`` with every layer of its base model; see `observe`, which saves time on deep ones."""
    wider_base = family.base.with_(width=WIDER * family.base.width)
    inits = InitTracer()
    with on_fake_tensors():
        with inits:
            model = build(family, family.base)
        with InitTracer() as wider_inits:
            wider = build(family, wider_base)
        shapes, wide = shapes_of(model), shapes_of(wider)
        if wide.keys() != shapes.keys():
            unmatched = sorted(wide.keys() ^ shapes.keys())[0]
            raise LayerError(
                f"{unmatched} exists at one width but not at the other: a family must have the same parameters at all widths."
            )
        check_patterns(check_roles(family.roles, f"roles of {family.name}"), shapes, family.name)
        one = forward(family, model, family.base, inits)
        other = forward(family, wider, wider_base, wider_inits)
        passes = [(one, other, 0)]
        if one.draws or other.draws or _has_undetermined_role(family, model, wide, one.used() & other.used()):
            seen, seen_wider = [one], [other]
            while len(seen) < PASSES or (
                len(seen) < MOST_PASSES and _has_undetermined_role(family, model, wide, _used(passes))
            ):
                seed = len(seen)
                seen.append(forward(family, model, family.base, inits, seed))
                seen_wider.append(forward(family, wider, wider_base, wider_inits, seed))
                passes = _paired(seen, seen_wider)
    used = _used(passes)
    found = [
        replace(_observed(family, model, inits, shapes, wide, one, other, used - one.used()), seed=seed)
        for one, other, seed in passes
    ]
    if len(found) == 1:
        return found[0]
    counts = {name: sum(name in each.used() for each in seen) for name in shapes if name in used}
    return _merged(found, {name: count for name, count in counts.items() if count < len(seen)}, len(seen))


def _used(passes: Sequence[tuple[ForwardPass, ForwardPass, int]]) -> frozenset[str]:
    return frozenset().union(*(one.used() for one, _, _ in passes))


def _has_undetermined_role(
    family: Family, model: torch.nn.Module, wide: Mapping[str, tuple[int, ...]], used: Collection[str]
) -> bool:
    """Return whether there is an unused parameter whose role cannot be inferred from its shape.

    Such a parameter may be skipped at random, so more passes may use it.
    """
    for name, shape in shapes_of(model).items():
        if name not in used and role_given(family.roles, name) is None:
            grows = tuple(a != b for a, b in zip(shape, wide[name], strict=True))
            if unused(shape, grows, layer=_is_layer(model, name)) is None:
                return True
    return False


def _paired(seen: Sequence[ForwardPass], wider: Sequence[ForwardPass]) -> list[tuple[ForwardPass, ForwardPass, int]]:
    """Return passes that differ in the parameters they use, each with a pass of the wider model that uses the same ones.

    The pass that uses the most parameters comes first.
    """
    first, other = ({each.used(): i for i, each in reversed(list(enumerate(them)))} for them in (seen, wider))
    both = sorted(first.keys() & other.keys(), key=lambda used: (-len(used), first[used]))
    return [(seen[first[used]], wider[other[used]], first[used]) for used in both] or [(seen[0], wider[0], 0)]


def _merged(found: Sequence[Observation], skipped: Mapping[str, int], passes: int) -> Observation:
    """Merge the observations of passes that skip parts of the model at random.

    Each parameter is taken from a pass that uses it.
    """
    names = dict.fromkeys(name for each in found for name in each.specs)
    specs = {name: next(each.specs[name] for each in found if name in each.specs) for name in names}
    layers: dict[int, list[str]] = {}
    for name, count in skipped.items():
        layers.setdefault(count, []).append(name)
    notes = [
        f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if left[3:] else ''}: skipped at random, used in {count} of "
        f"{passes} forward passes; planned from these."
        for count, left in layers.items()
    ]
    return replace(
        found[0],
        specs=specs,
        queries=frozenset().union(*(each.queries for each in found)),
        shared_queries=frozenset().union(*(each.shared_queries for each in found)),
        open_branches=tuple(dict.fromkeys(name for each in found for name in each.open_branches)),
        notes=(*dict.fromkeys(note for each in found for note in each.notes), *notes),
    )


def _observed(
    family: Family, model: torch.nn.Module, inits: InitTracer, shapes: Mapping[str, tuple[int, ...]],
    wide: Mapping[str, tuple[int, ...]], seen: ForwardPass, seen_wider: ForwardPass, elsewhere: frozenset[str],
) -> Observation:  # fmt: skip
    """Compare one forward pass with a wider model's; parameters that are used only ``elsewhere`` are left out."""
    dots = contractions(seen, seen_wider, family.roles)
    dotted = seen.dotted()
    uses = seen.uses()
    branches = residual_branches(seen.graph, uses)
    inside = frozenset().union(*(branch.inside for branch in branches))
    ends = frozenset().union(*(seen.decode(branch.ends) for branch in branches))
    uses_wider = seen_wider.uses()
    found = {name: constants(each, uses_wider[name], WIDER) for name, each in uses.items()}
    scaled = in_attention(seen.dots.attentions, seen_wider.dots.attentions, WIDER)
    notes = [
        f"the forward pass multiplies by a number that grows as width^{power:+.2f} and acts on no parameter's result: it "
        "is left unchanged, so check it."
        for power in loose(seen.scales, seen_wider.scales, WIDER)
    ]
    apart = unrecognized_branches(
        seen.graph, uses, inside, {name: (shape, wide[name]) for name, shape in shapes.items()}
    )
    notes += [
        f"{name} was found on no residual branch, but {other} was: no rule for depth fits both."
        for name, other in apart
    ]
    mixed = _mixed(seen, seen_wider)
    columns, columns_wider = seen.columns(), seen_wider.columns()
    base_inits, specs = inits.named(model), {}
    for name, _ in model.named_parameters():
        if name not in shapes or name in elsewhere:
            continue
        grows = tuple(a != b for a, b in zip(shapes[name], wide[name], strict=True))
        if role_given(family.roles, name) is None and uses_wider[name]:
            last = len(uses_wider[name]) - 1  # the wider pass may use fewer of the experts that a router chooses
            uses[name] = [
                settled(name, shapes[name], wide[name], use, uses_wider[name][min(i, last)])
                for i, use in enumerate(uses[name])
            ]
        if not uses[name]:
            notes.append(
                f"{name} is not used in the example's forward pass: its role is inferred from its shape alone."
            )
        spec = _spec(
            family, name, shapes[name], grows, uses[name], base_inits[name], inside=name in inside, ends_branch=name in ends,
            layer=_is_layer(model, name),
            constants=found[name], dotted=name in dotted, in_attention=scaled.get(name, 0.0), mixed=name in mixed,
        )  # fmt: skip
        specs[name] = replace(
            spec,
            sizes=seen.magnitudes.get(name, ""),
            columns=_columns(
                grows,
                (seen.joins, columns[name], uses[name]),
                (seen_wider.joins, columns_wider[name], uses_wider[name]),
            ),
            insisted=role_given(family.roles, name) is not None,
            unsplittable=_unsplittable(model, name, seen.used_in(name)),
        )
        if (
            any(each != SizePower() for each in found[name])
            and not specs[name].constant
            and not specs[name].readout_constant
        ):
            notes.append(
                f"the forward pass multiplies the result of {name} by a number that grows with the width on some paths but not "
                "on all: it is left unchanged, so check it."
            )
    for name, spec in specs.items():
        if spec.tied:
            reads = {use.node for use in uses[name]}
            shared = frozenset(each for each in spec.carriers if any(use.takers - reads for use in uses[each]))
            specs[name] = replace(spec, shared_carriers=shared)
    return Observation(
        specs,
        queries=frozenset().union(*(each.queries for each in seen.dots.attentions)),
        shared_queries=frozenset().union(*(each.queries & each.others for each in seen.dots.attentions))
        | seen.shared_queries(),
        heads=compared(seen.dots.attentions, seen_wider.dots.attentions),
        attentions=tuple(seen.dots.attentions),
        dots=dots,
        open_branches=(*(min(branch.inside) for branch in branches if not branch.ends), *(name for name, _ in apart)),
        added_in={
            pattern_of(name): pattern_of(branch.added_in) for branch in branches for name in seen.decode(branch.ends)
        },
        notes=tuple(dict.fromkeys(notes)),
    )


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trainable parameter by name."""
    return {name: tuple(each.shape) for name, each in model.named_parameters() if each.requires_grad}


def _spec(
    family: Family, name: str, shape: tuple[int, ...], grows: tuple[bool, ...], uses: list[Use], init: Init, *,
    inside: bool, ends_branch: bool, constants: list[SizePower], in_attention: float, mixed: bool, layer: bool, dotted: bool,
) -> ParamSpec:  # fmt: skip
    roles: list[str] = []
    given = role_given(family.roles, name)
    if given is None and not uses:
        given = unused(shape, grows, layer=layer)
    if given is None:
        roles = roles_of(name, shape, grows, uses)
        tied = len(set(roles)) > 1
        first: Use | None = uses[roles.index("input")] if tied else uses[0]
        readout = uses[roles.index("output")] if tied else uses[0]
        axes, role = (readout if not tied else uses[roles.index("input")]).axes, "input" if tied else roles[0]
        carriers = readout.carriers if tied else frozenset()
    else:
        axes, role, tied, carriers = _axes_for(given, name, grows, uses, dotted), given, False, frozenset()
        first = uses[0] if uses else None
    into = [i for i in range(len(uses)) if not tied or roles[i] == "input"]
    shared = common([constants[i] for i in into])
    behind = common([constants[i] for i in range(len(uses)) if i not in into])
    return ParamSpec(
        name, shape, role, axes, grows, init, tied, carriers,
        on_data=first is not None and first.on_data,
        meets=frozenset().union(*(use.carriers for use in uses if "in" in use.axes)),
        inside=inside,
        ends_branch=ends_branch,
        shift=first.shift if first else 0.0,
        constant=round(shared.power + in_attention, 6),
        constant_inside=shared.inside,
        readout_constant=behind.power,
        mixed=mixed,
        turned=not tied and len({tuple(label == "in" for label in use.axes) for use in uses}) > 1,
    )  # fmt: skip


def _is_layer(model: torch.nn.Module, name: str) -> bool:
    """Return whether a parameter's module sums over its inputs, regardless of what was observed of the parameter."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return hasattr(owner, "in_features") or hasattr(owner, "in_channels")


def _axes_for(role: str, name: str, grows: tuple[bool, ...], uses: list[Use], dotted: bool) -> tuple[str, ...]:
    """Return the axes of a parameter whose role was given: as observed if they fit, otherwise as `nn.Linear` stores them.

    If its result is a side of a dot product (``dotted``) and its role is output, both of its axes are summed over.
    """
    seen = {label for grow, label in zip(grows, uses[0].axes, strict=True) if grow} if uses else {"unknown"}
    summed = role in ("hidden", "output", "bottleneck")
    if (
        "unknown" not in seen
        and ("in" in seen) == summed
        and bool(seen - {"in"}) == (role in ("input", "vector", "hidden"))
    ):
        return uses[0].axes
    growing = [axis for axis, grow in enumerate(grows) if grow]
    fitting = ["hidden"] if len(growing) > 1 and "in" in seen else possible(len(growing))
    if role not in fitting and not (dotted and role == "output"):
        raise RoleError(
            f"{name} was given the role {role}, but {len(growing)} of its axes grow with the width: use {' or '.join(fitting)}."
        )
    into = {"hidden": growing[-1:], "output": growing, "bottleneck": growing}.get(role, [])
    return tuple("in" if axis in into else "out" for axis in range(len(grows)))


def _columns(grows: tuple[bool, ...], base: _Met, wider: _Met) -> tuple[Columns, ...]:
    """Return which entries of a summed axis grow in number and which do not; empty if the axis has only one kind."""
    for axis in (axis for axis, each in enumerate(grows) if each):
        met = [
            [labels[axis] for labels, use in zip(columns, uses, strict=True) if labels and use.axes[axis] == "in"]
            for _, columns, uses in (base, wider)
        ]
        if all(met) and (found := mixed_columns(axis, (base[0], met[0]), (wider[0], met[1]))):
            return found
    return ()


def _unsplittable(model: torch.nn.Module, name: str, modules: set[str]) -> str:
    """Return why a hook of the owning module cannot multiply features of the parameter's input; empty if it can."""
    prefix, _, key = name.rpartition(".")
    owner = model.get_submodule(prefix)
    if key != "weight" or not isinstance(owner, torch.nn.Linear | ConvNd):
        return "it does not belong to a plain linear layer or convolution"
    if modules != {prefix}:
        return f"it is used outside of {prefix}'s own forward"
    return "its convolution is grouped" if getattr(owner, "groups", 1) > 1 else ""


def _mixed(seen: ForwardPass, wider: ForwardPass) -> frozenset[str]:
    """Return the parameters that are cut into pieces that grow differently, or whose results are."""
    found = list(uneven(seen.cuts, wider.cuts))
    parameters = seen.decode(union(1 << cut.index for cut in found if cut.index is not None))
    return parameters | seen.results_of(union(cut.direct for cut in found))
