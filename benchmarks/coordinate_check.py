"""What the measurements of a coordinate check cost, against ``mup.coord_check.get_coord_data`` on the same models.

Both sides train the architectures of mup's MLP and Transformer examples from as many seeds at the same widths on one batch,
and look at the same five points: before, and after each of four optimizer steps. Ours measures updates, gradients, weights and
lr · weight decay besides, and its time includes observing and planning the model; mup's base shapes are made beforehand.
The third side is the same training with nothing measured at all, with a fused optimizer, at every width one model at a time or
all seeds stacked under `torch.vmap`, whichever is sooner: what a recorder that costs nothing would leave.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import Claim, arguments, at_least, publish
from mup.coord_check import get_coord_data

import mutransfer as mt
from mutransfer.coord_check.measure import Watched
from mutransfer.coord_check.stacked import StackedModels

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("mup_models", ROOT / "tests/helpers/mup_models.py")
assert SPEC is not None
assert SPEC.loader is not None
MODELS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MODELS)
WIDTHS = (64, 128, 256, 512)
STEPS, SEEDS = 4, 5
NOTHING = Watched({}, {})


def theirs(family: mt.Family, optimizer: str, widths: tuple[int, ...], seeds: int) -> float:
    """Return mup's seconds: annotated models, its own optimizer, one fixed batch."""
    inputs, targets = family.batch
    models = {width: (lambda width=width: family.build(mt.Scale(width, 2))) for width in widths}
    begun = time.perf_counter()
    get_coord_data(
        models, [(inputs, targets.flatten())], optimizer, lr=2**-8, mup=True, nsteps=STEPS + 1, nseeds=seeds, cuda=False,
        flatten_output=targets.dim() > 1, show_progress=False,
    )  # fmt: skip
    return time.perf_counter() - begun


def ours(family: mt.Family, optimizer: str, widths: tuple[int, ...], seeds: int) -> float:
    """Return our seconds, from the family to the frame."""
    begun = time.perf_counter()
    mt.record(family, widths, optimizer=optimizer, lr=2**-8, steps=STEPS, seeds=range(seeds))
    return time.perf_counter() - begun


def bare(family: mt.Family, optimizer: str, widths: tuple[int, ...], seeds: int) -> float:
    """Return the seconds of the training alone, under one learning rate, in the quicker manner of each width."""
    cls = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]

    def stack(models: Sequence[torch.nn.Module]) -> None:
        seen = StackedModels(family, models, lambda model: cls(model.parameters(), lr=2**-8, fused=True), family.batch)
        for _ in range(STEPS):
            seen.backward(seen.forward(NOTHING, None, None)[0])
            seen.optimizer.step()
        with torch.no_grad():
            seen.forward(NOTHING, None, None)

    def seconds(width: int, at_once: int) -> float:
        begun = time.perf_counter()
        for seed in range(0, seeds, at_once):
            torch.manual_seed(seed)
            stack([family.build(mt.Scale(width, 2)) for _ in range(at_once)])
        return time.perf_counter() - begun

    return sum(min(seconds(width, at_once) for at_once in (1, seeds)) for width in widths)


def claims(name: str, optimizer: str, widths: tuple[int, ...], seeds: int, repeats: int) -> list[Claim]:
    """Time the three sides in turn."""
    annotated, plain = getattr(MODELS, name), getattr(MODELS, f"plain_{name}")
    spent = [
        [side(family, optimizer, widths, seeds) for side, family in ((theirs, annotated), (ours, plain), (bare, plain))]
        for _ in range(repeats + 1)
    ][1:]  # one round warms up
    seconds = ", ".join(f"{statistics.median(side):.2f}" for side in zip(*spent, strict=True))
    where = f"{name}, {optimizer}, widths {widths[0]}–{widths[-1]}, {seeds} seeds ({seconds} s)"
    return [
        at_least(f"{where}: mup / ours", [a / b for a, b, _ in spent], 5.0),
        at_least(f"{where}: mup / training alone", [a / c for a, _, c in spent], 5.0),
    ]


if __name__ == "__main__":
    given = arguments(__doc__ or "")
    torch.manual_seed(0)
    cases = [(name, optimizer) for name in ("mlp", "transformer") for optimizer in ("adam", "sgd")]
    sets = [(WIDTHS, SEEDS)] if given.quick else [(WIDTHS, SEEDS), ((32, 64, 128, 256), 20)]
    found = [
        claim
        for sizes, seeds in sets
        for case in cases
        for claim in claims(*case, sizes, seeds, 1 if given.quick else 5)
    ]
    publish(found, given.json)
