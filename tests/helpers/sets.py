"""The sets of tests that a plain `pytest` leaves out, and the lines at its end that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["LEFT_OUT", "count", "extended_but", "lines"]

# Marker → what it holds, and how to run it. pyproject.toml registers the markers and leaves them out by default.
LEFT_OUT = {
    "extended": 'further cases of what was tested, minutes in sum: pytest -m "not slow", as CI does',
    "integration": "need a browser or a server (apt-get install chromium redis-server postgresql): pytest -m integration",
    "slow": "physics and whole loops, to run before a release: pytest -m slow",
}


def extended_but(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return ``cases`` as parameters of a test, of which all but those in ``kept`` are marked ``extended``."""
    cases = list(cases)
    assert all(each in cases for each in kept), kept
    return [
        case
        if case in kept
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.extended)
        for case in cases
    ]


def count(deselected: Sequence[pytest.Item]) -> Counter[str]:
    """Return how many tests of each set were deselected."""
    marked = ([name for name in LEFT_OUT if item.get_closest_marker(name)] for item in deselected)
    return Counter(names[-1] for names in marked if names)


def lines(left_out: Counter[str]) -> list[str]:
    """Return a line per set of which tests were deselected; .ci/run looks for them."""
    return [f"left out: {left_out[name]} {name} tests: {text}" for name, text in LEFT_OUT.items() if left_out[name]]
