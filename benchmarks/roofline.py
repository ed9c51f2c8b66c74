"""How near is a fused, compiled step to what the machine can do? FLOPs and bytes of a step, and the time that each would take.

The peaks are measured in the same run: the rate of a large float32 product, and the rates at which a small tensor, which stays
in the cache, and a large one are copied. "Products alone" are the step's own matrix products, one after the other, without
anything between them: no program that leaves them to the same library can be faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sweep_throughput import experiment
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mutransfer.devices import keep_freed_memory
from mutransfer.recipe import Recipe
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining

ROUNDS, STEPS = 7, 10
COUNTS = {32: 16, 64: 16, 128: 8, 256: 4}
PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default, torch.ops.aten.mm.default)


class Products(TorchDispatchMode):
    """Record every matrix product with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[-1].shape[-1] > 1:  # with a single column, Inductor writes its own kernel
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def seconds(run: Callable[[], object], count: int = 1) -> list[float]:
    """Return the seconds of a call, in each of `ROUNDS` rounds of ``count`` calls after one that warms up."""
    run()
    found = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(count):
            run()
        found.append((time.perf_counter() - begun) / count)
    return found


def peaks() -> tuple[float, float, float]:
    """Return FLOP/s of a large product, and bytes/s read and written while copying a tensor of 1 MB and one of 256 MB."""
    large = torch.randn(2048, 2048)
    flops = 2 * 2048**3 / statistics.median(seconds(lambda: large @ large))
    rates = []
    for count, repeats in ((2**18, 1000), (2**26, 1)):
        source, into = torch.randn(count), torch.empty(count)
        rates.append(2 * 4 * count / statistics.median(seconds(lambda: into.copy_(source), repeats)))  # noqa: B023
    return flops, rates[0], rates[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=list(COUNTS))
    given = parser.parse_args()
    keep_freed_memory()
    flops_peak, cached, memory = peaks()
    print(
        f"large product {flops_peak / 1e9:.0f} GFLOP/s; copies {cached / 1e9:.0f} GB/s in the cache, "
        f"{memory / 1e9:.0f} GB/s beyond\n"
    )
    print("ms of a trial's step:")
    print(
        "| width | K | MFLOP | at the peak | products alone | MB | copied in the cache | beyond | measured (min to max) | "
        "share of the FLOP peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    torch._logging.set_logs(inductor_metrics=True)
    for width in given.widths:
        count = COUNTS[width]
        context = RunContext(asked := experiment(width, "cpu", False))
        plan = context.plan(asked.proxy_scale, asked.parametrization, Recipe(lr=2**-6))
        training = VectorizedTraining(
            context.family, [Slot(plan, 0)] * count, context.required_data, steps=10**6, batch_size=asked.batch_size, clips=False,
            compile=True,
        )  # fmt: skip
        inputs = training.inputs()
        with FlopCounterMode(display=False) as counted:
            training.step(*inputs)
        with Products() as products:
            training.step(*inputs)
        metrics.reset()
        training.advance(1)
        assert metrics.num_bytes_accessed, "nothing was compiled"
        moved, operations = metrics.num_bytes_accessed / count, counted.get_total_flops() / count
        alone = statistics.median(seconds(lambda: [call() for call in products.calls])) / count
        whole = [each / count for each in seconds(lambda: training.advance(STEPS))]  # noqa: B023
        whole = [each / STEPS for each in whole]
        median = statistics.median(whole)
        print(
            f"| {width} | {count} | {operations / 1e6:.0f} | {1e3 * operations / flops_peak:.2f} | {1e3 * alone:.2f} | "
            f"{moved / 1e6:.1f} | {1e3 * moved / cached:.2f} | {1e3 * moved / memory:.2f} | "
            f"{1e3 * median:.2f} ({1e3 * min(whole):.2f} to {1e3 * max(whole):.2f}) | {operations / median / flops_peak:.0%} |",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
