"""From MODEL on the command line to a family and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..family import Family
    from ..proxies.data import Data


def family_for(
    model: str,
    data: str | None,
    base_width: int | None,
    base_depth: int | None,
    *,
    default_width: int | None = None,
    batch_size: int = 32,
    sequence_length: int = 32,
    options: dict[str, Any] | None = None,
) -> tuple[Family, Data | None]:
    """Return the family that MODEL names, anchored at the base asked for, and the data it reads.

    Built-in models have default data, depth and (if ``default_width`` is given) base width; others bring their own.
    """
    from ..proxies.builtin import DEFAULT_DATA, DEFAULT_DEPTH
    from ..proxies.data import load_data
    from ..proxies.reference import load_family
    from ..scale import Scale

    source = load_data(data or DEFAULT_DATA[model], sequence_length) if data or model in DEFAULT_DATA else None
    if model in DEFAULT_DATA:
        base_width, base_depth = base_width or default_width, base_depth or DEFAULT_DEPTH[model]
    base = Scale(base_width, base_depth or 2) if base_width else None
    family = load_family(model, source, base, batch_size=batch_size, options=options)
    return (family if base_depth is None else family.with_base(family.base.with_(depth=base_depth))), source
