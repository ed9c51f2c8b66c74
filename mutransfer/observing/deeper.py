"""Powers of the depth in the numbers that the forward pass multiplies with, such as a model's own 1/√layers on its branches."""

from __future__ import annotations

from dataclasses import replace

from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import RequestError
from ..family import Family
from ..inits import InitWatcher
from ..scale import Scale
from .constants import common, constants, loose
from .observe import LAYERS, _forward, build
from .specs import Observation
from .uses import UseWatcher

__all__ = ["with_depth_constants"]

DEEPER = 2


def with_depth_constants(family: Family, seen: Observation) -> Observation:
    """Return ``seen`` with the power of the depth in what multiplies each parameter's result.

    Raises:
        RequestError: the layers of one stack multiply with different powers of their number.
    """
    if seen.depths_compared:
        return seen
    shallow = family.base.with_(depth=min(family.base.depth, LAYERS))
    deep = shallow.with_(depth=DEEPER * shallow.depth)
    try:
        few, many = (_watched(family, scale) for scale in (shallow, deep))
    except RequestError:  # some models have one depth, or a least one
        return replace(seen, depths_compared=True)
    uses, more = few.uses(), many.uses()
    powers: dict[str, set[float]] = {}
    for name, each in uses.items():
        if name in more:
            powers.setdefault(_template(name), set()).add(common(constants(each, more[name], DEEPER)).power)
    torn = sorted(template for template, found in powers.items() if len(found) > 1)
    if torn:
        raise RequestError(
            f"the forward pass multiplies {torn[0]} with different powers of the depth ({sorted(powers[torn[0]])}) in different "
            "layers, and a rule for the depth needs one: multiply all layers alike."
        )
    specs = {
        name: replace(spec, depth_constant=next(iter(powers.get(_template(name), {0.0}))))
        for name, spec in seen.specs.items()
    }
    notes = [
        f"the forward pass multiplies with a number that grows as depth^{power:+.2f} and that no parameter carries: it is left "
        "as it is, so check it."
        for power in loose(few.factors, many.factors, DEEPER)
    ]
    return replace(seen, specs=specs, notes=(*seen.notes, *notes), depths_compared=True)


def _watched(family: Family, scale: Scale) -> UseWatcher:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with InitWatcher() as inits:
            model = build(family, scale)
        return _forward(family, model, mode, scale, inits)


def _template(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
