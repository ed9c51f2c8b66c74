"""What every parameter of a family is for: seen in one forward pass and two builds, not guessed from names."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import RequestError
from ..family import Family
from ..inits import Init, InitWatcher
from .branches import residual_branches
from .noted import Use
from .overrides import check_patterns, check_roles, role_given
from .roles import roles_of, settled, unused
from .running import build, forward
from .specs import Observation, ParamSpec
from .stretch import stretched
from .uses import UseWatcher

__all__ = ["WIDER", "build", "observe", "shapes_of"]

WIDER = 2  # a doubled width keeps every divisibility the base has
LAYERS = 4  # of a deep base that are watched


def observe(family: Family) -> Observation:
    """Watch the family at base size; of a deep base only the first few layers, if the others are like them.

    Nothing is allocated: the builds and the forward pass run on fake tensors. Only a forward pass that reads values (the
    experts chosen by a router) is run for real, if the model is small.

    Raises:
        RequestError: a parameter whose role or initialization cannot be told, with its name, shape and the operation
            seen; or a model that does not run on the example batch.
    """
    if family.base.depth > LAYERS:
        with FakeTensorMode(allow_non_fake_inputs=True), InitWatcher() as inits:
            model = build(family, family.base)
        try:
            seen = _watch(family.with_base(family.base.with_(depth=LAYERS)))
        except RequestError:  # some models have a least depth
            return _watch(family)
        return stretched(seen, shapes_of(model), inits.named(model)) or _watch(family)
    return _watch(family)


def _watch(family: Family) -> Observation:
    wider_base = family.base.with_(width=WIDER * family.base.width)
    inits = InitWatcher()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with inits:
            model = build(family, family.base)
        with InitWatcher():  # as it answers a constructor that asks for values
            wider = build(family, wider_base)
        seen = forward(family, model, mode, family.base)
        seen_wider = forward(family, wider, mode, wider_base)
    shapes, wide = shapes_of(model), shapes_of(wider)
    if wide.keys() != shapes.keys():
        odd = sorted(wide.keys() ^ shapes.keys())[0]
        raise RequestError(
            f"{odd} is there at one width and not at the other: one family must have the same parameters."
        )
    check_patterns(check_roles(family.roles, f"roles of {family.name}"), shapes, family.name)
    uses = seen.uses()
    branches = residual_branches(seen.graph, uses)
    inside = frozenset().union(*(branch.inside for branch in branches))
    ends = frozenset().union(*(seen.decode(branch.ends) for branch in branches))
    constants, own, notes = _constants(seen, seen_wider)
    mixed = _mixed(seen, seen_wider)
    own_inits, specs, wide_uses = inits.named(model), {}, seen_wider.uses()
    for name, _ in model.named_parameters():
        if name not in shapes:
            continue
        grows = tuple(a != b for a, b in zip(shapes[name], wide[name], strict=True))
        if role_given(family.roles, name) is None and wide_uses[name]:
            last = len(wide_uses[name]) - 1  # of experts that a router chooses there may be fewer
            uses[name] = [
                settled(name, shapes[name], wide[name], use, wide_uses[name][min(i, last)])
                for i, use in enumerate(uses[name])
            ]
        if not uses[name]:
            notes.append(f"{name} is not used in the example's forward pass: its role is told from its shape alone.")
        specs[name] = _spec(
            family, name, shapes[name], grows, uses[name], own_inits[name], inside=name in inside, ends_branch=name in ends,
            layer=_is_layer(model, name),
            constant=constants.get(name, 0.0),
            constant_inside=name in own, mixed=name in mixed,
        )  # fmt: skip
    return _with_attention(specs, seen, seen_wider, sum(not branch.ends for branch in branches), notes)


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trainable parameter by name."""
    return {name: tuple(each.shape) for name, each in model.named_parameters() if each.requires_grad}


def _spec(
    family: Family, name: str, shape: tuple[int, ...], grows: tuple[bool, ...], uses: list[Use], init: Init, *,
    inside: bool, ends_branch: bool, constant: float, constant_inside: bool, mixed: bool, layer: bool,
) -> ParamSpec:  # fmt: skip
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
        axes, role, tied, carriers = _axes_for(given, name, grows, uses), given, False, frozenset()
        first = uses[0] if uses else None
    return ParamSpec(
        name, shape, role, axes, grows, init, tied, carriers,
        on_data=first is not None and first.on_data,
        meets=frozenset().union(*(use.carriers for use in uses if "in" in use.axes)),
        inside=inside,
        ends_branch=ends_branch,
        shift=first.shift if first else 0.0,
        constant=constant,
        constant_inside=constant_inside,
        mixed=mixed,
        turned=not tied and len({tuple(label == "in" for label in use.axes) for use in uses}) > 1,
    )  # fmt: skip


def _is_layer(model: torch.nn.Module, name: str) -> bool:
    """Say whether a parameter belongs to a module that sums over its inputs, whatever was seen of it."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return hasattr(owner, "in_features") or hasattr(owner, "in_channels")


def _axes_for(role: str, name: str, grows: tuple[bool, ...], uses: list[Use]) -> tuple[str, ...]:
    """Axes of a parameter whose role was given: as seen where that fits, else as `nn.Linear` stores them."""
    seen = {label for grow, label in zip(grows, uses[0].axes, strict=True) if grow} if uses else {"unknown"}
    summed = role in ("hidden", "output", "bottleneck")
    if (
        "unknown" not in seen
        and ("in" in seen) == summed
        and bool(seen - {"in"}) == (role not in ("output", "bottleneck"))
    ):
        return uses[0].axes
    growing = [axis for axis, grow in enumerate(grows) if grow]
    into = {"hidden": growing[-1:] if len(growing) > 1 else [], "output": growing, "bottleneck": growing}.get(role, [])
    if role in ("hidden", "output", "bottleneck") and not into:
        raise RequestError(
            f"{name} is called {role} and has no axis for it that grows with the width: name another role."
        )
    return tuple("in" if axis in into else "out" for axis in range(len(grows)))


def _constants(seen: UseWatcher, wider: UseWatcher) -> tuple[dict[str, float], set[str], list[str]]:
    """Powers of the width in the numbers that the forward pass multiplies with, by the parameters they could be written on."""
    powers: dict[str, float] = defaultdict(float)
    own, notes = set(), []
    for base, wide in zip(seen.constants(), wider.constants(), strict=False):
        ratio = wide.value / base.value if base.value else 1.0
        if base.carriers != wide.carriers or not ratio > 0 or abs(ratio - 1) < 1e-9:
            continue
        power = math.log(ratio, WIDER)
        if not base.carriers:
            notes.append(
                f"the forward pass multiplies with a number that grows as width^{power:+.2f} and that no parameter carries: it "
                "is left as it is, so check it."
            )
        for name in base.carriers:
            powers[name] += power
            own |= {name} if name.rpartition(".")[0] == base.module else set()
    for narrow, broad in zip(seen.attentions, wider.attentions, strict=False):
        if narrow.head_dim == broad.head_dim:  # such as 1/√hidden with a fixed head dim
            for name in narrow.queries:
                powers[name] += math.log(broad.scale / narrow.scale, WIDER)
    return {name: round(power, 6) for name, power in powers.items()}, own, notes


def _mixed(seen: UseWatcher, wider: UseWatcher) -> frozenset[str]:
    """Parameters that are cut into pieces that grow differently, or whose result is."""
    uneven = seen.parts.uneven(wider.parts)
    return frozenset().union(*(cut.owners | seen.used_by(cut.direct) for cut in uneven))


def _with_attention(
    specs: dict[str, ParamSpec], seen: UseWatcher, wider: UseWatcher, open_branches: int, notes: list[str]
) -> Observation:
    if len(seen.attentions) != len(wider.attentions):
        raise RequestError(
            "the number of attention layers depends on the width: build the same modules at every width."
        )
    pairs = list(zip(seen.attentions, wider.attentions, strict=True))
    dims = [(base.head_dim, wide.head_dim) for base, wide in pairs]
    if len({wide / base for base, wide in dims}) > 1:
        raise RequestError(
            f"attention layers differ in head dim ({sorted({base for base, _ in dims})}), and only some grow: use one for all."
        )
    powers = [math.log(b.scale / a.scale, b.head_dim / a.head_dim) for a, b in pairs if a.head_dim != b.head_dim]
    if powers and max(powers) - min(powers) > 1e-6:
        raise RequestError(
            f"attention layers scale their logits by different powers of the head dim ({sorted(powers)}): use one."
        )
    return Observation(
        specs,
        queries=frozenset().union(*(each.queries for each in seen.attentions)),
        shared_queries=frozenset().union(*(each.queries & each.others for each in seen.attentions)),
        head_dim=dims[0][0] if dims else None,
        head_dim_ratio=dims[0][1] / dims[0][0] if dims else 1.0,
        scale_power=round(powers[0], 6) if powers else -0.5,
        open_branches=open_branches,
        notes=tuple(dict.fromkeys(notes)),
    )
