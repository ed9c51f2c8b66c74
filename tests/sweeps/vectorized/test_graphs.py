"""A step recorded once and replayed on memory of its own trains as the step itself; the graph is a stand-in: there is no GPU.

What only a GPU shows, whether the step can be captured, is compared there before it is used (`compile.graphed`).
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mutransfer as mt
from mutransfer.planning.build import plan
from mutransfer.sweeps.jobs import Job, RunContext, SequentialExecutor
from mutransfer.sweeps.vectorized import batch_training, compile
from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining
from mutransfer.sweeps.vectorized.compile import CudaGraph, Graphed, compiled, distance, graphed
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor
from mutransfer.sweeps.vectorized.step import Moving

from ...helpers import families
from ...helpers.blobs import blobs
from ...helpers.small import experiment
from .test_executor import done, jobs, same


class Again:
    """Does the operations again, on the memory that they were recorded on, as a CUDA graph does."""

    def record(self, operations: Callable[[], None]) -> None:
        self.operations = operations
        for _ in range(3):
            operations()

    def replay(self) -> None:
        self.operations()


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Graphed]:
    """Replay every fused step, and return the recordings."""
    made: list[Graphed] = []

    def graphed(step: Any, example: Any, tolerance: float) -> Graphed:
        found = compile.graphed(step, example, tolerance, Again())
        assert isinstance(found, Graphed)
        made.append(found)
        return found

    init = batch_training.VectorizedTraining.__init__

    def on_a_gpu(self: Any, *given: Any, **options: Any) -> None:
        init(self, *given, **options)
        self._graphs = True

    monkeypatch.setattr(batch_training, "graphed", graphed)
    monkeypatch.setattr(batch_training.VectorizedTraining, "__init__", on_a_gpu)
    return made


@pytest.mark.parametrize("model", ["mlp", "resnet"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_replayed_trainings_are_the_same(replayed: list[Graphed], model: str, optimizer: str) -> None:
    """Also those that begin later in a slot that was freed, with other settings, and those that diverge."""
    asked = experiment(model=model, optimizer=optimizer, steps=12, proxy={"width": 8, "depth": 2}, batch_size=8)
    theirs, _ = done(SequentialExecutor(), asked, jobs(asked))
    replayed.clear()
    ours, _ = done(VectorizedExecutor(3), asked, jobs(asked))
    same(ours, theirs, rel=1e-3)
    assert replayed


def test_only_what_changed_is_copied() -> None:
    now, setting = {"w": torch.zeros(2)}, torch.ones(2)
    step = Graphed(lambda now, setting: (now["w"].sum(), {"w": now["w"] + setting}), (now, setting), Again())
    losses = []
    for _ in range(3):
        loss, now = step(now, setting)
        losses.append(float(loss))
    assert losses == [0.0, 2.0, 4.0]
    setting[0] = 5.0  # in place, as a training that begins in a freed slot does
    _, now = step(now, setting)
    assert now["w"].tolist() == [8.0, 4.0]
    now["w"][1] = 0.0
    _, now = step(now, setting)
    assert now["w"].tolist() == [13.0, 1.0]
    _, now = step({"w": torch.zeros(2)}, setting)
    assert now["w"].tolist() == [5.0, 1.0]
    with pytest.raises(ValueError, match="another structure"):
        step({"v": torch.zeros(2)}, setting)


def result(*values: float) -> tuple[torch.Tensor, Moving]:
    return torch.tensor(values), Moving({"w": torch.tensor(values)}, {}, {"w": (torch.zeros(1),)})


def test_only_a_finite_and_near_result_is_accepted() -> None:
    assert distance(result(1.0, 2.0), result(1.0, 2.0)) == 0
    assert distance(result(1.0, 2.1), result(1.0, 2.0)) == pytest.approx(0.1 / math.sqrt(5))
    assert distance(result(math.nan, math.nan), result(1.0, 2.0)) == math.inf
    assert distance(result(1.0, math.nan), result(1.0, 2.0)) == math.inf
    assert distance(result(1.0, 2.0), result(1.0, math.inf)) == math.inf
    assert distance(result(math.nan, math.nan), result(math.nan, math.nan)) == math.inf  # proves nothing
    assert (
        distance(result(1.0, math.nan), result(1.0, math.nan)) == 0
    )  # a training that diverged beside one that did not


def grown(now: Moving) -> tuple[torch.Tensor, Moving]:
    return now.trained["w"].sum().view(1), Moving({"w": now.trained["w"] + 1}, {}, {})


def lost(now: Moving) -> tuple[torch.Tensor, Moving]:
    return now.trained["w"].sum().view(1) * math.nan, now


def ones() -> tuple[Moving]:
    return (Moving({"w": torch.ones(4)}, {}, {}),)


def test_a_replay_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="one by one .ArithmeticError: its first step is inf"):
        assert graphed(lost, ones(), 1e-3, Again()) is None
    broken = lambda graph, flat: lambda *tensors: [each * math.nan for each in graph(*tensors)]  # noqa: E731
    monkeypatch.setattr(compile, "inductor_compile", broken)
    with pytest.warns(RuntimeWarning, match="run uncompiled .ArithmeticError: its first step is inf"):
        assert compiled(grown, ones()) is None


class Full(Again):
    """A device whose memory does not suffice to record the operations."""

    def record(self, operations: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_no_memory_to_record_or_compile_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(torch.OutOfMemoryError):
            graphed(grown, ones(), 1e-3, Full())
        monkeypatch.setattr(compile, "inductor_compile", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            compiled(grown, ones())


def test_no_memory_to_record_halves_the_trials(replayed: list[Graphed], monkeypatch: pytest.MonkeyPatch) -> None:
    record = batch_training.graphed

    def with_little_memory(step: Any, example: Any, tolerance: float) -> Any:
        graph = Full() if len(example[4]) > 2 else Again()
        return compile.graphed(step, example, tolerance, graph)

    monkeypatch.setattr(batch_training, "graphed", with_little_memory)
    assert record is not with_little_memory
    asked = experiment(model="mlp", steps=6)
    executor = VectorizedExecutor(6)
    ours, _ = done(executor, asked, jobs(asked))
    assert executor.capacity == 1 or executor.capacity == 2
    theirs, _ = done(SequentialExecutor(), asked, jobs(asked))
    same(ours, theirs, rel=1e-3)


def test_pruning_records_a_step_for_a_few_sizes_only(replayed: list[Graphed]) -> None:
    asked = experiment(model="mlp", steps=40)
    rungs = tuple(range(2, 40, 2))
    todo = [Job(k, asked.proxy_scale, "mup", asked.recipe.with_(lr=2.0 ** (-6 - k / 16)), 0, rungs) for k in range(16)]
    executor, context = VectorizedExecutor(16), RunContext(asked)
    from mutransfer.sweeps.jobs import run_jobs

    def report(reports: Any) -> Iterator[Any]:
        return (one.job.key for one in reports if one.step == 2 * (one.job.key + 1))  # one after the other

    assert len(list(run_jobs(executor, context, todo, report))) == 16
    sizes = [len(made._memory[0]) for made in replayed]
    assert len([size for size in sizes if size > 2]) <= 4, sizes  # 16, 8, 4
    assert len(replayed) <= 4 + 2 + 2, sizes  # besides the two trials that are compared


class Dropping(torch.nn.Module):
    """A model whose loss is random in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.readout = torch.nn.Linear(64, width), torch.nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.nn.functional.dropout(torch.relu(self.input(x.flatten(1))), 0.2, self.training))


def dropping(**options: Any) -> VectorizedTraining:
    family = mt.Family(lambda s: Dropping(s.width), families.image_batch(), families.loss, mt.Scale(16), "dropping")
    planned = plan(family, mt.Scale(32), "mup", "adamw", mt.Recipe(lr=2**-6))
    data = blobs("images", noise=1, held_out=8)
    return VectorizedTraining(family, [Slot(planned, k) for k in range(3)], data, steps=20, batch_size=4, **options)


def test_a_random_model_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded and the launched step are compared with equal draws, and the generator is left as it was."""
    training, drawn = dropping(), []
    training._graphs = True

    def noted(step: Any, example: Any, tolerance: float) -> Any:
        before = torch.get_rng_state()
        made = graphed(step, example, tolerance, Again())
        drawn.append(torch.equal(before, torch.get_rng_state()))
        return made

    monkeypatch.setattr(batch_training, "graphed", noted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.advance(3)
    assert isinstance(training.step, Graphed)
    assert drawn == [True]


@pytest.mark.extended
def test_a_random_model_is_compiled() -> None:
    training = dropping(compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        inputs, before = training.inputs(), torch.get_rng_state()
        training._compiled("step", training.step, inputs)
        assert torch.equal(before, torch.get_rng_state())
        training.advance(3)
    assert training.compiles
    assert training.step is not training._uncompiled


@pytest.mark.extended
def test_a_compiled_program_for_avx2_is_right_on_a_cpu_with_avx512() -> None:
    """Which is how a CPU with AVX2 alone is tried; Inductor's own choice of instructions makes its programs wrong there."""
    program = """
import torch
from tests.sweeps.vectorized.test_graphs import test_a_random_model_is_compiled
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
test_a_random_model_is_compiled()
"""
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_refused_capture_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.cuda.graph` does: it enters a stream, and leaves it only if the capture succeeds."""
    streams = ["the caller's"]

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    class Capture:
        def __init__(self, graph: object) -> None:
            pass

        def __enter__(self) -> None:
            streams.append("the capture's")

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: streams.append("synchronized"))
    monkeypatch.setattr(
        torch.cuda, "set_stream", lambda to: streams.append("the caller's" if to is current else "another")
    )
    with pytest.warns(RuntimeWarning, match="previous error during capture"):
        assert graphed(grown, ones(), 1e-3, CudaGraph()) is None
    assert streams[-2:] == ["the caller's", "synchronized"]
