"""Any sharding of a model gives the weights of the whole one, and no shard builds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "helpers" / "sharded.py")


@pytest.mark.parametrize(
    ("way", "world"),
    [
        pytest.param("fully_shard", 2, marks=pytest.mark.extended),
        pytest.param("tensor parallel", 2, marks=pytest.mark.extended),
        pytest.param("hybrid", 4, marks=pytest.mark.slow),
        pytest.param("both", 4, marks=pytest.mark.slow),
    ],
)
def test_any_sharding_gives_the_same_weights(way: str, world: int, tmp_path: Path) -> None:
    """From the meta device, through to_empty; uneven shards, parts, programs and replicas among them."""
    command = [sys.executable, SCRIPT, way]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in ranks]
    assert [code for _, code in ends] == [0] * world, ends


def test_a_shard_is_drawn_without_the_whole() -> None:
    command = [sys.executable, SCRIPT, "measure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
