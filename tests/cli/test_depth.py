"""From a proxy of 2 layers to a target of 4: tuned, carried over and trained under CompleteP; under µP with a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mutransfer.cli import run

EXPERIMENT = """
model: transformer
options: {head_dim: 8}
data: markov
sequence_length: 8
proxy: {width: 16, depth: 2}
parametrization: %s
steps: 4
batch_size: 4
rungs: 1
trials: 1
"""


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = run([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return dict(json.loads(out))


@pytest.mark.parametrize("parametrization", ["completep", "mup"])
def test_a_recipe_is_carried_over_depth(
    parametrization: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "experiment.yaml", str(tmp_path / "run")
    file.write_text(EXPERIMENT % parametrization)
    asked(capsys, "tune", str(file), "--out", folder)
    same = asked(capsys, "transfer", folder, "--width", "16")
    assert not [text for text in same["warnings"] if "depth" in text]
    target = asked(capsys, "transfer", folder, "--width", "16", "--depth", "4")
    about_depth = [text for text in target["warnings"] if "no rule for depth" in text]
    factors = {row["name"]: row["init_factor"] for row in target["parameters"]}
    if parametrization == "completep":
        assert about_depth == []
        assert factors["blocks.3.ffn.down.weight"] == pytest.approx(0.5)
        trained = asked(capsys, "train", str(tmp_path / "run" / "target.json"))
        assert trained["verdict"] == "pass"
        dump = trained["checkpoint"]
        assert asked(capsys, "audit", str(tmp_path / "run" / "target.json"), dump)["verdict"] == "pass"
    else:
        assert len(about_depth) == 1
        assert "from 2 to 4 layers" in about_depth[0]
        assert not [text for text in target["notes"] if "depth" in text]  # said once
        assert set(factors.values()) <= {1.0, None}
