"""An interrupted check goes on where it was, and takes nothing that was measured of something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import mutransfer as mt
from mutransfer.cli import run
from mutransfer.coord_check import judge_coordinates, recording, verdict
from mutransfer.coord_check.cache import CheckCache

from ..helpers import families
from .test_updates import bending

MODEL = """
import torch
from torch import nn
import mutransfer as mt

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)
    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.ACTIVATION(self.a(x)))))

family = mt.Family(lambda s: Net(s.width), (torch.ones(4, 8), torch.arange(4)),
                   lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), mt.Scale(16))
"""


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths that are trained; a negative one interrupts when it is its turn."""
    trained: list[int] = []
    whole = recording.run

    def noting(family: mt.Family, setup, *rest):  # type: ignore[no-untyped-def]
        if -setup.scale.width in trained:
            raise KeyboardInterrupt
        trained.append(setup.scale.width)
        return whole(family, setup, *rest)

    monkeypatch.setattr(recording, "run", noting)
    return trained


@pytest.mark.extended
def test_an_interrupted_check_goes_on(tmp_path: Path, widths: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.py"
    file.write_text(MODEL.replace("ACTIVATION", "relu"), encoding="utf-8")
    command = [
        "check",
        f"{file}:family",
        "--widths",
        "16,32,64",
        "--seeds",
        "2",
        "--max-seeds",
        "2",
        "--steps",
        "2",
        "--json",
    ]
    whole = run(command)
    expected = json.loads(capsys.readouterr().out)
    command += ["--out", str(tmp_path / "out")]
    widths[:] = [-64]
    assert run(command) == 130
    capsys.readouterr()
    assert widths == [-64, 16, 32]
    assert len(list((tmp_path / "out" / "check").glob("*.csv"))) == 2
    widths.clear()
    assert run(command) == whole
    found = json.loads(capsys.readouterr().out)
    assert widths == [64]  # the two others had been finished
    assert found["modules"] == expected["modules"]
    assert (found["verdict"], found["cause"]) == (expected["verdict"], expected["cause"])
    # Another model in the same file, or another learning rate, is another question.
    for change in ("tanh", "--lr"):
        widths.clear()
        if change == "tanh":
            file.write_text(MODEL.replace("ACTIVATION", "tanh"), encoding="utf-8")
            run(command)
        else:
            run([*command, "--lr", "0.01"])
        capsys.readouterr()
        assert widths == [16, 32, 64]


def test_what_is_kept_is_what_was_measured(tmp_path: Path, widths: list[int]) -> None:
    family = families.mlp(width=16, depth=2)
    options = {"widths": [16, 32], "seeds": range(2), "steps": 1}
    plain = recording.record(family, **options)
    kept = CheckCache(tmp_path)
    first, again = recording.record(family, **options, cache=kept), recording.record(family, **options, cache=kept)
    pd.testing.assert_frame_equal(first, plain)
    pd.testing.assert_frame_equal(again, plain)
    assert len(widths) == 4
    other = replace(family, batch=(family.batch[0] * 2, family.batch[1]))
    recording.record(other, **options, cache=kept)
    assert len(widths) == 6
    next(tmp_path.glob("*.csv")).write_text("half a li", encoding="utf-8")
    recording.record(family, **options, cache=kept)
    assert len(widths) in (6, 7)  # the damaged piece, if it was this batch's, is measured again


def test_max_seeds_bounds_an_open_check_and_what_is_open_is_named() -> None:
    said: list[tuple[int, int, str | None]] = []
    found = judge_coordinates(
        families.mlp(width=16, depth=3), [16, 32], seeds=2, most=5, steps=1,
        more=lambda done, adding, judged: said.append((done, adding, judged.cause)),
    )  # fmt: skip
    if found.verdict.status == "undecided":
        assert found.seeds == 5
    assert [each[:2] for each in said] == [(2, 2), (4, 1)][: len(said)]
    assert said
    assert all("goes as width^" in str(cause) and "[" in str(cause) for *_, cause in said)
    assert set(found.coordinates["seed"]) == set(range(found.seeds))


def test_more_seeds_are_not_asked_where_only_wider_models_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    from mutransfer.coord_check import check

    asked = []
    monkeypatch.setattr(check, "record", lambda *args, **options: asked.append(options["seeds"]) or bending(0.1))
    found = check.judge_coordinates(families.mlp(), [32, 64, 128, 256])
    assert (found.verdict.status, found.verdict.widen, len(asked)) == ("undecided", True, 1)
    assert verdict(bending(0.1)).cause == found.verdict.cause
