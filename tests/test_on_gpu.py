"""The script for a machine with a GPU runs here on the CPU, every part of it, and goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["capture", "throughput", "refused", "memory", "checkpoints", "recaptures", "check", "basin"]


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
