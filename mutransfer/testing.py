"""The coordinate check as an assertion, for a test suite of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .coordinates import Check, judge
from .family import Family

__all__ = ["assert_coordinates_hold"]


def assert_coordinates_hold(
    family: Family,
    widths: Sequence[int] = (64, 128, 256, 512),
    parametrization: str = "mup",
    optimizer: str = "adamw",
    **options: Any,
) -> Check:
    """Assert that every module's size, and its change, moves with the width as stable feature learning needs.

    Args:
        family: what to check; its base is where µP changes nothing.
        widths: at least two; the base's family has to build at each. Leave it empty and pass ``depths`` for a check over depths.
        parametrization: as in `record`; "own" for a model that brings its own initialization.
        optimizer: as in `record`.
        options: further arguments of `coordinates.judge`, such as seeds, lr and steps.

    Returns:
        The check, whose ``coordinates`` can be kept.

    Raises:
        AssertionError: the verdict is not "pass": the cause, and the rows that do not hold.
        RequestError: as `record`.
    """
    check = judge(family, widths, parametrization, optimizer, **options)
    found = check.verdict
    if found.status != "pass":
        rows = found.slopes[~found.slopes["ok"].fillna(False).astype(bool)]
        columns = ["module", "role", "statistic", "step", "slope", "low", "high", "expected"]
        text = rows[columns].to_string(index=False, float_format="{:+.2f}".format)
        raise AssertionError(f"the coordinate check of {family.name} is {found.status}: {found.cause}\n{text}")
    return check
