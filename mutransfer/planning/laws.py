"""Batch and duration laws: empirical rules with one source each, applied only when the recipe names one.

All ratios are relative to the run that the recipe was tuned on: m_B and m_D are the ratios of batch sizes and of training
tokens, m_N that of parameter counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import RequestError, nearest
from ..recipe import Recipe, Scale

__all__ = ["LAWS", "Change", "Law", "Ratios", "averaged", "law", "ratios"]

ADAMS = ("adamw", "adam", "nadam")


@dataclass(frozen=True)
class Ratios:
    """Target / proxy ratios of batch size, training tokens and parameter count (None if not counted)."""

    batch: float
    tokens: float
    parameters: float | None = None


@dataclass(frozen=True)
class Change:
    """Factors by which a law multiplies all learning rates, weight decays, 1 − β and epsilons."""

    lr: float = 1.0
    weight_decay: float = 1.0
    averaging: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True)
class Law:
    """A batch or duration law.

    Args:
        name: as in the recipe.
        says: the law in one sentence.
        source: where the law comes from.
        change: computes the factors from the ratios.
        optimizers: the optimizers that it was found with.
        needs: the sizes that it reads.
    """

    name: str
    says: str
    source: str
    change: Callable[[Ratios], Change]
    optimizers: tuple[str, ...] = ADAMS
    needs: tuple[str, ...] = ("batch", "tokens")


def _sqrt(m: Ratios) -> Change:
    r = m.batch / m.tokens
    return Change(lr=r**0.5, weight_decay=r**0.5, averaging=r, eps=r**-0.5)


def _power_lines(m: Ratios) -> Change:
    if m.parameters is None:
        raise RequestError(
            "the law power-lines needs the ratio of parameter counts: give the proxy's count (proxy_parameters)."
        )
    per_parameter = m.tokens / m.parameters
    return Change(weight_decay=m.batch / m.tokens * per_parameter**0.527)


LAWS = {
    each.name: each
    for each in (
        Law(
            "sqrt",
            "with r = m_B/m_D, lr and weight decay ∝ √r, 1 − β ∝ r, eps ∝ 1/√r",
            "Complete(d)P, as read from a third-party implementation and not from the paper",
            _sqrt,
        ),
        Law(
            "bjorck",
            "lr ∝ tokens^-0.32",
            "Bjorck et al. 2409.19913",
            lambda m: Change(lr=m.tokens**-0.32),
            needs=("tokens",),
        ),
        Law(
            "power-lines",
            "batch / (lr · weight decay · tokens) ∝ (tokens per parameter)^-0.527, by adjusting the weight decay",
            "Power Lines 2505.13738",
            _power_lines,
            ("adamw", "nadam"),
        ),
        Law(
            "ema",
            "lr · weight decay · steps is held constant by adjusting the weight decay",
            "Wang & Aitchison 2405.13698",
            lambda m: Change(weight_decay=m.batch / m.tokens),
            ("adamw", "nadam"),
        ),
    )
}


def law(name: str) -> Law:
    """Return the law called ``name``.

    Raises:
        RequestError: no law has this name; the message suggests the nearest one.
    """
    if name not in LAWS:
        raise RequestError(f"unknown law {name!r}: {nearest(name, [*LAWS, 'none'])}")
    return LAWS[name]


def ratios(scale: Scale, base: Scale, parameters: float | None = None) -> Ratios | None:
    """Return the ratios between two scales, or None if one of them does not state its batch or tokens."""
    if None in (scale.batch, scale.tokens, base.batch, base.tokens):
        return None
    return Ratios(scale.batch / base.batch, scale.tokens / base.tokens, parameters)  # type: ignore[operator]


def averaged(recipe: Recipe, scale: Scale, base: Scale) -> Recipe:
    """Return the recipe with its betas adjusted by its law for the change from ``base`` to ``scale``.

    Raises:
        RequestError: the batch grows so much that a moment would no longer be averaged.
    """
    found = ratios(scale, base)
    if recipe.law != "sqrt" or found is None:
        return recipe
    r = law(recipe.law).change(found).averaging
    betas = tuple(1 - (1 - beta) * r for beta in recipe.betas)
    if min(betas) < 0:
        raise RequestError(
            f"the law {recipe.law} turns betas {recipe.betas} into {betas} at m_B/m_D = {r:g}: increase the batch less, or "
            "train on more tokens."
        )
    return recipe.with_(betas=betas)
