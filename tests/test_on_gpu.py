"""The script for a machine with a GPU runs here on the CPU, every part of it, and goes on where it was."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["capture", "throughput", "refused", "memory", "checkpoints", "recaptures", "check", "basin"]


def test_a_gpu_is_only_expected_to_be_faster_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small trials leave most of it idle, so nothing is claimed of them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    throughput = importlib.import_module("sweep_throughput")
    counts = (1, 4, 16, 64, 256)
    seconds = {"eager": 10.0, "graphs": 5.0} | {f"fused {count}": 10.0 for count in counts}
    ways = {}
    for name, each in seconds.items():
        ways[name] = throughput.Way(name, None, 64)
        ways[name].seconds = [each]
    found = throughput.claims(128, ways, counts, "cuda")
    assert [claim.name for claim in found] == [
        f"width 128: fused {count} / {other}" for count in (64, 256) for other in ("one by one", "CUDA graphs")
    ]


@pytest.mark.extended
def test_every_part_runs(tmp_path: Path) -> None:
    command = ["benchmarks/on_gpu.sh", str(tmp_path), "--device", "cpu", "--quick"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": path}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text())["found"] for name in PARTS}
    assert all(each["relative difference of losses"] < 1e-3 for each in found["capture"].values())
    assert found["memory"]["ended"] == found["memory"]["asked"]
    assert found["memory"]["messages known"]
    assert found["checkpoints"]["muon"] == {"separate": 0, "fused": 0}
    assert found["check"]["largest relative difference"] == 0
    (tmp_path / "check.json").unlink()
    again = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": path}, check=False
    )
    assert [line for line in again.stdout.splitlines() if line.endswith("done before")] == [
        f"{name}: done before" for name in PARTS if name != "check"
    ]
    assert (tmp_path / "check.json").exists()
