"""Models that somebody wired by hand, checked as they stand: mup's examples pass, and without mup they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mutransfer.cli import run

from ..helpers.sets import extended_but

MODELS = Path(__file__).parents[1] / "helpers" / "mup_models.py"


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize(
    ("model", "code"),
    extended_but(
        [("mlp", 0), ("plain_mlp", 1), ("transformer", 0), ("plain_transformer", 1)], ("mlp", 0), ("plain_mlp", 1)
    ),
)
def test_mups_own_models_pass_and_fail_without_it(
    model: str, code: int, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(["check", f"{MODELS}:{model}", "--parametrization", "own", "--optimizer", optimizer, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert found == code, said["cause"]
    assert said["verdict"] == ("fail" if code else "pass")


@pytest.mark.extended
def test_the_plan_of_an_annotated_model_is_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Rebuilt in µP as any other model, mup's forward multiplier seen and divided out."""
    assert run(["check", f"{MODELS}:transformer", "--json"]) == 0, capsys.readouterr()


def test_own_has_three_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", f"{MODELS}:mlp", "--parametrization", "own", "--optimizer", "muon"]) == 2
    assert "is checked with adam, adamw or sgd, not 'muon'" in capsys.readouterr().err


def test_a_name_close_to_own_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "mlp", "--parametrization", "owm", "--widths", "16,32"]) == 2
    assert "own" in capsys.readouterr().err.partition("owm")[2]
