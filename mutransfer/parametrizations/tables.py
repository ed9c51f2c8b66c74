"""The parametrizations as data: one frozen table each, with exponents as fractions, laid out as in the papers.

A table gives, for each role, the powers of m_in and m_out that multiply the base model's initial standard deviation, learning
rate and epsilon (`spec.Table`). docs/explanation/rules.md states how well established each entry is.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from ..errors import RequestError, nearest
from .spec import HALF, IN, ONE, OUT, Band, Depth, Power, Row, Table

__all__ = [
    "HEALTHY",
    "HEALTHY_DECAY",
    "HEALTHY_DEPTH",
    "TABLES",
    "Band",
    "Power",
    "Row",
    "Table",
    "depth_rule",
    "table",
]

SQRT_IN, SQRT_OUT = IN**HALF, OUT**HALF

MUP = Table(
    "mup",
    "TP-V 2203.03466, Table 3; epsilon and bottleneck measured, see docs/explanation/rules.md",
    rows={
        #                 init std      lr, Adam     lr, SGD         epsilon
        "input": Row(ONE, ONE, OUT, ONE / OUT),
        "vector": Row(ONE, ONE, OUT, ONE / OUT),
        "hidden": Row(ONE / SQRT_IN, ONE / IN, OUT / IN, ONE / OUT, spectral=SQRT_OUT / SQRT_IN),
        "output": Row(ONE, ONE, IN, ONE / IN).folded(ONE / IN),  # Table 8's row and multiplier give Table 3's row
        "bottleneck": Row(ONE / SQRT_IN, ONE / IN, ONE / IN, ONE),
        "finite": Row(ONE, ONE, ONE, ONE),
    },
    attention=ONE / SQRT_IN,
    sparse=True,
    declared={
        **{(column, "activation", "feature"): (0, 0) for column in ("adam", "sgd")},
        **{(column, "activation", "output"): (-0.5, -0.5) for column in ("adam", "sgd")},
        **{(column, "change", "first"): (0, 0) for column in ("adam", "sgd")},
        **{(column, "change", "feature"): (0, 0) for column in ("adam", "sgd")},
        # −½ while W·Δh is incoherent, 0 once the readout has learned
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
    divides_out=False,
    attention=ONE,
    declared={
        **{(column, "activation", role): (0, 0) for column in ("adam", "sgd") for role in ("feature", "output")},
        ("adam", "change", "first"): (0, 0),
        ("adam", "change", "feature"): (1, 1),
        ("adam", "change", "output"): (1, 1.5),  # 3/2: aligned readout weights (½) times features that change with +1
        ("sgd", "change", "first"): (-0.5, -0.5),
        ("sgd", "change", "feature"): (0.5, 0.5),
        ("sgd", "change", "output"): (1, 1),
    },
)

# A single standard deviation and learning rate under forward multipliers 1/√fan-in: the same function as SP, written differently.
NTK = Table(
    "ntk",
    "Jacot et al. 1806.07572 (the neural tangent kernel's parametrization, multiplier 1/√fan-in), as a control",
    rows={
        role: Row(ONE, ONE, ONE, ONE).folded(ONE / SQRT_IN if role in ("hidden", "output", "bottleneck") else ONE)
        for role in MUP.rows
    },
    divides_out=False,
    attention=ONE,
    declared={
        **{(column, "activation", role): (0, 0) for column in ("adam", "sgd") for role in ("feature", "output")},
        ("adam", "change", "first"): (0, 0),
        ("adam", "change", "feature"): (0.5, 0.5),
        ("adam", "change", "output"): (0.5, 1),  # 1: aligned readout weights (½) times features that change with +½
        ("sgd", "change", "first"): (-0.5, -0.5),
        ("sgd", "change", "feature"): (-0.5, -0.5),
        ("sgd", "change", "output"): (0, 0),
    },
)

SPECTRAL = replace(
    MUP,
    name="spectral",
    source="spectral condition 2310.17813, Parametrization 1: std ∝ min(1, √(out/in))/√in, rates and epsilon as µP",
    rows={
        **MUP.rows,
        "output": replace(MUP.rows["output"], init=ONE / SQRT_IN),
    },
    aspect=True,
)

STREAM: dict[tuple[str, str, str], Band] = {
    (column, statistic, "stream"): (0, 0)
    for column in ("adam", "sgd")
    for statistic in ("depth activation", "depth change")
}


def depth_rule(alpha: Fraction) -> Depth:
    """Return CompleteP's powers of m_L for the branch multiplier m_L^-α; docs/explanation/rules.md derives them."""
    return Depth(branch=-alpha, adam=alpha - 1, sgd=2 * alpha - 1, eps=-alpha)


# Along the width, the rows are those of MUP: an exponent changed there changes here too.
COMPLETEP = replace(
    MUP,
    name="completep",
    source="CompleteP 2505.01618, Table 1 (α = 1), over " + MUP.source,
    depth=depth_rule(Fraction(1)),
    declared=MUP.declared | STREAM,
)
DEPTH_MUP = replace(
    COMPLETEP,
    name="depth-mup",
    source="CompleteP 2505.01618, Table 1 (α = ½), over " + MUP.source,
    depth=depth_rule(HALF),
)

# Unit weights with explicit multipliers are an equivalent form of this table, which `Plan.unit` returns.
UMUP = replace(
    DEPTH_MUP,
    name="umup",
    source="u-µP 2407.17465, Table 2: multipliers 1/√fan-in, 1/fan-in on the readout, 1/√depth; embedding lr 1/√fan-out",
    rows={
        "input": replace(MUP.rows["input"], adam=ONE / SQRT_OUT),
        "vector": MUP.rows["vector"],
        # written for unit weights, with the multiplier folded in
        "hidden": Row(ONE, ONE / SQRT_IN, OUT, ONE / (SQRT_IN * OUT), spectral=SQRT_OUT).folded(ONE / SQRT_IN),
        "output": Row(ONE, ONE, IN, ONE / IN).folded(ONE / IN),
        "bottleneck": Row(ONE, ONE / SQRT_IN, ONE, ONE / SQRT_IN).folded(ONE / SQRT_IN),
        "finite": MUP.rows["finite"],
    },
    declared=DEPTH_MUP.declared | {("adam", "change", "first"): (-0.5, -0.5)},
)

TABLES = {each.name: each for each in (MUP, SP, COMPLETEP, DEPTH_MUP, NTK, SPECTRAL, UMUP)}

# Slopes of width-stable feature learning, independent of the parametrization in force: the criterion of the coordinate check.
# Logits may start arbitrarily small (under µP they fall as −½, with a zero readout they are 0) but must not grow.
HEALTHY: dict[tuple[str, str], Band] = {
    ("activation", "feature"): (0, 0),
    ("activation", "output"): (float("-inf"), 0),
    ("change", "feature"): (0, 0),
    ("change", "output"): (-0.5, 0),
    # Queries and keys whose head dim grows start uncorrelated, and a gradient through their product shrinks until they correlate:
    # −1 (queries) and −½ (keys) in the first steps of SGD (docs/explanation/coordinate-check.md).
    ("change", "attention"): (-1, 0),
    # Parameters without a growing axis, under SGD; see their updates below.
    ("change", "finite"): (-0.5, 0),
    # Updates of single parameters (`slopes.relative_updates`): ΔW·x of a matrix relative to x, of a gain or a bias as it is.
    ("update", "feature"): (0, 0),
    # If the step itself has the right size, ΔW·x shrinks at most as an incoherent sum does: in the first steps of narrow models,
    # the examples' gradients are not aligned with the features (docs/explanation/coordinate-check.md).
    ("update", "stepped"): (-0.5, 0),
    ("step", "feature"): (0, 0),
    # 0 once the readout's update and the features are aligned, less in the first steps of narrow models.
    ("update", "output"): (-0.5, 0),
    ("update", "attention"): (-1, 0),
    # The gradient of a parameter that all channels share (MLP-Mixer's layers over the patches) is a sum over them, which is
    # incoherent at first.
    ("update", "finite"): (-0.5, 0),
    # The gain of a normalized readout acts on the initial directions of its rows, whose logits may start arbitrarily small.
    ("update", "gain"): (float("-inf"), 0),
    # The effect on the logits of a parameter that is measured at the output of the whole model.
    ("update", "stream"): (-0.5, 0),
    # Statistics of parameters; those without an entry are not judged. A readout may start arbitrarily small, including at zero.
    ("weight", "feature"): (0, 0),
    ("weight", "output"): (float("-inf"), 0),
    ("gradient", "feature"): (0, 0),
    ("gradient", "output"): (0, 0),
}

# lr · weight decay, the fraction of a weight that a step removes, by decay policy (docs/explanation/rules.md).
HEALTHY_DECAY: dict[str, Band] = {"independent": (0, 0), "coupled": (-1, 1), "sqrt": (-0.5, 0.5)}

# The same over depth (CompleteP 2505.01618, Desiderata 1 and 2). Each branch has size 1/L. Incoherent parts, which is everything
# at the start, sum to 1/√L; the coherent part of the change sums to 1. After the first layer there is only one branch.
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
        RequestError: there is none; the message suggests the nearest name.
    """
    if name not in TABLES:
        raise RequestError(f"unknown parametrization {name!r}: {nearest(name, TABLES)}")
    return TABLES[name]
