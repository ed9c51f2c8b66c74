"""Gauge changes: a forward multiplier, written instead into initialization and optimizer settings.

If a tensor is c·W everywhere it is used, then training W under the multiplier c equals training W' = c·W without it, with
the settings below (abc-symmetry, TP-V 2203.03466, Appendix J.2.1; both sides agree to rounding over whole runs).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Factors"]


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

    def folded(self, c: float, column: str) -> Factors:
        """Return these factors with a forward multiplier ``c`` written into them.

        Adam-like steps do not see the gradient's size, so the step itself must grow by c; SGD's gradient has shrunk
        by c, so its learning rate grows by c².
        """
        if column == "adam":
            return self * Factors(init=c, lr=c, weight_decay=1 / c, eps=1 / c, gauge=c)
        return self * Factors(init=c, lr=c * c, weight_decay=1 / (c * c), gauge=c)
