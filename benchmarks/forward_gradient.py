"""Forward gradients against backpropagation: time and memory over depth, and how the best learning rate moves with the width.

Cost: an MLP of width 256 on batches of 64, depth 1 to 32, one tangent a step; a step's seconds over those of backpropagation,
in turns within one run, and the bytes saved for a backward pass.

Transfer: a two-layer MLP on the digits at widths 32 to 512, SGD under µP, by mutransfer's own loop. The best learning rate (the
minimum of a parabola through the losses near the lowest, log2) at each width, for isotropic tangents and for those with µP's
covariance; its slope against log2 of the width with Student's 95% interval over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from harness import arguments, paired_ratio
from scipy import stats
from torch import nn
from torch.nn import functional as F

from mutransfer.methods import ForwardGradient
from mutransfer.proxies.methods.forward_gradient import forward_gradients
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, RunContext, run_jobs
from mutransfer.sweeps.processes import ProcessExecutor

DEPTHS = (1, 2, 4, 8, 16, 32)
WIDTHS = (32, 64, 128, 256, 512)


def net(depth: int, width: int = 256) -> nn.Sequential:
    """Return an MLP with ``depth`` hidden layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def cost(depths: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Print and return time ratios and saved bytes by depth."""
    batch = torch.randn(64, 64), torch.randint(10, (64,))
    method, found = ForwardGradient(tangents=1), dict[str, Any]()
    print("| depth | a step / one of backpropagation (min to max) | MB saved, backpropagation | MB saved, forward |")
    print("|---|---|---|---|")
    for depth in depths:
        model = net(depth)
        scales = {name: 1.0 for name, _ in model.named_parameters()}

        def forward(model: nn.Module = model, scales: dict[str, float] = scales) -> None:
            forward_gradients(method, model, loss_of, batch, scales, 0, 0)

        def backward(model: nn.Module = model) -> None:
            model.zero_grad(set_to_none=True)
            loss_of(model, batch).backward()

        ratios = paired_ratio(
            lambda f=forward: [f() for _ in range(5)], lambda b=backward: [b() for _ in range(5)], rounds
        )
        saved = []
        for run in (backward, forward):
            total = [0]

            def pack(tensor: torch.Tensor, total: list[int] = total) -> torch.Tensor:
                total[0] += tensor.numel() * tensor.element_size()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                run()
            saved.append(total[0] / 1e6)
        found[str(depth)] = {"ratios": ratios, "saved": saved}
        median = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {depth} | {median} | {saved[0]:.1f} | {saved[1]:.1f} |", flush=True)
    return found


def transfer(widths: tuple[int, ...], seeds: range, steps: int, count: int) -> dict[str, Any]:
    """Print and return the best learning rate by width, and its slope."""
    found: dict[str, Any] = {}
    print("\n| tangents | " + " | ".join(f"width {width}" for width in widths) + " | slope [95% interval] |")
    print("|---|" + "---|" * (len(widths) + 1))
    for covariance, rates in (
        ("isotropic", np.arange(-14, 0.1, 0.5)),
        ("preconditioned", np.arange(-14, 0.1, 0.5)),
        ("backprop", np.arange(-8, 3.1, 0.5)),
    ):
        method: Any = "backprop"
        if covariance != "backprop":
            method = {"name": "forward-gradient", "tangents": count, "covariance": covariance}
        optima: dict[int, list[float]] = {}
        for width in widths:
            given = Experiment.read(
                {"model": "mlp", "data": "digits", "proxy": {"width": width, "depth": 2}, "base": {"width": 32, "depth": 2},
                 "optimizer": "sgd", "steps": steps, "batch_size": 64, "method": method, "recipe": {"momentum": 0.0}},
                "benchmark",
            )  # fmt: skip
            jobs = [
                Job((float(rate), seed), given.proxy_scale, "mup", given.recipe.with_(lr=2.0 ** float(rate)), seed)
                for rate in rates for seed in seeds
            ]  # fmt: skip
            with ProcessExecutor(2) as two:
                losses = {job.key: outcome.loss for job, outcome in run_jobs(two, RunContext(given), jobs)}
            optima[width] = [parabola({float(rate): losses[float(rate), seed] for rate in rates}) for seed in seeds]
        slopes = [
            float(np.polyfit(np.log2(widths), [optima[width][k] for width in widths], 1)[0]) for k in range(len(seeds))
        ]
        half = stats.t.ppf(0.975, len(slopes) - 1) * statistics.stdev(slopes) / math.sqrt(len(slopes))
        found[covariance] = {"optima": optima, "slopes": slopes}
        cells = [f"{statistics.mean(optima[width]):+.2f}" for width in widths]
        mean = statistics.mean(slopes)
        print(
            f"| {covariance} | {' | '.join(cells)} | {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] |", flush=True
        )
    return found


def parabola(losses: dict[float, float]) -> float:
    """Return the minimum of a parabola through the lowest loss and those within an octave of it."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    low = min(finite, key=finite.__getitem__)
    near = [rate for rate in finite if abs(rate - low) <= 1.0]
    if len(near) < 3:
        return low
    a, b, _ = np.polyfit(near, [finite[rate] for rate in near], 2)
    return float(np.clip(-b / (2 * a), low - 0.5, low + 0.5)) if a > 0 else low


def main() -> None:
    """Run one part or both."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--part", choices=["cost", "transfer", "both"], default="both")
        parser.add_argument("--tangents", type=int, default=8, help="tangents of a step in the transfer part")

    options = arguments(__doc__ or "", more)
    begun, results = time.perf_counter(), {}
    if options.part != "transfer":
        results["cost"] = cost(DEPTHS[:2] if options.quick else DEPTHS, 2 if options.quick else 9)
    if options.part != "cost":
        widths = WIDTHS[:2] if options.quick else WIDTHS
        results["transfer"] = transfer(
            widths, range(2 if options.quick else 3), 10 if options.quick else 200, options.tangents
        )
    print(f"\n{time.perf_counter() - begun:.0f} s")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
