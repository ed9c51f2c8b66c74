"""The parametrizations as data: one frozen table each, exponents as fractions, reading like the papers' own.

A table gives, per role, the powers of m_in and m_out by which the base model's initial standard deviation, learning
rate and epsilon are multiplied. Its algebra (what a step of training then does to activations as everything grows
together) is derived when the table is built and held against the exponents the table declares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from .errors import RequestError, nearest

__all__ = ["HEALTHY", "HEALTHY_DEPTH", "TABLES", "Band", "Power", "Row", "Table", "table"]

Band = tuple[float, float]
HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Power:
    """m_in to one power times m_out to another."""

    into: Fraction = Fraction(0)
    out: Fraction = Fraction(0)

    def __call__(self, m_in: float, m_out: float) -> float:
        """Return the factor for these ratios."""
        return m_in ** float(self.into) * m_out ** float(self.out)

    def __truediv__(self, other: Power) -> Power:
        return Power(self.into - other.into, self.out - other.out)

    @property
    def total(self) -> Fraction:
        """The exponent when both axes grow together."""
        return self.into + self.out


ONE, IN, OUT, SQRT_IN = Power(), Power(into=Fraction(1)), Power(out=Fraction(1)), Power(into=HALF)


@dataclass(frozen=True)
class Row:
    """What multiplies the base model's values for one role: initial std, lr per optimizer column, Adam's epsilon."""

    init: Power
    adam: Power
    sgd: Power
    eps: Power

    def lr(self, column: str) -> Power:
        """Return the learning rate's power for the optimizer column "adam" or "sgd"."""
        return self.adam if column == "adam" else self.sgd


@dataclass(frozen=True)
class Table:
    """One parametrization, in the gauge without forward multipliers.

    Args:
        name: as on the command line.
        source: paper and table.
        rows: role → factors.
        attention: power of m_h (head dim / base head dim), written on m_in, that multiplies the queries.
        readout: multiplier that the source writes on the readout, here folded into it; a readout tied to an embedding
            takes it through the final norm, and gradient norms are measured in this gauge.
        declared: (column, statistic, role) → slope against log width that the source's theory predicts, as a band.
            "activation" at initialization, "change" after a step; role "feature" or "output".
        depth: α of the residual branches' multiplier m_L^-α (CompleteP 2505.01618, Table 1); None without a rule.

    Raises:
        AssertionError: the rows do not give the declared slopes.
    """

    name: str
    source: str
    rows: dict[str, Row]
    attention: Power
    readout: Power
    declared: dict[tuple[str, str, str], Band]
    depth: Fraction | None = None

    def __post_init__(self) -> None:
        assert self.rows["finite"] == Row(ONE, ONE, ONE, ONE), "a parameter that does not grow is not scaled"
        for (column, statistic, role), (low, high) in self.declared.items():
            derived = self.derived(column, statistic, role)
            assert low <= derived <= high, (
                f"{self.name}: {column} {statistic} of {role} is {derived}, not {low}..{high}"
            )

    def derived(self, column: str, statistic: str, role: str) -> Fraction:
        """Slope that the rows imply when every width grows together, by the counting of TP-V 2203.03466, Appendix J.

        Initial weights meet activations incoherently (a sum of n terms is √n large), updates coherently (n large). The
        gradient at a hidden preactivation has the size of the readout's weights, at a logit size 1.
        """
        output, hidden, first = self.rows["output"], self.rows["hidden"], self.rows["input"]
        row, grows = {"output": (output, 1), "feature": (hidden, 1), "first": (first, 0)}[role]
        if statistic == "activation":
            return row.init.total + HALF * grows
        gradient = Fraction(0) if role == "output" or column == "adam" else output.init.total
        return row.lr(column).total + gradient + grows


MUP = Table(
    "mup",
    "TP-V 2203.03466, Table 3; epsilon and bottleneck measured, see docs/rules.md",
    rows={
        #                 init std      lr, Adam     lr, SGD         epsilon
        "input": Row(ONE, ONE, OUT, ONE / OUT),
        "vector": Row(ONE, ONE, OUT, ONE / OUT),
        "hidden": Row(ONE / SQRT_IN, ONE / IN, OUT / IN, ONE / OUT),
        "output": Row(ONE / IN, ONE / IN, ONE / IN, ONE),
        "bottleneck": Row(ONE / SQRT_IN, ONE / IN, ONE / IN, ONE),
        "finite": Row(ONE, ONE, ONE, ONE),
    },
    attention=ONE / SQRT_IN,
    readout=ONE / IN,
    declared={
        **{(column, "activation", "feature"): (0, 0) for column in ("adam", "sgd")},
        **{(column, "activation", "output"): (-0.5, -0.5) for column in ("adam", "sgd")},
        **{(column, "change", "first"): (0, 0) for column in ("adam", "sgd")},
        **{(column, "change", "feature"): (0, 0) for column in ("adam", "sgd")},
        # −½ while W·Δh is still incoherent, 0 once the readout has learned
        **{(column, "change", "output"): (-0.5, 0) for column in ("adam", "sgd")},
    },
)

SP = Table(
    "sp",
    "TP-V 2203.03466, Table 3, grey values: fan-in initialization and one learning rate for all",
    rows={
        "input": Row(ONE, ONE, ONE, ONE),
        "vector": Row(ONE, ONE, ONE, ONE),
        "hidden": Row(ONE / SQRT_IN, ONE, ONE, ONE),
        "output": Row(ONE / SQRT_IN, ONE, ONE, ONE),
        "bottleneck": Row(ONE / SQRT_IN, ONE, ONE, ONE),
        "finite": Row(ONE, ONE, ONE, ONE),
    },
    attention=ONE,
    readout=ONE,
    declared={
        **{(column, "activation", role): (0, 0) for column in ("adam", "sgd") for role in ("feature", "output")},
        ("adam", "change", "first"): (0, 0),
        ("adam", "change", "feature"): (1, 1),
        ("adam", "change", "output"): (1, 1.5),  # 3/2: aligned readout weights (½) meet features that move with +1
        ("sgd", "change", "first"): (-0.5, -0.5),
        ("sgd", "change", "feature"): (0.5, 0.5),
        ("sgd", "change", "output"): (1, 1),
    },
)

# On residual branches besides: lr·m_L^(α−1) (SGD m_L^(2α−1)), eps·m_L^-α, and the multiplier folded into what ends them.
COMPLETEP = replace(
    MUP, name="completep", source="CompleteP 2505.01618, Table 1 (α = 1), over " + MUP.source, depth=Fraction(1)
)
DEPTH_MUP = replace(
    MUP, name="depth-mup", source="CompleteP 2505.01618, Table 1 (α = ½), over " + MUP.source, depth=HALF
)

TABLES = {each.name: each for each in (MUP, SP, COMPLETEP, DEPTH_MUP)}

# What width-stable feature learning looks like, whatever the parametrization in force: the coordinate check's measure.
# Logits may start as small as they like (µP's fall as −½, a zero readout's are 0) but not grow.
HEALTHY: dict[tuple[str, str], Band] = {
    ("activation", "feature"): (0, 0),
    ("activation", "output"): (float("-inf"), 0),
    ("change", "feature"): (0, 0),
    ("change", "output"): (-0.5, 0),
}

# And over depth (CompleteP 2505.01618, Desiderata 1 and 2). The branches are 1/L large each: their incoherent part, all of
# it at the start, sums to 1/√L, the coherent part of their change to 1; behind the first layer there is only one of them.
HEALTHY_DEPTH: dict[tuple[str, str], Band] = {
    ("activation", "feature"): (-0.5, 0),
    ("activation", "output"): (float("-inf"), 0),
    ("change", "feature"): (-0.5, 0),
    ("change", "output"): (-0.5, 0),
    ("change", "first"): (-1, 0),
}


def table(name: str) -> Table:
    """Return the parametrization called ``name``.

    Raises:
        RequestError: there is none, with the nearest name.
    """
    if name not in TABLES:
        raise RequestError(f"unknown parametrization {name!r}: {nearest(name, TABLES)}")
    return TABLES[name]
