"""What a plain `pytest` leaves out is registered, said at its end, and run by CI but for what is slow."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from .helpers.sets import LEFT_OUT, count, extended_but, lines

ROOT = Path(__file__).parents[1]


class Item:
    def __init__(self, *marks: str) -> None:
        self.marks = marks

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


def test_the_sets_are_registered_and_left_out_by_default() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert [marker.partition(":")[0] for marker in options["markers"]] == list(LEFT_OUT)
    expression = options["addopts"][options["addopts"].index("-m") + 1]
    assert expression == f"not ({' or '.join(LEFT_OUT)})"


def test_what_is_left_out_is_said() -> None:
    """A slow test that needs a server is slow."""
    left_out = count([Item("slow", "integration"), Item("integration"), Item("extended"), Item("extended"), Item()])  # type: ignore[list-item]
    assert left_out == {"slow": 1, "integration": 1, "extended": 2}
    assert [re.sub(": [^:]*: pytest.*", "", line) for line in lines(left_out)] == [
        "left out: 2 extended tests", "left out: 1 integration tests", "left out: 1 slow tests",
    ]  # fmt: skip
    left_out.clear()
    assert lines(left_out) == []


def test_ci_looks_for_those_lines() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "PYTEST_ADDOPTS=\"--durations=20 -m 'not slow'\"" in script
    assert re.findall(r"'\^left out: \.\* \(?([\w|]+)\)? tests'", script) == ["slow", "extended|integration"]


def test_cases_but_a_few_are_extended() -> None:
    first, second, third = extended_but(["a", ("b", 1), "c"], "a")
    assert first == "a"
    assert [(each.values, [mark.name for mark in each.marks]) for each in (second, third)] == [
        (("b", 1), ["extended"]), (("c",), ["extended"]),
    ]  # fmt: skip
    with pytest.raises(AssertionError):
        extended_but(["a"], "no such case")
