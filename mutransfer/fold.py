"""Gauge changes: a forward multiplier, written instead into initialization and optimizer settings.

If a tensor is c·W everywhere it is used, then training W under the multiplier c equals training W' = c·W without it, with
the settings below (abc-symmetry, TP-V 2203.03466, Appendix J.2.1; both sides agree to rounding over whole runs).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FOLDS", "Factors"]

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
