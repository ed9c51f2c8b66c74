"""What a parametrization is: powers of m_in and m_out per role, with an algebra that is checked when a table is built.

The check counts what a step of training does to activations as everything grows together, and holds the exponents that
come out against those that the table declares.

A forward multiplier can be written into initialization and optimizer settings instead: if a tensor is c·W everywhere it is
used, training W under the multiplier c equals training W' = c·W without it, with the settings in `FOLDS` (abc symmetry,
TP-V 2203.03466, Appendix J.2.1; both sides agree to rounding over whole runs).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Band", "Depth", "FOLDS", "Factors", "HALF", "IN", "ONE", "OUT", "Power", "Row", "Table"]

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

    def __mul__(self, other: Power) -> Power:
        return Power(self.into + other.into, self.out + other.out)

    def __truediv__(self, other: Power) -> Power:
        return Power(self.into - other.into, self.out - other.out)

    def __pow__(self, exponent: Fraction | int) -> Power:
        return Power(self.into * exponent, self.out * exponent)

    @property
    def total(self) -> Fraction:
        """The exponent when both axes grow together."""
        return self.into + self.out


ONE, IN, OUT = Power(), Power(into=Fraction(1)), Power(out=Fraction(1))


@dataclass(frozen=True)
class Row:
    """What multiplies the base model's values for one role: initial std, lr per optimizer column, Adam's epsilon.

    ``gauge`` is the forward multiplier that the source writes on the parameter and that is folded into it here.
    ``spectral`` is how the spectral norm of an orthogonalized update (Muon) has to grow; None leaves it as it comes.
    """

    init: Power
    adam: Power
    sgd: Power
    eps: Power
    gauge: Power = ONE
    spectral: Power | None = None

    def lr(self, column: str) -> Power:
        """Return the learning rate's power for the optimizer column "adam" or "sgd"."""
        return self.adam if column == "adam" else self.sgd

    def folded(self, c: Power) -> Row:
        """Return the row with a forward multiplier ``c`` written into it, by the same powers as `fold.Factors.folded`."""
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
    """Powers of m_L on residual branches: their multiplier, and what lies inside them (CompleteP 2505.01618, Table 1)."""

    branch: Fraction
    adam: Fraction
    sgd: Fraction
    eps: Fraction

    @classmethod
    def completep(cls, alpha: Fraction) -> Depth:
        """Return the paper's rule for the branch multiplier m_L^-α; SGD's and epsilon's powers are in docs/rules.md."""
        return cls(branch=-alpha, adam=alpha - 1, sgd=2 * alpha - 1, eps=-alpha)

    def lr(self, column: str) -> Fraction:
        """Return the learning rate's power for the optimizer column "adam" or "sgd"."""
        return self.adam if column == "adam" else self.sgd

    def derived(self, column: str, statistic: str) -> Fraction:
        """Power of L in the residual stream's size at initialization, and in its change by one step.

        L branches start independent of each other (their sum is √L large, beside an embedding that stays) and are changed
        alike (L large). A gradient inside a branch has passed the branch's multiplier.
        """
        if statistic == "depth activation":
            return max(Fraction(0), HALF + self.branch)
        gradient = self.branch if column == "sgd" else Fraction(0)
        return 1 + self.branch + self.lr(column) + gradient


@dataclass(frozen=True)
class Table:
    """One parametrization, in the gauge without forward multipliers.

    Args:
        name: as on the command line.
        source: paper and table.
        rows: role → factors.
        attention: power of m_h (head dim / base head dim), written on m_in, that multiplies the queries.
        declared: (column, statistic, role) → slope against log width that the source's theory predicts, as a band.
            "activation" at initialization, "change" after a step; role "feature", "output" or "first". With the
            statistics "depth activation" and "depth change" and the role "stream", the slope against log depth.
        depth: what residual branches take; None without a rule.
        aspect: whether initial weights are capped by their own shape besides, std · min(1, √(out/in)).
        sparse: whether hidden layers follow SµPar (2405.15743) when they are sparse.
        divides_out: whether numbers of the forward pass that grow with the width are divided out; a control leaves them.

    Raises:
        AssertionError: the rows do not give the declared slopes.
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
        """The readout's own forward multiplier, which one that is tied to an embedding takes through the final norm."""
        return self.rows["output"].gauge

    def without_depth(self, before: int, after: int) -> str:
        """Return the sentence that nothing is scaled when the depth changes, of a table without a rule for depth."""
        return (
            f"{self.name} has no rule for depth: the change from {before} to {after} layers is carried without any factor; "
            "completep has one."
        )

    def derived(self, column: str, statistic: str, role: str) -> Fraction:
        """Slope that the rows imply when every width grows together, by the counting of TP-V 2203.03466, Appendix J.

        Initial weights meet activations incoherently (a sum of n terms is √n large), updates coherently (n large). The
        gradient at a hidden preactivation has the size of the readout's weights, at a logit size 1.
        """
        if role == "stream":
            assert self.depth is not None, f"{self.name} declares a slope over depth and has no rule for depth"
            return self.depth.derived(column, statistic)
        output, hidden, first = self.rows["output"], self.rows["hidden"], self.rows["input"]
        row, grows = {"output": (output, 1), "feature": (hidden, 1), "first": (first, 0)}[role]
        capped = -HALF if self.aspect else 0  # once the readout is wider than its logits are many
        if statistic == "activation":
            return row.init.total + HALF * grows + (capped if role == "output" else 0)
        gradient = Fraction(0) if role == "output" or column == "adam" else output.init.total + capped
        return row.lr(column).total + gradient + grows


# kind of update → powers of c on (lr, weight decay, epsilon); initial weights always take c itself
FOLDS: dict[str, tuple[int, int, int]] = {
    "adam": (1, -1, -1),  # the step does not see the gradient's size, so it must itself grow by c; decay is decoupled
    "adam-l2": (1, -2, -1),  # lr·wd·p enters as a gradient
    "sgd": (2, -2, 0),  # the gradient shrinks by c as well
    "muon": (1, -1, -1),  # likewise: an orthogonalized step does not see the gradient's size
    "adafactor": (0, 0, 1),  # steps are relative to the parameter; the epsilon is its smallest size
    "adafactor-hf": (0, -1, 1),  # and so is decay, in transformers' class: lr·size·wd
}


@dataclass(frozen=True)
class Factors:
    """What multiplies one parameter's initial weights and optimizer settings.

    ``gauge`` is how much larger the parameter is than in the gauge of the table's source, where its gradient is
    ``gauge`` times as large: norms of gradients are comparable across widths only there.
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
        """Return these factors with a forward multiplier ``c`` written into them, for one of the `FOLDS`."""
        lr, decay, eps = FOLDS[kind]
        return self * Factors(init=c, lr=c**lr, weight_decay=c**decay, eps=c**eps, gauge=c)
