"""What a step would do on a GPU, seen without one: nothing is left on the CPU, copied to the host or waited for.

The GPU computes nothing (`helpers/fake_cuda.py`), so values are compared elsewhere, on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ...helpers import fake_cuda
from ...helpers.on_fake_cuda import MODELS
from ...helpers.sets import extended_but

ROOT = Path(__file__).parents[3]
# What torch's and transformers' own optimizers do in every step; lion and signum need a class that is not installed.
WAITING = {
    "adafactor": "_local_scalar_dense waits for the device",
    "asgd": "_local_scalar_dense waits for the device",
    "adafactor-hf": "zeros makes a tensor on the CPU",
    "adafactor-unscaled": "zeros makes a tensor on the CPU",
    "lion": "needs an optimizer class",
    "signum": "needs an optimizer class",
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake GPU, built once."""
    try:
        return fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))
    except FileNotFoundError as error:
        pytest.skip(str(error))


def on_fake_cuda(library: Path, group: str) -> dict[str, Any]:
    """The results of a group's cases: what they return, or their error as text."""
    command = [sys.executable, "-m", "tests.helpers.on_fake_cuda", str(library), group]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_planted_faults_are_seen(library: Path) -> None:
    found = on_fake_cuda(library, "faulty")
    assert isinstance(found.pop("none"), dict)
    assert found == {
        "arange": "NotOnTheDeviceError: arange makes a tensor on the CPU",
        "list": "NotOnTheDeviceError: lift_fresh makes a tensor on the CPU",
        "cpu": "NotOnTheDeviceError: _to_copy copies to the CPU",
        "item": found["item"],
    }
    assert "_local_scalar_dense" in found["item"]


@pytest.mark.parametrize("model", extended_but(MODELS))
def test_fused_steps_stay_on_the_device(library: Path, model: str) -> None:
    """With every fused optimizer, in bfloat16, with and without clipping; then kept, saved and continued."""
    found = on_fake_cuda(library, model)
    assert {name: each for name, each in found.items() if not isinstance(each, dict)} == {}
    assert found["bfloat16"] != found["adamw"] != found["without clipping"]


@pytest.mark.extended
def test_a_batch_is_uploaded_once_for_all_trials(library: Path) -> None:
    """Inputs and targets of seven further steps, and the optimizer's numbers of all eight."""
    assert on_fake_cuda(library, "uploads") == {"uploads": 2 * 7 + 1}


@pytest.mark.extended
def test_separate_trainings_stay_on_the_device(library: Path) -> None:
    found = on_fake_cuda(library, "separate")
    others = {name: each for name, each in found.items() if not isinstance(each, dict)}
    assert others.keys() == WAITING.keys()
    assert all(WAITING[name] in each for name, each in others.items())


@pytest.mark.extended
def test_checks_stay_on_the_device(library: Path) -> None:
    found = on_fake_cuda(library, "check")
    assert {name: each for name, each in found.items() if not isinstance(each, int)} == {}
