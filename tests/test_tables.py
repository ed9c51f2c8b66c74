"""The tables' own algebra: a wrong exponent does not survive being built."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutransfer.errors import RequestError
from mutransfer.tables import HEALTHY, MUP, SP, TABLES, Power, Row, Table, table

HALF = Fraction(1, 2)
ONE = Power()
POWERS = st.builds(Power, st.fractions(-2, 2, max_denominator=4), st.fractions(-2, 2, max_denominator=4))
RATIOS = st.floats(1 / 64, 64)


def with_row(table: Table, role: str, **powers: Power) -> Table:
    return replace(table, rows={**table.rows, role: replace(table.rows[role], **powers)})


@given(POWERS, POWERS, RATIOS, RATIOS)
def test_division_of_powers_is_division_of_factors(a: Power, b: Power, m_in: float, m_out: float) -> None:
    assert (a / b)(m_in, m_out) == pytest.approx(a(m_in, m_out) / b(m_in, m_out), rel=1e-12)
    assert (a / b).total == a.total - b.total


@given(POWERS, RATIOS)
def test_total_is_the_exponent_when_both_axes_grow(a: Power, m: float) -> None:
    assert a(m, m) == pytest.approx(m ** float(a.total), rel=1e-12)
    assert a(1, 1) == 1


def test_a_powers_two_axes_are_not_confused() -> None:
    power = Power(into=Fraction(-1), out=HALF)
    assert power(4, 9) == 3 / 4
    assert (ONE / power)(4, 9) == 4 / 3
    assert power.total == -HALF


def test_the_tables_are_those_of_the_papers() -> None:
    """Each factor at m_in = 4, m_out = 9, by hand from TP-V 2203.03466, Table 3."""
    expected = {
        "input": (1, 1, 9, 1 / 9),
        "vector": (1, 1, 9, 1 / 9),
        "hidden": (1 / 2, 1 / 4, 9 / 4, 1 / 9),
        "output": (1 / 4, 1 / 4, 1 / 4, 1),
        "bottleneck": (1 / 2, 1 / 4, 1 / 4, 1),
        "finite": (1, 1, 1, 1),
    }
    found = {role: tuple(power(4, 9) for power in (r.init, r.adam, r.sgd, r.eps)) for role, r in MUP.rows.items()}
    assert found == expected
    standard = {role: tuple(power(4, 9) for power in (r.init, r.adam, r.sgd, r.eps)) for role, r in SP.rows.items()}
    fan_in = {"hidden", "output", "bottleneck"}
    assert standard == {role: (1 / 2 if role in fan_in else 1, 1, 1, 1) for role in expected}
    assert (MUP.attention(4, 1), MUP.readout(4, 9), SP.attention(4, 1), SP.readout(4, 9)) == (1 / 2, 1 / 4, 1, 1)


@pytest.mark.parametrize(
    ("name", "role", "powers", "message"),
    [
        ("mup", "hidden", {"init": ONE}, "mup: adam activation of feature is 1/2"),
        ("mup", "hidden", {"init": Power(into=Fraction(-1))}, "activation of feature is -1/2"),
        ("mup", "hidden", {"adam": ONE}, "mup: adam change of feature is 1"),
        ("mup", "hidden", {"adam": Power(into=-HALF)}, "adam change of feature is 1/2"),
        ("mup", "hidden", {"sgd": Power(into=Fraction(-1))}, "mup: sgd change of feature is -1"),
        ("mup", "input", {"sgd": ONE}, "mup: sgd change of first is -1"),
        ("mup", "input", {"adam": Power(out=Fraction(-1))}, "mup: adam change of first is -1"),
        ("mup", "output", {"init": Power(into=-HALF)}, "activation of output is 0"),
        ("mup", "output", {"adam": ONE}, "mup: adam change of output is 1"),
        ("mup", "output", {"sgd": Power(into=Fraction(1))}, "mup: sgd change of output is 2"),
        ("sp", "hidden", {"adam": Power(into=Fraction(-1))}, "sp: adam change of feature is 0"),
        ("sp", "output", {"init": Power(into=Fraction(-1))}, "activation of output is -1/2"),
        ("sp", "input", {"sgd": Power(out=Fraction(1))}, "sp: sgd change of first is 1/2"),
    ],
)
def test_a_wrong_exponent_is_refused_when_built(name: str, role: str, powers: dict[str, Power], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        with_row(TABLES[name], role, **powers)


@pytest.mark.parametrize("built", [MUP, SP])
def test_a_wrong_claim_is_refused_when_built(built: Table) -> None:
    for key, (low, high) in built.declared.items():
        with pytest.raises(AssertionError, match=f"{key[0]} {key[1]} of {key[2]}"):
            replace(built, declared={**built.declared, key: (high + 0.5, high + 0.5)})
        with pytest.raises(AssertionError):
            replace(built, declared={**built.declared, key: (low - 2, low - 1.5)})


def test_what_does_not_grow_is_not_scaled() -> None:
    with pytest.raises(AssertionError, match="does not grow"):
        with_row(MUP, "finite", adam=Power(into=Fraction(-1)))


def test_every_table_declares_the_same_statistics() -> None:
    keys = {
        (column, *rest)
        for column in ("adam", "sgd")
        for rest in (
            ("activation", "feature"),
            ("activation", "output"),
            ("change", "first"),
            ("change", "feature"),
            ("change", "output"),
        )
    }
    assert all(set(each.declared) == keys and each.rows.keys() == MUP.rows.keys() for each in TABLES.values())
    assert all(isinstance(row, Row) for each in TABLES.values() for row in each.rows.values())


def test_only_mup_declares_healthy_slopes() -> None:
    """µP's own bands lie inside those of width-stable feature learning; SP's changes do not."""

    def healthy(each: Table) -> bool:
        return all(
            HEALTHY[statistic, "output" if role == "output" else "feature"][0] <= low
            and high <= HEALTHY[statistic, "output" if role == "output" else "feature"][1]
            for (_, statistic, role), (low, high) in each.declared.items()
        )

    assert healthy(MUP)
    assert not healthy(SP)


@pytest.mark.parametrize(
    ("name", "hint"), [("mpu", "did you mean 'mup'"), ("xyz", "known are completep, depth-mup, mup, sp")]
)
def test_an_unknown_table_is_refused_with_the_known_ones(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"unknown parametrization '{name}': {hint}"):
        table(name)
    assert table("mup") is MUP
