"""SIGKILLs at random moments, inside of writes as well, of one process and of four: the benchmark's small version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_sweep.py"


@pytest.mark.extended
def test_a_sweep_loses_nothing_when_it_is_killed() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    claims = json.loads(done.stdout.splitlines()[-1])["claims"]
    assert len(claims) == 12
    assert all(claim["ok"] for claim in claims), claims
