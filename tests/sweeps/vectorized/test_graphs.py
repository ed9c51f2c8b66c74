"""A step recorded once and replayed on memory of its own trains as the step itself; the graph is a stand-in: there is no GPU.

What only a GPU shows, whether the step can be captured, is compared there before it is used (`graphs.graphed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mutransfer.sweeps.jobs import SequentialExecutor
from mutransfer.sweeps.vectorized import batch_training
from mutransfer.sweeps.vectorized.compile import Graphed
from mutransfer.sweeps.vectorized.executor import VectorizedExecutor

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
        made.append(Graphed(step, example, Again()))
        return made[-1]

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
