"""What is read with the target in view: its head dim, and powers of the depth in the numbers of the forward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from ..errors import RequestError
from ..family import Family
from ..initialization import InitWatcher
from ..names import pattern_of
from ..scale import Scale
from .branches import residual_branches
from .building import on_fake_tensors
from .constants import common, constants, loose
from .contracted import at_sizes
from .heads import Heads, compared
from .observe import shapes_of
from .running import LAYERS, build, forward
from .specs import Observation
from .uses import UseWatcher

__all__ = ["at_target", "with_depth_constants"]

DEEPER, FEW = 2, 4
LONG = 8  # layers of a base that need not be made four times as many


def with_depth_constants(family: Family, seen: Observation) -> Observation:
    """Return ``seen`` with what depends on the depth.

    That is the power of the depth in what multiplies each parameter's result, such as 1/√layers, and how often a residual
    branch is repeated.

    Raises:
        RequestError: the layers of one stack multiply with different powers of their number.
    """
    if seen.depths_compared:
        return seen
    shallow = family.base.with_(depth=min(family.base.depth, LAYERS))
    deep = shallow.with_(depth=DEEPER * shallow.depth)
    try:
        few, many = (_watched(family, scale, seen.seed) for scale in (shallow, deep))
    except RequestError:  # some models have one depth, or a least one
        return replace(seen, depths_compared=True)
    uses, more = few.uses(), many.uses()
    powers: dict[str, set[float]] = {}
    for name, each in uses.items():
        if name in more:
            powers.setdefault(pattern_of(name), set()).add(common(constants(each, more[name], DEEPER)).power)
    torn = sorted(template for template, found in powers.items() if len(found) > 1)
    if torn:
        raise RequestError(
            f"the forward pass multiplies {torn[0]} with different powers of the depth ({sorted(powers[torn[0]])}) in different "
            "layers, and a rule for the depth needs one: multiply all layers alike."
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
        f"the forward pass multiplies with a number that grows as depth^{power:+.2f} and that no parameter carries: it is left "
        "as it is, so check it."
        for power in loose(few.factors, many.factors, DEEPER)
    ]
    return replace(seen, specs=specs, notes=(*seen.notes, *notes), depths_compared=True)


def _layers(family: Family, seen: Observation) -> dict[str, tuple[str, ...]]:
    """Return the layer that each parameter belongs to, if a deeper model has more of its kind: the innermost such."""
    deeper = FEW if family.base.depth < LONG else DEEPER  # one layer in eight may be of another kind
    try:
        with on_fake_tensors():
            names = shapes_of(build(family, family.base.with_(depth=deeper * family.base.depth))).keys()
    except RequestError:
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
    """Return the numbers that follow each beginning of a name."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        parts = tuple(name.split("."))
        for i, part in enumerate(parts):
            if part.isdecimal():
                found[parts[:i]].add(part)
    return found


def _rounds(few: UseWatcher, many: UseWatcher, shallow: int, deep: int) -> dict[str, tuple[float, float]]:
    """Return (a, b) of every parameter that is on a + b·depth residual branches."""
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
    """Return ``seen`` with the heads of the model at ``scale``, of which as many layers are watched as of the base.

    Raises:
        RequestError: as in `compared`.
    """
    if not seen.attentions and not seen.dots:
        return seen
    if scale.width == family.base.width:
        return replace(seen, heads=Heads(seen.heads.dim), dots=tuple(replace(each, ratio=1.0) for each in seen.dots))
    few = family.base.with_(width=scale.width, depth=min(family.base.depth, LAYERS))
    try:
        target = _watched(family, few, seen.seed)
    except RequestError:  # some models have a least depth
        few = few.with_(depth=family.base.depth)
        target = _watched(family, few, seen.seed)
    if len(target.attentions) != len(seen.attentions):
        few = few.with_(depth=family.base.depth)
        target = _watched(family, few, seen.seed)
    dots = (
        at_sizes(seen.dots, _watched(family, few.with_(width=family.base.width), seen.seed), target)
        if seen.dots
        else ()
    )
    return replace(seen, heads=compared(seen.attentions, target.attentions), dots=dots)


def _watched(family: Family, scale: Scale, seed: int) -> UseWatcher:
    with on_fake_tensors():
        with InitWatcher() as inits:
            model = build(family, scale)
        return forward(family, model, scale, inits, seed)
