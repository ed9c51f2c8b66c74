"""How often `mutransfer verify` is right: simulated studies with known optima, through the real grid, fit and verdict.

Six kinds of learning-rate basins at three widths. In half of the studies the optimum stays within 0.15 octaves a width, in
the others it drifts by 0.3 to 1.2 octaves each time. Of each study: do the 95% intervals of the optimum, its drift and the
regret hold the true values, and is the verdict right? Wrong is a pass where the carried rate truly costs more than the
limit, or where the optimum truly drifts beyond the limit and that is not free; and a fail where it costs less than the
limit and the optimum stays, or its drift is free. Undecided is neither, and counted.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
from harness import Claim, arguments, publish
from scipy import stats

from mutransfer.basins import DRIFT_LIMIT, REGRET_LIMIT, judge, optima
from mutransfer.schemas import BASINS
from mutransfer.sweeps.verify import grid

KINDS = ("flat", "sharp", "cliff", "noisy", "negative", "edge")
WIDTHS = (16, 64, 256)
SEED_EFFECT = 0.03  # standard deviation of what a seed adds to all losses of a width
STUDIES = 200
COVERAGE, WRONG = 0.90, 0.02  # the bars

Curve = Callable[[float], float]  # log2 of lr over the carried one → loss


class Truth:
    """One simulated study: each width's curve, its optimum and its lowest loss, and the noise of a run."""

    def __init__(self, kind: str, random: np.random.Generator) -> None:
        start = random.uniform(-0.3, 0.3)
        if (
            kind == "edge"
        ):  # the recipe is far from the proxy's own optimum, farther than the grid reaches at first or at all
            start = random.choice([-1, 1]) * random.uniform(2, 16)
        elif kind == "cliff":  # a recipe is tuned where its proxy does not diverge
            start = random.uniform(0.02, 0.5)
        moves = random.uniform(-0.15, 0.15, 2)
        if random.random() < 0.5:
            moves = random.choice([-1, 1]) * random.uniform(0.3, 1.2, 2)
        self.noise = random.uniform(0.02, 0.08) if kind == "noisy" else random.uniform(0.001, 0.01)
        floors = (-1.5, -2.3, -3.0) if kind == "negative" else (2.5, 2.3, 2.2)
        bends = {"flat": (0.0002, 0.003), "sharp": (0.5, 2.0), "edge": (0.0005, 0.1)}.get(kind, (0.05, 0.25))
        lean = random.uniform(0, 0.3)
        self.curves: dict[int, Curve] = {}
        self.optima: dict[int, float] = {}
        self.lowest: dict[int, float] = {}
        for width, floor, moved in zip(WIDTHS, floors, np.cumsum([start, *moves]), strict=True):
            if kind == "cliff":
                self._cliff(width, floor, float(moved), random.uniform(0.02, 0.15), random.uniform(0, 0.02))
            else:
                self._bowl(width, floor, float(moved), random.uniform(*bends), lean)

    def _bowl(self, width: int, floor: float, optimum: float, bend: float, lean: float) -> None:
        """A parabola that is steeper towards high learning rates."""

        def curve(x: float) -> float:
            away = x - optimum
            return floor + bend * away**2 * math.exp(lean * max(-4.0, min(4.0, away)))

        self.curves[width], self.optima[width], self.lowest[width] = curve, optimum, floor

    def _cliff(self, width: int, floor: float, edge: float, slope: float, bend: float) -> None:
        """Falling up to an edge beyond which runs diverge."""

        def curve(x: float) -> float:
            return floor + slope * (edge - x) + bend * (edge - x) ** 2 if x <= edge else math.inf

        self.curves[width], self.optima[width], self.lowest[width] = curve, edge, floor

    def regret(self, width: int) -> float:
        """What the carried learning rate truly costs."""
        return self.curves[width](0.0) - self.lowest[width]

    def verdict(self, drift_limit: float = DRIFT_LIMIT, regret_limit: float = REGRET_LIMIT) -> set[str]:
        """Return the verdicts that are right: a drift that costs nothing yet may be called either."""
        if max(self.regret(width) for width in WIDTHS) > regret_limit:
            return {"fail"}
        drifts = any(abs(self.optima[width] - self.optima[WIDTHS[0]]) > drift_limit for width in WIDTHS)
        if not drifts:
            return {"pass"}
        return {"pass"} if self.free(regret_limit) >= drift_limit else {"fail"}

    def free(self, limit: float) -> float:
        """Octaves around the carried rate that cost at most ``limit`` at every width."""
        x = np.linspace(-6, 6, 2401)
        fine = np.all([[self.curves[w](k) - self.lowest[w] <= limit for k in x] for w in WIDTHS], axis=0)
        bad = np.flatnonzero(~fine)
        at = int(np.abs(x).argmin())
        low, high = max(bad[bad < at], default=-1) + 1, min(bad[bad > at], default=len(x)) - 1
        return float(x[high] - x[low])

    def measured(self, seeds: int, random: np.random.Generator) -> pd.DataFrame:
        """Run the study as `mutransfer verify` does: the same grids, extended and refined."""
        effect = {(width, seed): random.normal(0, SEED_EFFECT) for width in WIDTHS for seed in range(seeds)}
        done: dict[tuple[str, int, int, float], dict[str, object]] = {}
        before = -1
        while len(done) > before:
            before = len(done)
            for width in WIDTHS:
                for k in grid(done, "mup", width, seeds, 1.0):
                    for seed in range(seeds):
                        if ("mup", width, seed, k) not in done:
                            loss = self.curves[width](k) + effect[width, seed] + random.normal(0, self.noise)
                            lost = not math.isfinite(loss)
                            done["mup", width, seed, k] = {
                                "parametrization": "mup", "width": width, "depth": 1, "seed": seed, "log2_lr": float(k),
                                "loss": None if lost else loss, "diverged": lost, "flops": 1.0, "seconds": 1.0,
                            }  # fmt: skip
        return BASINS.frame(list(done.values()))


def simulate(kind: str, seeds: int, studies: int, told: bool = False) -> Counter[str]:
    """Return counts over ``studies`` studies: intervals that hold the truth and all, wrong and undecided verdicts, runs."""
    counts: Counter[str] = Counter()
    for number in range(studies):
        random = np.random.default_rng([KINDS.index(kind), seeds, number])
        truth = Truth(kind, random)
        frame = truth.measured(seeds, random)
        found = optima(frame, 0.0)
        verdict, reasons = judge(found)
        counts[verdict] += 1
        counts["runs"] += len(frame)
        if verdict != "undecided" and verdict not in truth.verdict():
            counts[f"wrong {verdict}"] += 1
            if told:
                print(kind, seeds, number, "wrong", verdict, reasons, truth.optima, file=sys.stderr)
        for row in found.itertuples():
            first = truth.optima[WIDTHS[0]]
            true = {"log2_lr": truth.optima[row.width], "regret": truth.regret(row.width)}
            if row.width != WIDTHS[0]:
                true["drift"] = truth.optima[row.width] - first
            for name, value in true.items():
                low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
                counts[name] += 1
                counts[f"{name} held"] += low - 1e-9 <= value <= high + 1e-9
                if told and not low - 1e-9 <= value <= high + 1e-9:
                    print(kind, seeds, number, row.width, name, value, low, high, truth.noise, file=sys.stderr)
    return counts


def claims_of(kind: str, seeds: int, counts: Counter[str]) -> list[Claim]:
    """Return the claims about one kind of study."""
    studies = counts["pass"] + counts["fail"] + counts["undecided"]
    claims = [
        _share(
            f"{kind}, {seeds} seeds: {what} interval holds the truth", counts[f"{what} held"], counts[what], COVERAGE, 1
        )
        for what in ("log2_lr", "drift", "regret")
    ]
    return claims + [
        _share(f"{kind}, {seeds} seeds: wrong {verdict}", counts[f"wrong {verdict}"], studies, WRONG, -1)
        for verdict in ("pass", "fail")
    ]


def _share(name: str, hits: int, of: int, bar: float, side: int) -> Claim:
    """A share with its 95% interval (Clopper and Pearson); it is to be above the bar (side 1) or below (-1)."""
    low, high = stats.binomtest(hits, of).proportion_ci()
    return Claim(name, hits / of, float(low), float(high), bar, side * hits / of >= side * bar)


def table_of(results: dict[tuple[str, int], Counter[str]]) -> str:
    """Return the counts as the table in docs/explanation/benchmarks.md."""
    lines = [
        "| basins | seeds | optimum | drift | regret | wrong pass | wrong fail | pass | fail | undecided | runs a width |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, seeds), counts in results.items():
        studies = counts["pass"] + counts["fail"] + counts["undecided"]
        cells = [f"{100 * counts[f'{name} held'] / counts[name]:.1f}%" for name in ("log2_lr", "drift", "regret")]
        cells += [f"{100 * counts[f'wrong {verdict}'] / studies:.1f}%" for verdict in ("pass", "fail")]
        cells += [f"{100 * counts[verdict] / studies:.0f}%" for verdict in ("pass", "fail", "undecided")]
        lines.append(f"| {kind} | {seeds} | {' | '.join(cells)} | {counts['runs'] / studies / len(WIDTHS):.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Simulate all kinds with 3 and 5 seeds."""
    given = arguments(__doc__ or "")
    studies = 20 if given.quick else STUDIES
    results = {(kind, seeds): simulate(kind, seeds, studies, told=not given.json) for kind in KINDS for seeds in (3, 5)}
    if not given.json:
        print(table_of(results), end="\n\n")
    publish([claim for key, counts in results.items() for claim in claims_of(*key, counts)], given.json)


if __name__ == "__main__":
    main()
