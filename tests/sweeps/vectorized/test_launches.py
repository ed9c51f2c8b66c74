"""How many kernels a fused step launches, whatever the number of trials: what a GPU that waits for launches spends its time on.

Counted on the CPU, with its attention kernel, which is one launch in each direction as on a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mutransfer._torch_internals import inductor_compile, tree_flatten, tree_unflatten
from mutransfer.recipe import Recipe
from mutransfer.sweeps.experiment import Experiment, Size
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.vectorized import step
from mutransfer.sweeps.vectorized.batch_training import Slot, VectorizedTraining
from mutransfer.sweeps.vectorized.compile import fold_constants

from ...helpers.fake_cuda import VIEWS


class Launches(TorchDispatchMode):
    """Count the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def training(depth: int, count: int, optimizer: str = "adamw") -> VectorizedTraining:
    """Fused trainings of a transformer with clipping, as `benchmarks/sweep_throughput.py` has it on a GPU, but smaller."""
    size = Size(width=64, depth=depth)
    asked = Experiment(
        model="transformer", data="bytes", sequence_length=64, proxy=size, base=size, batch_size=2, steps=10, optimizer=optimizer
    )  # fmt: skip
    context = RunContext(asked)
    plan = context.plan(asked.proxy_scale, asked.parametrization, Recipe(lr=2**-6, clip=1.0))
    slots = [Slot(plan, seed) for seed in range(count)]
    fused = VectorizedTraining(context.family, slots, context.required_data, steps=10, batch_size=2)
    fused.stack.model.train()
    return fused


def launches(depth: int, count: int = 2, optimizer: str = "adamw") -> Counter[str]:
    fused = training(depth, count, optimizer)
    inputs = fused.inputs()
    with Launches() as seen:
        fused.step.writing()(*inputs)  # type: ignore[attr-defined]
    return seen.counts


@pytest.fixture(autouse=True)
def _attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SHORT", 0)


def test_a_step_of_four_layers_takes_at_most_400_launches() -> None:
    four = launches(4)
    assert four["bmm"] == 4 * 3 * 4 + 3 + 9  # q, k, v; out; gate, up; down; each with two gradients; the readout; norms
    assert sum(four.values()) <= 400, four
    assert sum(four.values()) - sum(launches(3).values()) <= 75, "of each layer"


def test_their_number_does_not_depend_on_that_of_trials() -> None:
    assert launches(1, 2) == launches(1, 5)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_other_optimizers(optimizer: str) -> None:
    assert sum(launches(4, optimizer=optimizer).values()) <= 500


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore")  # torch's, of its own imports
def test_a_compiled_step_takes_at_most_200() -> None:
    """Counted in the program that Inductor writes: its own kernels, and calls of others."""
    from torch._inductor.utils import run_and_get_code

    fused = training(4, 2)
    flat, spec = tree_flatten(fused.inputs())
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *given: tree_flatten(fused.step(*tree_unflatten(given, spec)))[0], _error_on_data_dependent_ops=False
    )(*flat)
    fold_constants(graph)
    _, codes = run_and_get_code(lambda: inductor_compile(graph, flat)(*flat))
    called = codes[-1][codes[-1].index("def call(") :]
    own, others = (
        re.findall(r"^\s+cpp_fused\w*\(", called, re.M),
        re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+", called),
    )
    assert own
    assert len(others) >= 60
    assert len(own) + len(others) <= 200, (len(own), len(others))
