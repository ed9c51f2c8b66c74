"""The tables' own algebra: a wrong exponent does not survive being built."""

from __future__ import annotations

from dataclasses import asdict, replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutransfer.errors import RequestError
from mutransfer.parametrizations.spec import FOLDS, Factors
from mutransfer.parametrizations.tables import HEALTHY, MUP, SP, TABLES, Power, Row, Table, depth_rule, table

HALF = Fraction(1, 2)
ONE = Power()
POWERS = st.builds(Power, st.fractions(-2, 2, max_denominator=4), st.fractions(-2, 2, max_denominator=4))
RATIOS = st.floats(1 / 64, 64)


ROWS = st.builds(Row, POWERS, POWERS, POWERS, POWERS, POWERS, st.none() | POWERS)


@given(ROWS, POWERS, POWERS)
def test_gauge_changes_compose(row: Row, a: Power, b: Power) -> None:
    assert row.folded(a).folded(b) == row.folded(a * b)
    assert row.folded(a).folded(ONE / a) == row
    assert row.folded(ONE) == row


@given(POWERS, RATIOS, RATIOS, st.sampled_from(["adam", "sgd"]))
def test_a_folded_row_is_folded_factors(c: Power, m_in: float, m_out: float, column: str) -> None:
    """The algebra of exponents and the one of numbers are the same."""
    row = MUP.rows["hidden"]
    number = Factors(row.init(m_in, m_out), row.lr(column)(m_in, m_out), eps=row.eps(m_in, m_out))
    number = number.folded(c(m_in, m_out), column)
    folded = row.folded(c)
    assert number.init == pytest.approx(folded.init(m_in, m_out), rel=1e-9)
    assert number.lr == pytest.approx(folded.lr(column)(m_in, m_out), rel=1e-9)
    assert number.gauge == pytest.approx(folded.gauge(m_in, m_out), rel=1e-9)
    if column == "adam":
        assert number.eps == pytest.approx(folded.eps(m_in, m_out), rel=1e-9)


def with_row(table: Table, role: str, **powers: Power) -> Table:
    return replace(table, rows={**table.rows, role: replace(table.rows[role], **powers)})


FACTORS = st.builds(Factors, *[st.floats(0.1, 10)] * 5)


def numbers(factors: Factors) -> list[float]:
    return list(asdict(factors).values())


@given(FACTORS, RATIOS, RATIOS, st.sampled_from(sorted(FOLDS)))
def test_folds_of_numbers_compose(factors: Factors, a: float, b: float, kind: str) -> None:
    assert numbers(factors.folded(a, kind).folded(b, kind)) == pytest.approx(numbers(factors.folded(a * b, kind)))
    assert numbers(factors.folded(a, kind).folded(1 / a, kind)) == pytest.approx(numbers(factors))


@given(FACTORS, RATIOS, st.sampled_from(sorted(set(FOLDS) - {"adafactor-hf"})))
def test_a_fold_keeps_what_decays_in_a_step(factors: Factors, c: float, kind: str) -> None:
    """lr·wd: what a step multiplies the weights with. L2 inside Adam is divided by the gradient's size as well."""
    folded = factors.folded(c, kind)
    expected = factors.lr * factors.weight_decay * (1 / c if kind == "adam-l2" else 1)
    assert folded.lr * folded.weight_decay == pytest.approx(expected)


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
    stream = {(column, f"depth {what}", "stream") for column in ("adam", "sgd") for what in ("activation", "change")}
    for each in TABLES.values():
        assert set(each.declared) == (keys | stream if each.depth else keys)
        assert each.rows.keys() == MUP.rows.keys()
    assert all(isinstance(row, Row) for each in TABLES.values() for row in each.rows.values())


@given(st.fractions(0, 1, max_denominator=8))
def test_depth_rules_keep_the_residual_stream(alpha: Fraction) -> None:
    """Every α moves the stream alike in one step; only α ≥ ½ keeps its size at initialization."""
    rule = depth_rule(alpha)
    for column in ("adam", "sgd"):
        assert rule.derived(column, "depth change") == 0
        assert rule.derived(column, "depth activation") == max(Fraction(0), HALF - alpha)
    assert replace(rule, adam=rule.adam + HALF).derived("adam", "depth change") == HALF


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": Fraction(0)}, "completep: adam depth activation of stream is 1/2"),
        ({"adam": HALF}, "completep: adam depth change of stream is 1/2"),
        ({"sgd": Fraction(0)}, "completep: sgd depth change of stream is -1"),
    ],
)
def test_a_wrong_depth_rule_is_refused_when_built(change: dict[str, Fraction], message: str) -> None:
    built = TABLES["completep"]
    with pytest.raises(AssertionError, match=message):
        replace(built, depth=replace(built.depth, **change))  # type: ignore[type-var]


def test_the_new_tables_are_those_of_their_papers() -> None:
    """Each factor at m_in = 4, m_out = 9, with every multiplier folded, by hand."""

    def factors(name: str, role: str) -> tuple[float, ...]:
        row = TABLES[name].rows[role]
        return tuple(power(4, 9) for power in (row.init, row.adam, row.sgd, row.eps, row.gauge))

    for role in ("hidden", "output", "bottleneck"):  # 1/√4 in the forward pass
        assert factors("ntk", role) == (1 / 2, 1 / 2, 1 / 4, 2, 1 / 2)
    assert factors("ntk", "input") == factors("ntk", "vector") == (1, 1, 1, 1, 1)
    # u-µP, Table 2: unit weights, Adam's lr 1/√fan-out, 1/√fan-in, 1 under multipliers 1, 1/√fan-in, 1/fan-in
    assert factors("umup", "input")[:2] == (1, 1 / 3)
    assert (factors("umup", "hidden")[:2], factors("umup", "hidden")[4]) == ((1 / 2, 1 / 2 * 1 / 2), 1 / 2)
    assert (factors("umup", "output")[:2], factors("umup", "output")[4]) == ((1 / 4, 1 / 4), 1 / 4)
    for role in ("hidden", "output", "bottleneck"):  # otherwise µP in another gauge
        assert factors("umup", role)[:4] == factors("mup", role)[:4]
        assert TABLES["umup"].rows[role].spectral == MUP.rows[role].spectral
    assert factors("spectral", "output")[0] == 1 / 2  # and the cap min(1, √(out/in)) where it is reached
    assert TABLES["spectral"].aspect


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
    ("name", "hint"),
    [("mpu", "did you mean 'mup'"), ("xyz", "known names are completep, depth-mup, mup, ntk, sp, spectral, umup")],
)
def test_an_unknown_table_is_refused_with_the_known_ones(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"unknown parametrization '{name}': {hint}"):
        table(name)
    assert table("mup") is MUP
