"""The ways in which a scaling goes wrong in practice, as data: what is planted in tests is what a verdict can name.

A fault multiplies initial weights and learning rates by powers of the width on top of µP's own, by role. What it does to the
sizes that a check measures follows (`Fault.signature`), by the counting of TP-V 2203.03466, Appendix J.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from ..plans import ParameterPlan, Plan

__all__ = ["FAULTS", "Fault", "Signature", "plant", "plant_in"]

HALF = Fraction(1, 2)
ROLES = ("input", "hidden", "output")
Powers = Mapping[str, Fraction | int]
Signature = dict[tuple[str, str], float]


@dataclass(frozen=True, eq=False)
class Fault:
    """One fault: powers of the width by role, beyond µP's.

    Args:
        name: its key.
        says: column ("adam" or "sgd") → the sentence that names it.
        init: of the initial weights.
        adam: of the learning rate, for Adam-like optimizers.
        sgd: of the learning rate, for SGD-like ones.
        forward: of a number in the forward pass, by the role of the module that it stands behind.
        decay: column → powers of the weight decay.
    """

    name: str
    says: Mapping[str, str]
    init: Powers = field(default_factory=dict)
    adam: Powers = field(default_factory=dict)
    sgd: Powers = field(default_factory=dict)
    forward: Powers = field(default_factory=dict)
    decay: Mapping[str, Powers] = field(default_factory=dict)

    def lr(self, column: str) -> Powers:
        """Return the learning rate's powers in an optimizer's column."""
        return self.adam if column == "adam" else self.sgd

    def signature(self, column: str) -> Signature:
        """Return the slopes beyond µP's of what a module adds by itself; NaN where the fault does not tell.

        ("weight", role): of the initial weights. ("step", role): of the learning rate. ("gain", role): of a module's output
        against its input. ("update", role): of ΔW·x against its input after one step, which under SGD follows the gradient, and
        so the readout's weights. ("decay", role): of lr · weight decay.
        """
        found: Signature = {}
        for role in ROLES:
            init, forward = float(self.init.get(role, 0)), float(self.forward.get(role, 0))
            found["weight", role] = init
            found["step", role] = float(self.lr(column).get(role, 0))
            # A wrong rate comes with its own decay or without: a plan's is made for the right rate, a script's for one rate.
            wrong_lr = bool(self.lr(column).get(role, 0))
            found["decay", role] = math.nan if wrong_lr else float(self.decay.get(column, {}).get(role, 0))
            # Biases, which do not shrink, hide how fast small logits do, or a layer whose weights are too small.
            found["gain", role] = math.nan if role == "output" or init else forward
            found["update", role] = float(self.lr(column).get(role, 0)) + forward
            if column == "sgd" and role != "output":
                found["update", role] += float(self.init.get("output", 0))
            # How a hidden layer's size reaches the gradients depends on the norms between, and where there are none the loss
            # saturates.
            if column == "sgd" and (self.init.get("hidden") or (self.forward and role != "output")):
                found["update", role] = math.nan
        return found


def both(text: str) -> dict[str, str]:
    """Return the same sentence for both columns."""
    return {"adam": text, "sgd": text}


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "hidden-lr",
            {"adam": "hidden lr not divided by the width", "sgd": "hidden lr divided by the width, which only Adam needs"},
            adam={"hidden": 1},
            sgd={"hidden": -1},
        ),
        Fault(
            "hidden-lr-root",
            both("hidden lr off by the root of the width"),
            adam={"hidden": HALF},
            sgd={"hidden": -HALF},
        ),
        Fault(
            "input-lr",
            {"adam": "input lr divided by the width, as if the layer were hidden", "sgd": "input lr not multiplied by the width"},
            adam={"input": -1},
            sgd={"input": -1},
        ),
        Fault("readout-lr", both("readout lr not divided by the width"), adam={"output": 1}, sgd={"output": 1}),
        Fault("readout-init", both("readout's initial weights shrink as width^-1/2, not as 1/width"), init={"output": HALF}),
        Fault(
            "readout-twice",
            both("logits divided by the width twice"),
            init={"output": -1},
            adam={"output": -1},
            sgd={"output": -2},
        ),
        Fault("hidden-init", both("hidden initial weights do not shrink as width^-1/2"), init={"hidden": HALF}),
        Fault("hidden-init-small", both("hidden initial weights shrink as 1/width, not as width^-1/2"), init={"hidden": -HALF}),
        Fault("input-init", both("input's initial weights shrink with the width"), init={"input": -HALF}),
        Fault(
            "one-lr",
            both("one learning rate for all parameters"),
            adam={"hidden": 1, "output": 1},
            sgd={"input": -1, "output": 1},
        ),
        Fault(
            "standard",
            both("the standard parametrization: one learning rate for all, and the readout's initial weights as width^-1/2"),
            init={"output": HALF},
            adam={"hidden": 1, "output": 1},
            sgd={"input": -1, "output": 1},
        ),
        Fault(
            "decay",
            both("lr · weight decay is not constant, the weight decay does not make up for the learning rate's factor"),
            decay={"adam": {"hidden": -1, "output": -1}, "sgd": {"input": 1, "output": -1}},
        ),
        Fault("forward", both("a number behind the input layer grows with the width"), forward={"input": HALF}),
    )
}  # fmt: skip


def plant(fault: Fault, planner: Callable[..., Plan], column: str) -> Callable[..., Plan]:
    """Return a planner whose plans have ``fault``'s weights and learning rates; a number in the forward pass is the model's."""

    def planned(*args: Any, **kwargs: Any) -> Plan:
        plan = planner(*args, **kwargs)
        wider = plan.scale.width / plan.base.width

        def wrong(row: ParameterPlan) -> ParameterPlan:
            role = row.role if len(row.shape) > 1 else ""
            lr = row.lr * wider ** float(fault.lr(column).get(role, 0))
            # lr · weight decay stays what it was, so that it does not give the fault away.
            decay = row.weight_decay * row.lr / lr * wider ** float(fault.decay.get(column, {}).get(role, 0))
            init = row.init.scaled(wider ** float(fault.init.get(role, 0)))
            return replace(row, init=init, lr=lr, weight_decay=decay)

        return replace(plan, rows=tuple(map(wrong, plan.rows)))

    return planned


def plant_in(parameter: str, power: float, planner: Callable[..., Plan]) -> Callable[..., Plan]:
    """Return a planner whose plans have one parameter's learning rate off by a power of the width, and lr · weight decay kept."""

    def planned(*args: Any, **kwargs: Any) -> Plan:
        plan = planner(*args, **kwargs)
        wider = plan.scale.width / plan.base.width
        assert any(row.name == parameter for row in plan.rows), parameter

        def wrong(row: ParameterPlan) -> ParameterPlan:
            return replace(row, lr=row.lr * wider**power, weight_decay=row.weight_decay * wider**-power)

        return replace(plan, rows=tuple(wrong(row) if row.name == parameter else row for row in plan.rows))

    return planned
