"""What every benchmark shares: ratios within one run, medians with their range, and the claims' JSON.

Absolute times mean little on a shared machine, so two variants are timed in turn (A B A B …) and compared pair by pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from mutransfer.run_dir import environment

__all__ = ["Claim", "arguments", "paired_ratio", "publish"]


@dataclass(frozen=True)
class Claim:
    """One measured number against its bar: ``ok`` when the median is on the right side."""

    name: str
    value: float
    low: float
    high: float
    bar: float
    ok: bool


def arguments(
    description: str, more: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    """Parse --json, --quick, and what ``more`` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the claims as one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: does it run, not how fast")
    more(parser)
    return parser.parse_args()


def paired_ratio(a: Callable[[], None], b: Callable[[], None], pairs: int) -> list[float]:
    """Return time(a)/time(b) of each of ``pairs`` rounds, the order changing every round; one round warms up."""
    ratios = []
    for i in range(pairs + 1):
        times = {}
        for name, run in (("a", a), ("b", b)) if i % 2 else (("b", b), ("a", a)):
            begun = time.perf_counter()
            run()
            times[name] = time.perf_counter() - begun
        ratios.append(times["a"] / times["b"])
    return ratios[1:]


def at_most(name: str, values: list[float], bar: float) -> Claim:
    """Return the claim that the median of ``values`` is at most ``bar``; low and high are their range."""
    median = statistics.median(values)
    return Claim(name, median, min(values), max(values), bar, median <= bar)


def at_least(name: str, values: list[float], bar: float) -> Claim:
    """Return the claim that the median of ``values`` is at least ``bar``; low and high are their range."""
    median = statistics.median(values)
    return Claim(name, median, min(values), max(values), bar, median >= bar)


def publish(claims: list[Claim], as_json: bool) -> None:
    """Print the claims as a table, or as JSON."""
    about = environment("cuda" if torch.cuda.is_available() else "cpu")
    if as_json:
        machine = {key: about[key] for key in ("platform", "processor", "cores", "cuda")}
        print(json.dumps({"claims": [asdict(c) for c in claims], "machine": machine, "versions": about["versions"]}))
        return
    print(f"{about['processor']}, {about['cores']} cores, torch {about['versions']['torch']}\n")
    wide = max(len(c.name) for c in claims) + 2
    print(f"{'claim':<{wide}}{'median':>8}{'min':>8}{'max':>8}{'bar':>8}")
    for c in claims:
        print(f"{c.name:<{wide}}{c.value:>8.3f}{c.low:>8.3f}{c.high:>8.3f}{c.bar:>8.3f}  {'ok' if c.ok else 'MISSED'}")
