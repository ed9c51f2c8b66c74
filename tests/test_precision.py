"""The measured cost of bfloat16 products, and who is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mutransfer import devices
from mutransfer.cli import run
from mutransfer.optimizers.muon import iteration_dtype

EXPERIMENT = """
model: mlp
data: digits
proxy: {width: 8, depth: 1}
steps: 2
batch_size: 4
trials: 1
search:
  lr: {low: 0.001, high: 0.1, log: true}
"""


def test_products_are_measured_whatever_mode_is_active() -> None:
    """Under a fake mode both products would take as long as recording them."""
    devices.bfloat16_slowdown.cache_clear()
    plain = devices.bfloat16_slowdown()
    devices.bfloat16_slowdown.cache_clear()
    with FakeTensorMode(), torch.device("meta"):
        hidden = devices.bfloat16_slowdown()
    assert plain > 0.1
    assert (plain > devices.SLOW) == (hidden > devices.SLOW)


def test_only_cpus_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for slowdown, dtype in ((70.0, torch.float32), (1.5, torch.bfloat16)):
        monkeypatch.setattr(devices, "bfloat16_slowdown", lambda slowdown=slowdown: slowdown)
        assert iteration_dtype("cpu") is dtype
        assert iteration_dtype(torch.device("cuda", 1)) is torch.bfloat16


def test_doctor_and_tune_say_that_bfloat16_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text(EXPERIMENT)
    asked = ["tune", "experiment.yaml", "--executor", "fused", "--precision", "bfloat16", "--out"]
    monkeypatch.setattr(devices, "bfloat16_slowdown", lambda: 70.0)
    assert run([*asked, "slow"]) == 0
    assert "multiplies bfloat16 70 times slower than float32: --precision float32" in capsys.readouterr().err
    run(["doctor"])
    assert "70.0 times as long as in float32; Muon iterates in float32 here" in capsys.readouterr().out
    monkeypatch.setattr(devices, "bfloat16_slowdown", lambda: 1.5)
    assert run([*asked, "fast"]) == 0
    assert "multiplies bfloat16" not in capsys.readouterr().err
