"""How many trials a minute: fused, one by one, compiled one by one, in two processes, and what the planner chooses.

One run holds all ways: in every round each way trains the same trials once, in turn, after a round that compiles and starts
what is started once. Ratios are of the same round. On a GPU the target is the issue of launch-bound small models, and
one by one with CUDA graphs is among the rivals.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from harness import Claim, arguments, at_least, publish

from mutransfer.devices import keep_freed_memory
from mutransfer.proxies.training import Training, train
from mutransfer.recipe import Recipe
from mutransfer.sweeps.executors import LazyExecutor, executor_for
from mutransfer.sweeps.experiment import Experiment, Size
from mutransfer.sweeps.jobs import Done, Events, Executor, Job, RunContext, SequentialExecutor, Session, run_jobs
from mutransfer.sweeps.processes import ProcessExecutor
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

ROUNDS = 5
TRIALS = 1000  # of the sweep that the planner plans for: long enough for what is done once not to matter


@dataclass
class Compiled(Executor):
    """One by one, the model and its loss compiled: what `model.compile()` gives a careful user.

    ``mode`` is torch.compile's; "reduce-overhead" replays CUDA graphs on a GPU.
    """

    device: str
    mode: str | None = None
    capacity = 1

    def events(self, session: Session) -> Events:
        """See `mutransfer.sweeps.jobs.Executor`."""
        experiment = session.experiment
        while jobs := (yield from session.take(1)):
            (job,) = jobs
            planned = session.context.plan(job.scale, job.parametrization, job.recipe)
            training = Training(
                session.context.family, planned, session.context.required_data, steps=experiment.steps,
                batch_size=experiment.batch_size, seed=job.seed, device=self.device,
            )  # fmt: skip
            training.model.compile(mode=self.mode)
            yield Done(job, train(training))


@dataclass
class Way:
    """One way of training and its times, seconds a round."""

    name: str
    executor: Executor
    trials: int
    seconds: list[float] = field(default_factory=list)
    fitted: int | None = None  # trials at a time, where memory did not suffice for all
    first: float = 0.0
    memory: float = 0.0

    def round(self, context: RunContext) -> None:
        """Train ``trials`` trials that differ in their learning rates."""
        experiment = context.experiment
        jobs = [
            Job(i, experiment.proxy_scale, experiment.parametrization, Recipe(lr=2.0 ** -(6 + 4 * i / self.trials)), 0)
            for i in range(self.trials)
        ]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        assert len(list(run_jobs(self.executor, context, jobs))) == self.trials
        self.seconds.append(time.perf_counter() - begun)
        if isinstance(self.executor, VectorizedExecutor) and self.executor.capacity < self.trials:
            self.fitted = self.executor.capacity
        if torch.cuda.is_available():
            self.memory = torch.cuda.max_memory_allocated() / 2**30

    def per_minute(self) -> list[float]:
        """Return trials a minute, round by round."""
        return [60 * self.trials / seconds for seconds in self.seconds]


def experiment(width: int, device: str, quick: bool) -> Experiment:
    """Return the sweep that is timed: a transformer on bytes; on a GPU 4 layers and 2048 tokens a step."""
    depth, batch = (4, 32) if device == "cuda" else (2, 8)
    steps = (4 if quick else 100) if device == "cuda" else (4 if quick else max(12, 100 * 32 // width))
    return Experiment(
        model="transformer", data="bytes", sequence_length=64, proxy=Size(width=width, depth=depth), batch_size=batch,
        steps=steps, base=Size(width=min(width, 64), depth=depth), trials=TRIALS,
    )  # fmt: skip


def measure(
    width: int, counts: tuple[int, ...], device: str, quick: bool, say: Callable[[str], None]
) -> tuple[dict[str, Way], str]:
    """Time every way at one width; return the ways and what the planner says of its choice."""
    asked = experiment(width, device, quick)
    context = RunContext(asked)
    torch.compiler.reset()  # of the widths before: a function is compiled for eight cases at most
    few = max(4, min(counts)) if not quick else 2
    ways = {
        "eager": Way("one by one", SequentialExecutor(device), few),
        "compiled": Way("compiled, one by one", Compiled(device), few),
    }
    if device == "cuda":
        ways["graphs"] = Way("CUDA graphs, one by one", Compiled(device, "reduce-overhead"), few)
    for count in counts:
        ways[f"fused {count}"] = Way(f"fused, K = {count}", VectorizedExecutor(count, device, compile=not quick), count)
    with ProcessExecutor(2) as two:
        if device == "cpu":
            ways["processes"] = Way("two processes", two, few)
        with executor_for(asked, "auto", device=device, context=context) as planned:
            assert isinstance(planned, LazyExecutor)
            words = _words(planned)
            ways["planned"] = Way("as planned", planned, max(*counts, planned.capacity))
            for number in range((1 if quick else ROUNDS) + 1):
                order = list(ways.values())
                for way in order if number % 2 else reversed(order):
                    way.round(context)
                    say(f"width {width}, round {number}: {way.name} {way.trials / way.seconds[-1] * 60:.0f} trials/min")
    for way in ways.values():
        way.first = way.seconds.pop(0)
    return ways, words


def _words(planned: LazyExecutor) -> str:
    """Return what the planner says of its choice, which it makes now."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        _ = planned.chosen
    return said.getvalue().strip()


def ratios(way: Way, *others: Way) -> list[float]:
    """Return the trials a minute of ``way`` over the best of ``others``, round by round."""
    return [
        own / max(rivals)
        for own, *rivals in zip(way.per_minute(), *(other.per_minute() for other in others), strict=True)
    ]


def claims(width: int, ways: dict[str, Way], counts: tuple[int, ...], device: str) -> list[Claim]:
    """Return the width's claims."""
    rivals = [ways[name] for name in ("eager", "compiled", "processes", "graphs") if name in ways]
    if device == "cuda":
        found = []
        for count in counts:
            fused = ways[f"fused {count}"]
            if count >= 64:  # fewer trials do not fill a GPU
                found.append(at_least(f"width {width}: fused {count} / one by one", ratios(fused, ways["eager"]), 20))
                found.append(at_least(f"width {width}: fused {count} / CUDA graphs", ratios(fused, ways["graphs"]), 6))
        return found
    if width == 32:
        found = []
        for count in counts:
            fused = ways[f"fused {count}"]
            found.append(at_least(f"width 32: fused {count} / one by one", ratios(fused, ways["eager"]), 6.0))
            found.append(at_least(f"width 32: fused {count} / best of the others", ratios(fused, *rivals), 2.5))
        return found
    bar = 1.5 if width == 64 else 1.0
    return [at_least(f"width {width}: as planned / best of the others", ratios(ways["planned"], *rivals), bar)]


def main() -> None:
    """Measure and publish."""
    given = arguments(
        __doc__ or "", lambda parser: parser.add_argument("--widths", type=int, nargs="+", help="not all")
    )

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    keep_freed_memory()  # as commands do: all ways gain by it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[Claim] = []
    lines = ["| width | way | trials a minute | first round | peak memory |", "|---|---|---|---|---|"]
    widths = (32,) if given.quick else (32, 64, 128, 256) if device == "cpu" else (64, 128, 256, 512, 1024)
    for width in given.widths or widths:
        counts = (4,) if given.quick else (16, 32) if device == "cpu" else (1, 4, 16, 64, 256)
        if device == "cpu" and width > 32 and not given.quick:
            counts = (16,) if width == 64 else (8,)
        ways, words = measure(width, counts, device, given.quick, say)
        found += claims(width, ways, counts, device)
        for way in ways.values():
            per = way.per_minute()
            fit = f", {way.fitted} fit" if way.fitted else ""
            memory = f"{way.memory:.1f} GiB" if device == "cuda" else ""
            lines.append(
                f"| {width} | {way.name}{fit} | {statistics.median(per):.0f} ({min(per):.0f} to {max(per):.0f}) | "
                f"{way.first:.1f} s | {memory} |"
            )
        lines.append(f"| {width} | | {words} | | |")
    if not given.json:
        print("\n".join(lines) + "\n")
    publish(found, given.json)


if __name__ == "__main__":
    main()
