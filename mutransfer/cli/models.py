"""From MODEL on the command line to a family and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..family import Family
    from ..proxies.data import Data
    from ..scale import Scale


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
    depth = base_depth or DEFAULT_DEPTH.get(model, 2)
    fallback = base_width or (default_width if model in DEFAULT_DATA else None)
    base = Scale(fallback, depth) if fallback else None
    if model not in DEFAULT_DATA:
        # A Family brings its own base, of which only what was asked for is replaced; a bare function needs one.
        own = load_own(model, source, base, batch_size, options)
        return own.with_base(
            own.base.with_(width=base_width or own.base.width, depth=base_depth or own.base.depth)
        ), source
    return load_family(model, source, base, batch_size=batch_size, options=options), source


def load_own(
    model: str, data: Data | None, base: Scale | None, batch_size: int, options: dict[str, Any] | None
) -> Family:
    """Return a user's family at the base it brings, or a bare build function's at ``base``."""
    from ..errors import RequestError
    from ..proxies.reference import load_family

    try:
        return load_family(model, data, None, batch_size=batch_size, options=options)
    except RequestError as error:
        if base is None or "has no base width" not in str(error):
            raise
    return load_family(model, data, base, batch_size=batch_size, options=options)
