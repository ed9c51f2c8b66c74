"""The verdicts of `verify` on a few simulated studies of every kind; `benchmarks/verify_power.py` counts over 200 each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib import util
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def power() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = util.spec_from_file_location("verify_power", BENCHMARKS / "verify_power.py")
        assert spec is not None
        assert spec.loader is not None
        module = util.module_from_spec(spec)
        sys.modules["verify_power"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.extended
def test_intervals_hold_the_truth_and_verdicts_are_right(power: Any) -> None:
    total: Counter[str] = Counter()
    for kind in power.KINDS:
        total += power.simulate(kind, 3, 10)
    for name in ("log2_lr", "drift", "regret"):
        assert total[f"{name} held"] / total[name] >= 0.92, (name, total)
    assert total["wrong pass"] + total["wrong fail"] <= 1, total
    assert min(total["pass"], total["fail"]) >= 10


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    asked = [sys.executable, str(BENCHMARKS / "verify_power.py"), "--quick", "--json"]
    ended = subprocess.run(asked, capture_output=True, text=True, check=True, env=environment)
    claims = json.loads(ended.stdout.splitlines()[-1])["claims"]
    assert len(claims) == 6 * 2 * 5
