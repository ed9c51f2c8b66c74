"""Nothing touches a GPU that was not asked for, and a lack of memory is one sentence wherever it falls."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mutransfer import cli
from mutransfer.coord_check import recording
from mutransfer.coord_check.recording import record
from mutransfer.devices import keep_freed_memory, seeded_generators
from mutransfer.errors import BuildError
from mutransfer.run_dir import RunFolder, environment
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.vectorized.batch_training import refusal

from .helpers import families
from .helpers.sets import extended_but
from .helpers.small import experiment


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with eight GPUs, and which of their functions were called."""
    touched: list[str] = []

    def touching(name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            touched.append(name)
            return "GPU"

        return call

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "get_device_name", "init"):
        monkeypatch.setattr(torch.cuda, name, touching(name))
    return touched


def test_a_run_on_the_cpu_touches_no_gpu(eight_gpus: list[str], tmp_path: Path) -> None:
    with seeded_generators(3):
        torch.rand(1)
    assert refusal(RunContext(experiment(steps=4))) is None
    record(families.mlp(width=8), [8, 16], seeds=range(2), steps=1)
    assert environment()["cuda"] is None
    folder = RunFolder(tmp_path).make()
    folder.note_environment(device="cpu")
    assert eight_gpus == []
    folder.note_environment(device="cuda")
    assert folder.read_environment()["cuda"] == "GPU"
    folder.note_environment(data_sha256="1")  # by a later command, which continues on the same device
    assert folder.read_environment()["cuda"] == "GPU"


@pytest.mark.parametrize("parametrization", ["mup", "own"])
def test_a_check_leaves_the_random_numbers_of_its_caller(parametrization: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    record(families.mlp(width=8), [8, 16], parametrization, seeds=range(2), steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_that_do_not_fit_into_memory_are_checked_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.mlp(width=8)
    whole = record(family, [8, 16], seeds=range(4), steps=2)
    measure, sizes = recording._measure, []

    def with_little_memory(stack: Any, *given: Any, **options: Any) -> Any:
        sizes.append(stack.size)
        if stack.size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(stack, *given, **options)

    monkeypatch.setattr(recording, "_measure", with_little_memory)
    halves = record(family, [8, 16], seeds=range(4), steps=2)
    assert sizes == [4, 2, 2] * 2
    assert halves.value.tolist() == pytest.approx(whole.value.tolist(), rel=1e-5)
    assert halves.drop(columns="value").equals(whole.drop(columns="value"))


def test_the_memory_of_one_seed_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(recording, "_measure", full)
    with pytest.raises(torch.OutOfMemoryError):
        record(families.mlp(width=8), [8, 16], seeds=range(4), steps=1)


HUNGRY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.input, self.readout = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x):
        if not isinstance(x, torch._subclasses.FakeTensor) and type(self.input.weight) is nn.Parameter:
            raise {error}
        return self.readout(torch.relu(self.input(x.flatten(1))))

def build(width, depth):
    return Net(width)
"""
ERRORS = (
    'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")',
    'RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")',
)


CASES = [(command, error) for command in ("check", "tune", "train") for error in ERRORS]


@pytest.mark.parametrize(("command", "error"), extended_but(CASES, CASES[0]))
def test_a_lack_of_memory_is_one_sentence(
    command: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = "net.py:build"
    Path("net.py").write_text(HUNGRY.replace("{error}", error), encoding="utf-8")
    asked = {
        "model": model, "data": "digits", "base": {"width": 8, "depth": 2}, "proxy": {"width": 8, "depth": 2}, "steps": 4,
        "batch_size": 4, "trials": 2, "search": {"lr": {"low": 0.01, "high": 0.1, "log": True}},
    }  # fmt: skip
    Path("experiment.yaml").write_text(json.dumps(asked), encoding="utf-8")
    match command:
        case "check":
            arguments = [
                "check",
                model,
                "--data",
                "digits",
                "--base-width",
                "8",
                "--widths",
                "8,16",
                "--max-seeds",
                "3",
            ]
        case "tune":
            arguments = ["tune", "experiment.yaml", "--out", "run"]
        case _:
            Path("net.py").write_text(HUNGRY.replace("raise {error}", "pass"), encoding="utf-8")
            assert cli.run(["tune", "experiment.yaml", "--out", "run", "--executor", "one"]) == 0
            assert cli.run(["transfer", "run", "--width", "16"]) == 0
            Path("net.py").write_text(HUNGRY.replace("{error}", error), encoding="utf-8")
            os.utime("net.py", (1, 1))
            arguments = ["train", "run/target.json"]
    capsys.readouterr()
    assert cli.run(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mutransfer: there is not enough memory (")
    assert said.endswith("use a smaller batch or a smaller width, or a device with more memory.")


def test_an_error_of_the_model_is_still_one() -> None:
    family = families.mlp(width=8)
    with pytest.raises(BuildError, match="check that model, batch and loss fit together"):
        family.loss_on(family.build(family.base), (torch.ones(2, 3), torch.zeros(2, dtype=torch.long)))


ALLOCATE = """
import resource, sys, torch
from mutransfer.devices import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):  # a freed block is a little too small for the next one: alignment needs some bytes
    torch.ones(2**24).add_(1)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.extended
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_used_again_without_a_page_fault(keep: bool) -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):  # not glibc
        assert keep_freed_memory() is False
        return
    command = [sys.executable, "-c", ALLOCATE, "keep" if keep else "return"]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    pages = 10 * 2**26 // resource.getpagesize()
    assert faults < pages / 100 if keep else faults > pages / 1000  # fewer with transparent huge pages
