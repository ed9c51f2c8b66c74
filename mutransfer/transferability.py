"""What of a tuned recipe is not known to transfer, one sentence each (TP-V 2203.03466, Table 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .plans import Plan
from .recipe import Recipe
from .scale import Scale
from .tables import table

__all__ = ["of_depth", "of_laws", "of_tuned"]

TABLE_1 = "TP-V 2203.03466, Table 1"

# What TP-V's Table 1 says of a tuned value, by the recipe's or the model's name for it.
REGULARISATION = {"weight_decay", "decay", "decay_policy", "dropout", "label_smoothing", "l2", "stochastic_depth"}
TIED_TO_BATCH = {"betas", "beta1", "beta2", "momentum", "eps", "clip"}
TIED_TO_LENGTH = {"betas", "beta1", "beta2", "momentum", "eps", "warmup", "cooldown", "final"}
OF_THE_RUN = {"batch_size", "batch", "steps", "tokens", "epochs", "sequence_length"}
TRANSFERS = {"lr", "schedule", "init_scale", "alpha_input", "alpha_attention", "alpha_output"}


def of_tuned(recipe: Recipe, tuned: Sequence[str], m_B: float, m_D: float) -> Iterator[str]:
    """Warn of every tuned value that is regularization, or tied to the batch or the length and these change."""
    for full in tuned:
        name = full.rpartition(".")[2]
        value = getattr(recipe, name, None)
        what = f"{name} ({value})" if value is not None else name
        if name in REGULARISATION or "dropout" in name:
            yield (
                f"{what} was tuned on the proxy, and regularisation does not transfer across scale ({TABLE_1}): choose it "
                "for the target's own data and size."
            )
        elif name in OF_THE_RUN:
            yield f"{what} was tuned on the proxy, and what is tied to batch or length does not transfer ({TABLE_1})."
        elif name in TIED_TO_BATCH | TIED_TO_LENGTH:
            changed = [f"batch (m_B = {m_B:g})"] if name in TIED_TO_BATCH and m_B != 1 else []
            changed += [f"duration (m_D = {m_D:g})"] if name in TIED_TO_LENGTH and m_D != 1 else []
            if changed:
                yield f"{what} was tuned on the proxy, is tied to the {' and the '.join(changed)}, and is carried unchanged."
        elif name not in TRANSFERS:
            yield f"{what} was tuned on the proxy, and whether it transfers is not known: check it at two widths."


def of_laws(m_B: float, m_D: float, batch: tuple[int, int], examples: tuple[int, int]) -> Iterator[str]:
    """Warn of a batch or an amount of data that changes without a law; ``batch`` and ``examples`` are (proxy, target)."""
    if m_B != 1:
        yield (
            f"the batch grows {m_B:g}x ({batch[0]} to {batch[1]} examples): no batch or duration law applied, so lr, betas and "
            "eps are those of the proxy's batch."
        )
    if m_D != 1:
        yield (
            f"the run's data grows {m_D:g}x ({examples[0]} to {examples[1]} examples): no batch or duration law applied, so lr "
            "and weight decay are those of the proxy's duration."
        )


def of_depth(plan: Plan, proxy: Scale) -> Iterator[str]:
    """Warn of a depth that changes without a rule."""
    # When the proxy has the base's depth, the plan's own note says the same.
    changed = plan.scale.depth != proxy.depth and proxy.depth != plan.base.depth
    if changed and table(plan.parametrization).depth is None:
        yield (
            f"depth goes from {proxy.depth} in the proxy to {plan.scale.depth}: {plan.parametrization} has no rule for depth, "
            "so the recipe is carried without any factor."
        )
