"""The parametrizations as data: one frozen table each, exponents as fractions, reading like the papers' own.

A table gives, per role, the powers of m_in and m_out by which the base model's initial standard deviation, learning
rate and epsilon are multiplied (`tableau.Table`); docs/rules.md says how sure each entry is.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from ..errors import RequestError, nearest
from .spec import HALF, IN, ONE, OUT, Band, Depth, Power, Row, Table

__all__ = ["HEALTHY", "HEALTHY_DECAY", "HEALTHY_DEPTH", "TABLES", "Band", "Power", "Row", "Table", "table"]

SQRT_IN, SQRT_OUT = IN**HALF, OUT**HALF

MUP = Table(
    "mup",
    "TP-V 2203.03466, Table 3; epsilon and bottleneck measured, see docs/rules.md",
    rows={
        #                 init std      lr, Adam     lr, SGD         epsilon
        "input": Row(ONE, ONE, OUT, ONE / OUT),
        "vector": Row(ONE, ONE, OUT, ONE / OUT),
        "hidden": Row(ONE / SQRT_IN, ONE / IN, OUT / IN, ONE / OUT, spectral=SQRT_OUT / SQRT_IN),
        "output": Row(ONE, ONE, IN, ONE / IN).folded(ONE / IN),  # Table 8's row and multiplier make Table 3's
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
    divides_out=False,
    attention=ONE,
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

# One standard deviation and one learning rate for all under forward multipliers 1/√fan-in: SP's function, another gauge.
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
        ("adam", "change", "output"): (0.5, 1),  # 1: aligned readout weights (½) meet features that move with +½
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
COMPLETEP = replace(
    MUP,
    name="completep",
    source="CompleteP 2505.01618, Table 1 (α = 1), over " + MUP.source,
    depth=Depth.completep(Fraction(1)),
    declared=MUP.declared | STREAM,
)
DEPTH_MUP = replace(
    COMPLETEP,
    name="depth-mup",
    source="CompleteP 2505.01618, Table 1 (α = ½), over " + MUP.source,
    depth=Depth.completep(HALF),
)

# Its unit weights under explicit multipliers are one more gauge of this table: `Plan.unit` changes to it.
UMUP = replace(
    DEPTH_MUP,
    name="umup",
    source="u-µP 2407.17465, Table 2: multipliers 1/√fan-in, 1/fan-in on the readout, 1/√depth; embedding lr 1/√fan-out",
    rows={
        "input": replace(MUP.rows["input"], adam=ONE / SQRT_OUT),
        "vector": MUP.rows["vector"],
        # its own gauge: unit weights, and the multiplier that is folded
        "hidden": Row(ONE, ONE / SQRT_IN, OUT, ONE / (SQRT_IN * OUT), spectral=SQRT_OUT).folded(ONE / SQRT_IN),
        "output": Row(ONE, ONE, IN, ONE / IN).folded(ONE / IN),
        "bottleneck": Row(ONE, ONE / SQRT_IN, ONE, ONE / SQRT_IN).folded(ONE / SQRT_IN),
        "finite": MUP.rows["finite"],
    },
    declared=DEPTH_MUP.declared | {("adam", "change", "first"): (-0.5, -0.5)},
)

TABLES = {each.name: each for each in (MUP, SP, COMPLETEP, DEPTH_MUP, NTK, SPECTRAL, UMUP)}

# What width-stable feature learning looks like, whatever the parametrization in force: the coordinate check's measure.
# Logits may start as small as they like (µP's fall as −½, a zero readout's are 0) but not grow.
HEALTHY: dict[tuple[str, str], Band] = {
    ("activation", "feature"): (0, 0),
    ("activation", "output"): (float("-inf"), 0),
    ("change", "feature"): (0, 0),
    ("change", "output"): (-0.5, 0),
    # Queries and keys whose head dim grows start uncorrelated, and a gradient that passes their product fades until they are not:
    # −1 (queries) and −½ (keys) in the first steps of SGD (docs/coordinate-check.md).
    ("change", "attention"): (-1, 0),
    # Where no axis grows, under SGD, as its updates below.
    ("change", "finite"): (-0.5, 0),
    # Of parameters, each alone (`coordinates.updates`): ΔW·x of a matrix against x, a gain's or a bias's as it is.
    ("update", "feature"): (0, 0),
    # Where the step itself has its size, ΔW·x fades at most as an incoherent sum does: in narrow models' first steps the
    # examples' gradients are not aligned with the features (docs/coordinate-check.md).
    ("update", "stepped"): (-0.5, 0),
    ("step", "feature"): (0, 0),
    # 0 once the readout's update and the features are aligned, less in narrow models' first steps.
    ("update", "output"): (-0.5, 0),
    ("update", "attention"): (-1, 0),
    # The gradient of what all channels share (MLP-Mixer's layers over the patches) is a sum over them, incoherent at first.
    ("update", "finite"): (-0.5, 0),
    # A normalized readout's gain acts on the directions that its rows start with, whose logits may start as small as they like.
    ("update", "gain"): (float("-inf"), 0),
    # What the whole model makes of a parameter of its own, in its logits.
    ("update", "stream"): (-0.5, 0),
    # Of parameters: no row, no health. A readout may start as small as it likes, at zero too.
    ("weight", "feature"): (0, 0),
    ("weight", "output"): (float("-inf"), 0),
    ("gradient", "feature"): (0, 0),
    ("gradient", "output"): (0, 0),
}

# lr · weight decay, what a step takes off a weight, by the policy that was chosen (docs/rules.md).
HEALTHY_DECAY: dict[str, Band] = {"independent": (0, 0), "coupled": (-1, 1), "sqrt": (-0.5, 0.5)}

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
