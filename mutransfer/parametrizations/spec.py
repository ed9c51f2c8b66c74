"""Specification of parametrizations: powers of m_in and m_out per role, with an algebra that is checked when a table is built.

The check derives by power counting how activations change in a training step when all widths grow together, and compares the
resulting exponents with those that the table declares.

A forward multiplier can be folded into initialization and optimizer settings: if a tensor is used only as c·W, training W with
the multiplier c is equivalent to training W' = c·W without it, under the settings in `FOLDS` (abc symmetry, TP-V 2203.03466,
Appendix J.2.1; both agree up to rounding over whole runs).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Band", "Depth", "FOLDS", "Factors", "HALF", "IN", "ONE", "OUT", "Power", "Row", "Table"]

Band = tuple[float, float]
HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Power:
    """A power of m_in times a power of m_out."""

    into: Fraction = Fraction(0)
    out: Fraction = Fraction(0)

    def __call__(self, m_in: float, m_out: float) -> float:
        """Return the factor for these ratios."""
        return m_in ** float(self.into) * m_out ** float(self.out)

    def __mul__(self, other: Power) -> Power:
        return Power(self.into + other.into, self.out + other.out)

    def __truediv__(self, other: Power) -> Power:
        return Power(self.into - other.into, self.out - other.out)

    def __pow__(self, exponent: Fraction | int) -> Power:
        return Power(self.into * exponent, self.out * exponent)

    @property
    def total(self) -> Fraction:
        """Exponent when both axes grow together."""
        return self.into + self.out


ONE, IN, OUT = Power(), Power(into=Fraction(1)), Power(out=Fraction(1))


@dataclass(frozen=True)
class Row:
    """Factors on the base model's values for one role: initial std, lr per optimizer column, and Adam's epsilon.

    ``gauge`` is the forward multiplier that the source applies to the parameter and that is folded into it here.
    ``spectral`` is the required growth of the spectral norm of an orthogonalized update (Muon); None leaves it to the class.
    """

    init: Power
    adam: Power
    sgd: Power
    eps: Power
    gauge: Power = ONE
    spectral: Power | None = None

    def lr(self, column: str) -> Power:
        """Return the power on the learning rate for the optimizer column "adam" or "sgd"."""
        return self.adam if column == "adam" else self.sgd

    def folded(self, c: Power) -> Row:
        """Return the row with a forward multiplier ``c`` folded into it, with the same powers as `Factors.folded`."""
        adam, _, eps = FOLDS["adam"]
        sgd, _, _ = FOLDS["sgd"]
        return Row(
            self.init * c,
            self.adam * c**adam,
            self.sgd * c**sgd,
            self.eps * c**eps,
            self.gauge * c,
            self.spectral and self.spectral * c**adam,
        )


@dataclass(frozen=True)
class Depth:
    """Powers of m_L on residual branches: on their multiplier, and on settings inside them (CompleteP 2505.01618, Table 1)."""

    branch: Fraction
    adam: Fraction
    sgd: Fraction
    eps: Fraction

    def lr(self, column: str) -> Fraction:
        """Return the power on the learning rate for the optimizer column "adam" or "sgd"."""
        return self.adam if column == "adam" else self.sgd

    def derived(self, column: str, statistic: str) -> Fraction:
        """Return the power of L in the size of the residual stream at initialization, or in its change by one step.

        At initialization, L branches are independent of each other, so their sum grows as √L, while the embedding that they are
        added to does not grow. One step changes them coherently, so the change grows as L. A gradient inside a branch has passed
        through the branch's multiplier.
        """
        if statistic == "depth activation":
            return max(Fraction(0), HALF + self.branch)
        gradient = self.branch if column == "sgd" else Fraction(0)
        return 1 + self.branch + self.lr(column) + gradient


@dataclass(frozen=True)
class Table:
    """A parametrization, written without forward multipliers.

    Args:
        name: name on the command line.
        source: paper and table.
        rows: role → factors.
        attention: power of m_h (head dim / base head dim), written as a power of m_in, that multiplies the queries.
        declared: (column, statistic, role) → band of the slope against log width that the source's theory predicts. The
            statistics are "activation" at initialization and "change" after a step, the roles "feature", "output" and "first".
            For the statistics "depth activation" and "depth change" of the role "stream", the slope is against log depth.
        depth: the rule for residual branches; None if there is none.
        aspect: whether initial weights are also limited by the shape of the matrix, std · min(1, √(out/in)).
        sparse: whether hidden layers follow SµPar (2405.15743) when they are sparse.
        divides_out: whether numbers in the forward pass that grow with the width are divided out; controls keep them.

    Raises:
        AssertionError: the rows do not imply the declared slopes.
    """

    name: str
    source: str
    rows: dict[str, Row]
    attention: Power
    declared: dict[tuple[str, str, str], Band]
    depth: Depth | None = None
    aspect: bool = False
    sparse: bool = False
    divides_out: bool = True

    def __post_init__(self) -> None:
        assert self.rows["finite"] == Row(ONE, ONE, ONE, ONE), "a parameter that does not grow is not scaled"
        for (column, statistic, role), (low, high) in self.declared.items():
            derived = self.derived(column, statistic, role)
            assert low <= derived <= high, (
                f"{self.name}: {column} {statistic} of {role} is {derived}, not {low}..{high}"
            )

    @property
    def readout(self) -> Power:
        """Forward multiplier of the readout; a readout tied to an embedding receives it through the final norm."""
        return self.rows["output"].gauge

    def without_depth(self, before: int, after: int) -> str:
        """Return the note that a table without a rule for depth does not scale anything when the depth changes."""
        return (
            f"{self.name} has no rule for depth: nothing is scaled for the change from {before} to {after} layers; "
            "completep has a rule."
        )

    def derived(self, column: str, statistic: str, role: str) -> Fraction:
        """Return the slope that the rows imply when all widths grow together, by power counting (TP-V 2203.03466, Appendix J).

        Products of initial weights with activations add up incoherently (a sum of n terms grows as √n), those of updates
        coherently (as n). The gradient at a hidden preactivation scales as the readout's weights, at a logit as 1.
        """
        if role == "stream":
            assert self.depth is not None, f"{self.name} declares a slope over depth but has no rule for depth"
            return self.depth.derived(column, statistic)
        output, hidden, first = self.rows["output"], self.rows["hidden"], self.rows["input"]
        row, grows = {"output": (output, 1), "feature": (hidden, 1), "first": (first, 0)}[role]
        capped = -HALF if self.aspect else 0  # once the readout's fan-in exceeds the number of logits
        if statistic == "activation":
            return row.init.total + HALF * grows + (capped if role == "output" else 0)
        gradient = Fraction(0) if role == "output" or column == "adam" else output.init.total + capped
        return row.lr(column).total + gradient + grows


# Kind of update → powers of c on (lr, weight decay, epsilon); initial weights are always multiplied by c.
FOLDS: dict[str, tuple[int, int, int]] = {
    "adam": (1, -1, -1),  # the step is independent of the gradient's size, so the lr must grow by c; decay is decoupled
    "adam-l2": (1, -2, -1),  # lr·wd·p acts as a gradient
    "sgd": (2, -2, 0),  # the gradient shrinks by c as well
    "muon": (1, -1, -1),  # an orthogonalized step is independent of the gradient's size as well
    "adafactor": (0, 0, 1),  # steps are relative to the parameter; epsilon is a lower bound on its size
    "adafactor-hf": (0, -1, 1),  # in transformers' class, decay is relative as well: lr·size·wd
}


@dataclass(frozen=True)
class Factors:
    """Factors on one parameter's initial weights and optimizer settings.

    ``gauge`` is the size of the parameter relative to the form with the multipliers of the table's source. In that form its
    gradient is ``gauge`` times as large, and only in that form are gradient norms comparable across widths.
    """

    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    gauge: float = 1.0

    def __mul__(self, other: Factors) -> Factors:
        return Factors(
            self.init * other.init,
            self.lr * other.lr,
            self.weight_decay * other.weight_decay,
            self.eps * other.eps,
            self.gauge * other.gauge,
        )

    def folded(self, c: float, kind: str) -> Factors:
        """Return these factors with a forward multiplier ``c`` folded into them, for the key ``kind`` of `FOLDS`."""
        lr, decay, eps = FOLDS[kind]
        return self * Factors(init=c, lr=c**lr, weight_decay=c**decay, eps=c**eps, gauge=c)
