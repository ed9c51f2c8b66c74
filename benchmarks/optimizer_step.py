"""What µP's parameter groups cost: one AdamW step with the plan's groups against one plain group."""

from __future__ import annotations

import torch
from harness import Claim, arguments, at_most, paired_ratio, publish

import mutransfer as mt
from mutransfer.proxies.builtin import cross_entropy
from mutransfer.proxies.models.transformer import Transformer, TransformerShape

STEPS = 20  # per timing


def claim(width: int, foreach: bool, fused: bool, pairs: int) -> Claim:
    """Time both optimizers on equal models with equal gradients."""
    tokens = torch.zeros(2, 8, dtype=torch.long)
    family = mt.Family(
        lambda s: Transformer(TransformerShape(s.width, s.depth, 256)), (tokens, tokens), cross_entropy, mt.Scale(64, 4)
    )
    plan = mt.plan(family, mt.Scale(width, 4))
    options = {"fused": True} if fused else {"foreach": foreach}
    optimizers = []
    for grouped in (True, False):
        model = family.build(plan.scale)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        parameters = plan.param_groups(model) if grouped else list(model.parameters())
        optimizers.append(torch.optim.AdamW(parameters, **options))  # type: ignore[arg-type]

    def steps(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(STEPS):
            optimizer.step()

    ratios = paired_ratio(lambda: steps(optimizers[0]), lambda: steps(optimizers[1]), pairs)
    kind = "fused" if fused else "foreach" if foreach else "for-loop"
    return at_most(f"AdamW {kind}, width {width}: {len(plan.groups())} groups / 1 group", ratios, 1.02)


if __name__ == "__main__":
    given = arguments(__doc__ or "")
    repeats = 2 if given.quick else 15
    widths = (256,) if given.quick else (256, 512)
    kinds = ((False, False), (True, False), (False, True))
    publish([claim(width, *kind, repeats) for width in widths for kind in kinds], given.json)
