"""Pruning at initialization: what its scores, shuffles and fresh weights are worth, and whether the learning rate transfers.

Scores: an MLP 64-256-256-10 on the digits, every matrix pruned, AdamW. For each way of choosing the mask and each density, the
learning rate is the best of a grid with factors of 2, by the mean over seeds; its mean validation accuracy over all seeds is
reported with Student's 95% interval. "Shuffled" permutes the mask within each layer; "fresh" draws the weights again after
scoring. "After training" prunes by magnitude what a dense run of the same length has trained, and trains on.

Transfer: mutransfer's own loop. The best learning rate over density and width, under SµPar and under µP alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import arguments
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from mutransfer.methods import erdos_renyi
from mutransfer.proxies.data import load_data
from mutransfer.proxies.methods.pruned import kept, prune, shuffled
from mutransfer.proxies.models import MLP
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, RunContext, run_jobs
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

Masks = dict[str, Tensor]
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
RATES = tuple(2.0**-k for k in (10, 9, 8, 7, 6))
STEPS, BATCH, WIDTH = 600, 64, 256
SCORES = ("synflow", "snip", "grasp", "magnitude", "random")
BETAS, EPS = (0.9, 0.95), 1e-8


def model_of(seed: int) -> nn.Module:
    """Return the MLP with weights of standard deviation 1/√fan-in."""
    torch.manual_seed(seed)
    model = MLP(64, WIDTH, 2, 10)
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(0, each[0].numel() ** -0.5) if each.dim() > 1 else each.zero_()
    return model


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of the digits."""
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Start:
    """What a seed's training starts from: weights by name, and masks of the matrices."""

    weights: dict[str, Tensor]
    masks: Masks


def starts(by: str, density: float, seeds: range, how: str, dense: dict[int, dict[str, Tensor]]) -> list[Start]:
    """Return a start for each seed; ``how`` is "", "shuffled" or "fresh", ``dense`` the weights of trained dense models."""
    found = []
    for seed in seeds:
        model = model_of(seed)
        weights = {name: each.detach().clone() for name, each in model.named_parameters()}
        names = [name for name, each in weights.items() if each.dim() > 1]
        if by == "after training":
            weights = dense[seed]
            masks = kept({name: weights[name].abs() for name in names}, density)
        elif by == "erk":
            shares = erdos_renyi({name: tuple(weights[name].shape) for name in names}, density)
            generator = torch.Generator().manual_seed(seed)
            masks = {
                name: kept({name: torch.rand(weights[name].shape, generator=generator)}, shares[name])[name]
                for name in names
            }
        else:
            batch = load_data("digits", 1).batch(0, 256, seed)
            masks = prune(model, loss_of, batch, names, by, density, seed)
        masks = shuffled(masks, seed) if how == "shuffled" else masks
        if how == "fresh":
            weights = {name: each.detach().clone() for name, each in model_of(seed + 1000).named_parameters()}
        found.append(Start(weights, {name: mask.float() for name, mask in masks.items()}))
    return found


def trained(given: list[Start], seeds: range, steps: int) -> tuple[list[list[float]], list[dict[str, Tensor]]]:
    """Train all seeds at all of `RATES` at once.

    Returns:
        The validation accuracy by rate and seed, in percent; and the weights of each seed at the middle rate.
    """
    data, frame = load_data("digits", 1), model_of(0)
    count = len(RATES) * len(given)
    p = {name: torch.stack([each.weights[name] for _ in RATES for each in given]) for name in given[0].weights}
    masks = {name: torch.stack([each.masks[name] for _ in RATES for each in given]) for name in given[0].masks}
    lr = torch.tensor([rate for rate in RATES for _ in given])
    first, second = ({name: torch.zeros_like(each) for name, each in p.items()} for _ in range(2))
    for name, mask in masks.items():
        p[name] *= mask

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(frame, parameters, (x,)), y)

    gradients = torch.vmap(grad(one))
    for step in range(steps):
        batches = [data.batch(step, BATCH, seed) for seed in seeds]
        x, y = (torch.stack([batch[i] for _ in RATES for batch in batches]) for i in (0, 1))
        now = lr * 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / (0.1 * steps))
        for name, g in gradients(p, x, y).items():
            g = g * masks[name] if name in masks else g
            first[name].lerp_(g, 1 - BETAS[0])
            second[name].lerp_(g * g, 1 - BETAS[1])
            size = first[name] / (1 - BETAS[0] ** (step + 1))
            root = (second[name] / (1 - BETAS[1] ** (step + 1))).sqrt() + EPS
            p[name] -= now.view(-1, *[1] * (g.dim() - 1)) * size / root
    ((x, y),) = data.validation()
    with torch.no_grad():
        logits = torch.vmap(lambda each: functional_call(frame, each, (x,)))(p)
    hits = 100 * (logits.argmax(-1) == y).double().mean(-1)
    middle = len(RATES) // 2 * len(given)
    weights = [{name: each[middle + k].clone() for name, each in p.items()} for k in range(len(given))]
    assert len(hits) == count
    return hits.view(len(RATES), len(given)).tolist(), weights


def best(accuracies: list[list[float]]) -> list[float]:
    """Return the accuracies of the seeds at the rate with the highest mean."""
    return max(accuracies, key=statistics.mean)


def interval(values: list[float]) -> str:
    """Return the mean with Student's 95% interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def compare(seeds: range, densities: tuple[float, ...], steps: int) -> dict[str, Any]:
    """Print accuracies by score and density, and return them by seed."""
    ones = starts("random", 1.0, seeds, "", {})
    accuracies, weights = trained(ones, seeds, steps)
    dense = dict(zip(seeds, weights, strict=True))
    found: dict[str, Any] = {"dense": best(accuracies)}
    print(f"dense: {interval(found['dense'])}\n\n| mask | {' | '.join(f'{each:g}' for each in densities)} |")
    print("|---|" + "---|" * len(densities))
    ways = [("after training", ""), ("erk", ""), *((by, how) for by in SCORES for how in ("", "shuffled", "fresh"))]
    for by, how in ways:
        row = []
        for density in densities:
            name = f"{by}{', ' + how if how else ''}"
            found[f"{name} {density:g}"] = best(trained(starts(by, density, seeds, how, dense), seeds, steps)[0])
            row.append(interval(found[f"{name} {density:g}"]))
        print(f"| {by}{', ' + how if how else ''} | {' | '.join(row)} |", flush=True)
    return found


def transfer(seeds: range, widths: tuple[int, ...], densities: tuple[float, ...], steps: int) -> dict[str, Any]:
    """Print the best learning rate by density, width and rule (log2), and return the losses."""
    rates = [-11 + 0.5 * k for k in range(17)]
    found: dict[str, Any] = {}
    print("\n| rule | width | " + " | ".join(f"density {each:g}" for each in densities) + " |")
    print("|---|---|" + "---|" * len(densities))
    for rule in ("supar", "none"):
        for width in widths:
            cells = []
            for density in densities:
                method = {"name": "pruned", "density": density, "score": "random", "rule": rule}
                given = Experiment.read(
                    {"model": "mlp", "data": "digits", "proxy": {"width": width, "depth": 4},
                     "base": {"width": 64, "depth": 4}, "steps": steps, "batch_size": 64, "method": method},
                    "benchmark",
                )  # fmt: skip
                jobs = [
                    Job((rate, seed), given.proxy_scale, "mup", given.recipe.with_(lr=2.0**rate), seed)
                    for rate in rates for seed in seeds
                ]  # fmt: skip
                done = run_jobs(VectorizedExecutor(8), RunContext(given), jobs)
                losses = {job.key: outcome.loss for job, outcome in done}
                means = {rate: statistics.mean(losses[rate, seed] for seed in seeds) for rate in rates}
                optimum = parabola(means)
                found[f"{rule} {width} {density:g}"] = {"optimum": optimum, "means": means}
                cells.append(f"{optimum:+.2f}")
            print(f"| {rule} | {width} | {' | '.join(cells)} |", flush=True)
    return found


def parabola(means: dict[float, float]) -> float:
    """Return the minimum of a parabola through the lowest mean and its neighbours within 1.5 octaves."""
    finite = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
    low = min(finite, key=finite.__getitem__)
    near = [rate for rate in finite if abs(rate - low) <= 1.5]
    a, b, _ = np.polyfit(near, [finite[rate] for rate in near], 2)
    return float(np.clip(-b / (2 * a), low - 1, low + 1)) if a > 0 else low


def main() -> None:
    """Run one part or both."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--part", choices=["scores", "transfer", "both"], default="both")

    options = arguments(__doc__ or "", more)
    begun, results = time.perf_counter(), {}
    seeds = range(2 if options.quick else 5)
    if options.part != "transfer":
        densities = (0.1,) if options.quick else DENSITIES
        results["scores"] = compare(seeds, densities, 20 if options.quick else STEPS)
    if options.part != "scores":
        widths, densities = ((64,), (1.0, 0.25)) if options.quick else ((64, 256, 512), (1.0, 1 / 4, 1 / 16, 1 / 64))
        results["transfer"] = transfer(
            range(2 if options.quick else 3), widths, densities, 20 if options.quick else 200
        )
    print(f"\n{time.perf_counter() - begun:.0f} s")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
