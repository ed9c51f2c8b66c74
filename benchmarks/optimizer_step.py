"""What µP's parameter groups cost: one AdamW step with the plan's groups against one plain group."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from harness import Claim, arguments, at_most, paired_ratio, publish

import mutransfer as mt
from mutransfer.proxies.load import cross_entropy
from mutransfer.proxies.models import Transformer, TransformerShape

PAIRS = 60  # steps of each per model at width 256; fewer at larger ones, whose steps are longer
RECIPE = mt.Recipe(lr=2**-8, weight_decay=0.1)


def claims(width: int, foreach: bool, fused: bool, models: int) -> list[Claim]:
    """Time the plan's groups against one group, and against as many groups with equal settings.

    All step the same parameters, gradients and moments, so that nothing but the groups differs. Where a tensor lies in
    memory moves a step by more than its groups do: every ratio is the median of one model's pairs of steps, and the range
    is over ``models`` made anew.
    """
    tokens = torch.zeros(2, 8, dtype=torch.long)
    family = mt.Family(
        lambda s: Transformer(TransformerShape(s.width, s.depth, 256)), (tokens, tokens), cross_entropy, mt.Scale(64, 4)
    )
    plan = mt.plan(family, mt.Scale(width, 4), recipe=RECIPE)
    options: dict[str, Any] = {"fused": True} if fused else {"foreach": foreach}
    alone, beside = [], []
    for _ in range(models):
        model = family.build(plan.scale)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        groups = plan.param_groups(model)
        planned = torch.optim.AdamW(groups, **options)
        equal, plain = (
            torch.optim.AdamW(parameters, RECIPE.lr, weight_decay=RECIPE.weight_decay, **options)
            for parameters in ([{"params": group["params"]} for group in groups], list(model.parameters()))
        )
        planned.step()
        for other in (equal, plain):
            other.state.update(planned.state)
        alone.append(statistics.median(paired_ratio(planned.step, plain.step, PAIRS * 256 // width)))
        beside.append(statistics.median(paired_ratio(planned.step, equal.step, PAIRS * 256 // width)))
    kind = "fused" if fused else "foreach" if foreach else "for-loop"
    count = len(plan.groups())
    return [
        at_most(f"{kind}, width {width}: {count} planned groups / 1 group", alone, 1.02),
        at_most(f"{kind}, width {width}: {count} planned groups / {count} equal ones", beside, 1.02),
    ]


if __name__ == "__main__":
    given = arguments(__doc__ or "")
    repeats = 2 if given.quick else 9
    widths = (256,) if given.quick else (256, 512, 1024)
    kinds = ((False, False), (True, False), (False, True))
    publish([each for width in widths for kind in kinds for each in claims(width, *kind, repeats)], given.json)
