"""From what was seen of a few layers to a model with many: what is watched need not be as deep as the base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from ..errors import RequestError
from ..initialization import Init
from .layers import match_layers
from .specs import Observation, kinds

__all__ = ["stretched"]


def stretched(
    seen: Observation, shapes: Mapping[str, tuple[int, ...]], inits: Mapping[str, Init]
) -> Observation | None:
    """Return what is known of a deeper model of the same width, or None where its layers are not those seen.

    Args:
        seen: of the shallow model.
        shapes: of the deep model's parameters, by name.
        inits: likewise; its own initialization is kept, as that may depend on the depth.
    """
    try:
        origin = match_layers(
            {name: len(shape) for name, shape in shapes.items()},
            {name: len(spec.shape) for name, spec in seen.specs.items()},
            lambda name, origin: shapes[name] == seen.specs[origin].shape,
            kinds(seen.specs),
        )
    except RequestError:
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
        for names in (spec.carriers, spec.meets, spec.busy_carriers)
    }
    specs = {}
    for name, seen_name in origin.items():
        spec = seen.specs[seen_name]
        sizes = next((each for each in copies.get(spec.sizes, ()) if _siblings(each, name)), "")
        carriers, meets, busy = sets[spec.carriers], sets[spec.meets], sets[spec.busy_carriers]
        specs[name] = replace(
            spec, name=name, init=inits[name], carriers=carriers, meets=meets, busy_carriers=busy, sizes=sizes
        )
    dots = tuple(replace(each, carriers=all_of(each.carriers)) for each in seen.dots)
    return replace(
        seen, specs=specs, queries=all_of(seen.queries), shared_queries=all_of(seen.shared_queries), dots=dots
    )


def _siblings(a: str, b: str) -> bool:
    return a.rpartition(".")[0] == b.rpartition(".")[0]
