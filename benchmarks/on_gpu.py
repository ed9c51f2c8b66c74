"""What only a GPU can show, part by part in the order of worth; `benchmarks/on_gpu.sh` runs it on a machine lent for minutes.

Each part writes its measurements to a file as soon as it ends, and parts that are there already are left out, so an interrupted
script goes on where it was. ``--device cpu --quick`` runs every part at a size that shows whether it runs, and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mutransfer.coord_check.recording import record
from mutransfer.devices import is_out_of_memory
from mutransfer.proxies.training import Training
from mutransfer.run_dir import RunFolder, environment
from mutransfer.sweeps import verify
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, RunContext, SequentialExecutor, run_jobs
from mutransfer.sweeps.vectorized import batch_training
from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining
from mutransfer.sweeps.vectorized.compile import CudaGraph, Graphed, graphed
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor
from mutransfer.sweeps.vectorized.step import Moving

Result = dict[str, Any]


class Machine:
    """The device and the sizes of the measurements."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick, self.gpu = device, quick, device.startswith("cuda")

    def context(self, model: str = "transformer", width: int = 128, **changes: Any) -> RunContext:
        """Return the context of an experiment: by default 4 layers and 32 sequences of 64 bytes a step."""
        depth, batch, length = (1, 2, 8) if self.quick else (4, 32, 64)
        width = min(width, 16) if self.quick else width
        asked = {
            "model": model, "data": "bytes" if model == "transformer" else "digits", "sequence_length": length, "steps": 60,
            "batch_size": batch, "proxy": {"width": width, "depth": depth}, "base": {"width": min(width, 64), "depth": depth},
            "recipe": {"lr": 2**-8, "warmup": 0.0}, "rungs": 1, **changes,
        }  # fmt: skip
        return RunContext(Experiment.read(asked, "on_gpu"))

    def fused(self, context: RunContext, count: int, **options: Any) -> VectorizedTraining:
        """Return ``count`` fused trainings with different learning rates."""
        asked = context.experiment
        plans = [
            context.plan(asked.proxy_scale, "mup", asked.recipe.with_(lr=2.0 ** -(6 + 4 * k / count)))
            for k in range(count)
        ]
        return VectorizedTraining(
            context.family, [Slot(plan, 0) for plan in plans], context.required_data, steps=asked.steps,
            batch_size=asked.batch_size, device=self.device, clips=asked.recipe.clip is not None, **options,
        )  # fmt: skip

    def wait(self) -> None:
        """Wait for the device."""
        if self.gpu:
            torch.cuda.synchronize()

    def timed(self, step: Callable[[], object], repeats: int = 20) -> Result:
        """Return the milliseconds of a call, and those after which the host could go on."""
        repeats = 2 if self.quick else repeats
        for _ in range(3):
            step()
        self.wait()
        begun = time.perf_counter()
        for _ in range(repeats):
            step()
        host = time.perf_counter() - begun
        self.wait()
        return {"ms": 1e3 * (time.perf_counter() - begun) / repeats, "host_ms": 1e3 * host / repeats}


def capture(machine: Machine) -> Result:
    """Captured steps train as the same trials one by one."""
    found = {}
    for model, optimizer in (("transformer", "adamw"), ("mlp", "adamw"), ("resnet", "sgd"), ("transformer", "muon")):
        recipe = {"lr": 2**-8, "warmup": 0.0, "clip": 1.0}
        context = machine.context(model, 32, optimizer=optimizer, recipe=recipe)
        fused = machine.fused(context, 3)
        fused.advance(20)
        ours, theirs = fused.validate(range(3)), []
        for slot in fused.slots:
            alone = Training(
                context.family, slot.plan, context.required_data, steps=fused.steps, batch_size=fused.batch_size,
                device=machine.device,
            )  # fmt: skip
            alone.advance(20)
            theirs.append(alone.validate())
        far = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        found[f"{model}, {optimizer}"] = {
            "captured": isinstance(fused.step, Graphed),
            "relative difference of losses": far,
        }
    return found


def throughput(machine: Machine) -> Result:
    """Milliseconds of a step: one by one, and fused in each precision, with the share of the host and the kernels."""
    context = machine.context()
    asked = context.experiment
    plan = context.plan(asked.proxy_scale, "mup", asked.recipe)
    alone = Training(
        context.family, plan, context.required_data, steps=10**6, batch_size=asked.batch_size, device=machine.device
    )
    found: Result = {"one by one": machine.timed(lambda: alone.advance(alone.step + 1), 50)}
    count = 2 if machine.quick else 64
    ways = (
        [("float32", False), ("tf32", True), ("bfloat16", True), ("float32", True)]
        if machine.gpu
        else [("float32", False)]
    )
    for precision, compiled in ways:
        begun = time.perf_counter()
        fused = machine.fused(context, count, precision=precision, compile=compiled)
        fused.steps = 10**6
        made = time.perf_counter() - begun
        fused.advance(2)
        machine.wait()
        row = {"set-up s": made, "first two steps s": time.perf_counter() - begun - made}
        row |= machine.timed(lambda fused=fused: fused.advance(1))  # type: ignore[misc]
        row |= {"compiled": fused.compiles, "captured": isinstance(fused.step, Graphed)}
        row["trials a second relative to one by one"] = count * found["one by one"]["ms"] / row["ms"]
        if machine.gpu:
            row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
            if isinstance(fused.step, Graphed):
                row["replay alone"] = machine.timed(fused.step.replay)
                row["kernels"] = kernels(fused.step.replay)
        found[f"{precision}, K = {count}{', compiled' if compiled else ''}"] = row
        del fused
        gc.collect()
    return found


def kernels(replay: Callable[[], None]) -> Result:
    """Return how many kernels a replay launches, and the longest of them in milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)
    longest = [[row.key[:80], row.count, row.device_time_total / 1e3] for row in rows[:15]]
    return {"launched": sum(row.count for row in rows), "longest": longest}


def refused(machine: Machine) -> Result:
    """A step that cannot be captured leaves the stream as it was, and a later one can be captured."""

    def reading(now: Moving) -> tuple[torch.Tensor, Moving]:
        w = now.trained["w"]
        return w.sum().view(1), Moving({"w": w * float(w.sum())}, {}, {})

    example = (Moving({"w": torch.ones(4, device=machine.device)}, {}, {}),)
    if not machine.gpu:
        return {"losses of the step": reading(*example)[0].tolist()}
    before, drawn = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        nothing = graphed(reading, example, 1e-3, CudaGraph())
    kept = torch.cuda.current_stream() == before
    torch.cuda.set_stream(before)
    fused = machine.fused(machine.context("mlp", 32), 2)
    fused.advance(2)
    same = bool(torch.equal(drawn, torch.cuda.get_rng_state()))
    later = isinstance(fused.step, Graphed)
    return {"refused": nothing is None, "stream kept": kept, "random numbers kept": same, "captured later": later}


def memory(machine: Machine) -> Result:
    """Too many trials at a time: half of them go on, and all end."""
    count = 4 if machine.quick else 64
    context = machine.context(width=256, steps=3)
    asked = context.experiment
    executor = VectorizedExecutor(count, machine.device)
    if machine.gpu:
        torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        jobs = (Job(k, asked.proxy_scale, "mup", asked.recipe, 0) for k in range(count))
        ended = [outcome.loss for _, outcome in run_jobs(executor, context, jobs)]
    finally:
        if machine.gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    said = ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    known = all(is_out_of_memory(RuntimeError(text)) for text in said)
    finite = all(map(math.isfinite, ended))
    return {
        "asked": count,
        "ended": len(ended),
        "at a time": executor.capacity,
        "finite": finite,
        "messages known": known,
    }


def checkpoints(machine: Machine) -> Result:
    """A training that is saved and restored, and fused trainings that are, end as if they had not been."""
    found = {}
    for optimizer in ("adamw", "muon"):
        context = machine.context(width=32, optimizer=optimizer, steps=20)
        plan = context.plan(context.experiment.proxy_scale, "mup", context.experiment.recipe)
        whole, half, again = (
            Training(context.family, plan, context.required_data, steps=20, batch_size=4, device=machine.device)
            for _ in range(3)
        )
        whole.advance(20)
        half.advance(10)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(half.state_dict(), Path(folder) / "state.pt")
            again.load_state_dict(torch.load(Path(folder) / "state.pt", map_location=machine.device, weights_only=True))
        again.advance(20)
        fused, continued = machine.fused(context, 3), machine.fused(context, 3)
        fused.advance(10)
        for index, snapshot in enumerate(fused.snapshots(range(3))):
            continued.begin(index, Slot(fused.slots[index].plan, 0), snapshot)
        for each in (fused, continued):
            each.advance(10)
        pairs = zip(fused.validate(range(3)), continued.validate(range(3)), strict=True)
        found[optimizer] = {
            "separate": abs(again.validate() / whole.validate() - 1), "fused": max(abs(a / b - 1) for a, b in pairs),
        }  # fmt: skip
    return found


def recaptures(machine: Machine) -> Result:
    """How often a step is captured while trials are pruned one after the other, and what short trials take."""
    count, steps = (4, 12) if machine.quick else (16, 100)
    context = machine.context(width=64, steps=steps)
    asked = context.experiment
    rungs = tuple(range(steps // count, steps, max(1, steps // (count + 1))))
    todo = [
        Job(k, asked.proxy_scale, "mup", asked.recipe.with_(lr=2.0 ** -(6 + k / 8)), 0, rungs) for k in range(count)
    ]
    captured, make, found = [0], batch_training.graphed, {}

    def counted(*given: Any) -> Any:
        captured[0] += 1
        return make(*given)

    batch_training.graphed = counted
    try:
        for name, stops in (("none pruned", False), ("pruned one after the other", True)):
            captured[0], begun = 0, time.perf_counter()
            stop = lambda reports, stops=stops: [one.job.key for one in reports[:1] if stops]  # noqa: E731
            ended = len(list(run_jobs(VectorizedExecutor(count, machine.device), context, todo, stop)))
            found[name] = {"trials": ended, "seconds": time.perf_counter() - begun, "captures": captured[0]}
    finally:
        batch_training.graphed = make
    begun = time.perf_counter()
    ended = len(list(run_jobs(SequentialExecutor(machine.device), context, todo[:2])))
    found["one by one"] = {"trials": ended, "seconds": time.perf_counter() - begun, "captures": 0}
    return found


def check(machine: Machine) -> Result:
    """The coordinate check measures on the device what it measures on the CPU."""
    context = machine.context(width=16, base={"width": 16, "depth": 2}, proxy={"width": 16, "depth": 2})
    widths = [16, 32] if machine.quick else [32, 64, 128, 256]
    found, frames = {}, []
    for device in dict.fromkeys(("cpu", machine.device)):
        begun = time.perf_counter()
        frames.append(record(context.family, widths, seeds=range(3), steps=2, device=device))
        found[f"seconds on {device}"] = time.perf_counter() - begun
    here, there = frames[0]["value"], frames[-1]["value"]
    found["largest relative difference"] = float(((there - here).abs() / here.abs().clip(lower=1e-6)).max())
    return found


def basin(machine: Machine) -> Result:
    """The best learning rate from width 256 to 2048: basins of five rates and three seeds, fused."""
    widths = [16, 32] if machine.quick else [256, 512, 1024, 2048]
    context = machine.context(width=256, steps=4 if machine.quick else 200)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        frame = verify.basins(
            context, context.experiment.recipe, widths, folder=RunFolder(Path(folder)).make(),
            executor=VectorizedExecutor(15, machine.device), seeds=1 if machine.quick else 3,
        )  # fmt: skip
    means = frame.groupby(["width", "log2_lr"])["loss"].mean().reset_index()
    return {"seconds": time.perf_counter() - begun, "mean losses": means.to_dict("records")}


PARTS = {
    each.__name__: each for each in (capture, throughput, refused, memory, checkpoints, recaptures, check, basin)
}  # fmt: skip


def main() -> int:
    """Run the parts that are missing until the time is over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="folder for a JSON file per part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after this time")
    parser.add_argument("--quick", action="store_true", help="does it run, not how fast")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    begun, machine, failed = time.perf_counter(), Machine(given.device, given.quick), 0
    for name in given.parts:
        path = given.out / f"{name}.json"
        if path.exists():
            print(f"{name}: done before", flush=True)
            continue
        if time.perf_counter() - begun > 60 * given.minutes:
            print(f"{name}: no time left", flush=True)
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always", RuntimeWarning)
                found = PARTS[name](machine)
        except Exception as error:  # the other parts are worth as much without this one
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        said = sorted({str(each.message) for each in heard if "fused trials" in str(each.message)})
        took = time.perf_counter() - start
        content = {
            "part": name,
            "seconds": took,
            "found": found,
            "warnings": said,
            "machine": environment(given.device),
        }
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        print(f"{name}: {took:.0f} s\n{json.dumps(found)}", flush=True)
        gc.collect()
        if machine.gpu:
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
