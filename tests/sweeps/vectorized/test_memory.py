"""A machine whose memory does not suffice for all trials: half as many go on, and every one ends as it would have."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch

from mutransfer.devices import is_out_of_memory
from mutransfer.errors import RequestError
from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.sweeps.jobs import Job, RunContext, run_jobs
from mutransfer.sweeps.vectorized.batch_training import VectorizedTraining
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

from ...helpers.small import experiment

LIMITED = """
import contextlib, json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from mutransfer.printing import log_to_stderr
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor
from mutransfer.sweeps.jobs import Job, SequentialExecutor, run_jobs, RunContext

kept = contextlib.ExitStack()
kept.enter_context(log_to_stderr())
given = json.loads(sys.argv[1])
narrow = Experiment.read({**given, "proxy": {"width": 16, "depth": 3}, "batch_size": 4}, "test")  # loads all libraries
for each in (VectorizedExecutor(2), SequentialExecutor()):
    for _ in run_jobs(each, RunContext(narrow), [Job(k, narrow.proxy_scale, "mup", narrow.recipe, k, (2,)) for k in range(2)]):
        pass
asked = Experiment.read(given, "test")
todo = [Job(k, asked.proxy_scale, "mup", asked.recipe.with_(lr=2.0 ** (-k - 3)), k, (2,)) for k in range(12)]
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + int(sys.argv[2]), -1))
fused = VectorizedExecutor(int(sys.argv[3]))
together = {job.key: outcome.loss for job, outcome in run_jobs(fused, RunContext(asked), todo)}
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
# Only now: the memory that they free would not count towards the limit.
apart = {job.key: outcome.loss for job, outcome in run_jobs(SequentialExecutor(), RunContext(asked), todo[:3])}
print(json.dumps({"capacity": fused.capacity, "ended": len(together), "pairs": [(apart[k], together[k]) for k in apart]}))
"""
# 2.2 million parameters: with gradients and Adam's state, 35 MB a trial.
ASKED = {
    "model": "mlp", "data": "digits", "proxy": {"width": 1024, "depth": 3}, "steps": 3, "batch_size": 16, "rungs": 1,
}  # fmt: skip
MB = 2**20


def limited(megabytes: int, count: int, **changes: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, json.dumps({**ASKED, **changes}), str(megabytes * MB), str(count)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.extended
def test_out_of_memory_halves_and_goes_on() -> None:
    done = limited(360, 12)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    lines = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert lines[0] == "out of memory with 12 trials at once: continuing with 6."
    assert result["capacity"] < 12
    assert len(lines) == {6: 1, 3: 2, 1: 3}[result["capacity"]]
    assert result["ended"] == 12
    for apart, together in result["pairs"]:
        assert together == pytest.approx(apart, rel=1e-4)


@pytest.mark.extended
def test_no_memory_for_two_is_one_by_one() -> None:
    done = limited(80, 4)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "trials at width 1024 run one by one: there is no memory for two of them at once.\n"
    assert json.loads(done.stdout)["ended"] == 12


@pytest.mark.extended
def test_no_memory_for_a_single_trial_is_a_sentence() -> None:
    done = limited(100, 4, proxy={"width": 256, "depth": 3}, batch_size=40_000)
    assert done.returncode == 1
    assert "RequestError: there is not enough memory for one trial: lower batch_size" in done.stderr
    assert "out of memory with 4 trials at once: continuing with 2." in done.stderr
    assert "out of memory with 2 trials at once: continuing with 1." in done.stderr


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    wrapped = RequestError("the loss of model raised")
    wrapped.__cause__ = caught.value
    assert is_out_of_memory(wrapped)
    for message in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "std::bad_alloc",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
    ):
        assert is_out_of_memory(RuntimeError(message))
    hidden = RuntimeError("backend='inductor' raised")
    hidden.inner_exception = torch.OutOfMemoryError("CUDA out of memory.")  # type: ignore[attr-defined]
    assert is_out_of_memory(hidden)
    unrelated = KeyError("while it was cleaned up")
    unrelated.__context__, unrelated.__suppress_context__ = MemoryError(), True  # raise … from None
    assert not is_out_of_memory(unrelated)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_loss_of_memory_is_no_fault_of_the_model() -> None:
    def loss(model: object, batch: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    family = Family(lambda scale: torch.nn.Linear(scale.width, 1), torch.ones(1, 8), loss, Scale(8))
    with pytest.raises(torch.OutOfMemoryError):
        family.loss_on(family.build(Scale(8)), family.batch)


def fails_above(monkeypatch: pytest.MonkeyPatch, most: int, width: int) -> list[weakref.ref[VectorizedTraining]]:
    """More than ``most`` trials at ``width`` do not fit into memory; return references to all trainings."""
    made: list[weakref.ref[VectorizedTraining]] = []
    advance = VectorizedTraining.advance

    def limited(training: VectorizedTraining, count: int) -> None:
        made.append(weakref.ref(training))
        if training.slots[0].plan.scale.width == width and len(training.slots) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        advance(training, count)

    monkeypatch.setattr(VectorizedTraining, "advance", limited)
    return made


def test_little_memory_at_one_width_does_not_lower_the_capacity_at_others(monkeypatch: pytest.MonkeyPatch) -> None:
    given = experiment(steps=4)
    fails_above(monkeypatch, 2, width=32)
    fused = VectorizedExecutor(4)
    todo = [Job((width, k), Scale(width, 2), "mup", given.recipe, k) for width in (32, 8, 32) for k in range(5)]
    todo = [Job(n, job.scale, job.parametrization, job.recipe, job.seed) for n, job in enumerate(todo)]
    capacities = [(job.scale.width, fused.capacity) for job, _ in run_jobs(fused, RunContext(given), todo)]
    assert capacities == [(32, 2)] * 5 + [(8, 4)] * 5 + [(32, 2)] * 5


def test_the_cache_is_emptied_after_the_batch_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    given = experiment(steps=4)
    made = fails_above(monkeypatch, 2, width=given.proxy.width)
    alive: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(each() is not None for each in made)))
    fused = VectorizedExecutor(4, "cpu:0")  # another name than "cpu": what is done on a GPU is done here
    gc.collect()
    gc.disable()  # memory must not depend on it
    try:
        todo = [Job(k, given.proxy_scale, "mup", given.recipe, k) for k in range(4)]
        assert len(list(run_jobs(fused, RunContext(given), todo))) == 4
    finally:
        gc.enable()
    assert alive == [0]
