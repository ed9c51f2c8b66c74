"""No password of a storage's address is shown or written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mutransfer.io import masked
from mutransfer.run_dir import RunFolder


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://ann:s3cret@db:5432/sweeps", "postgresql://ann:***@db:5432/sweeps"),
        ("--storage=mysql+pymysql://ann:s3/cr@et@db/sweeps", "--storage=mysql+pymysql://ann:***@db/sweeps"),
        ("redis://:s3cret@cache:6379/0", "redis://:***@cache:6379/0"),
        ("postgresql://db/sweeps?user=ann&password=s3cret&x=1", "postgresql://db/sweeps?user=ann&password=***&x=1"),
        ("no redis://a:s3cret@h/d (it is away)", "no redis://a:***@h/d (it is away)"),
        ("postgresql://ann@db:5432/sweeps", "postgresql://ann@db:5432/sweeps"),
        ("sqlite:////tmp/study.db", "sqlite:////tmp/study.db"),
        ("grpc://head-node:13000", "grpc://head-node:13000"),
    ],
)  # fmt: skip
def test_a_password_is_masked_and_nothing_else(given: str, shown: str) -> None:
    assert masked(given) == shown


def test_the_environment_holds_the_command_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mutransfer", "tune", "e.yaml", "--storage", "postgresql://ann:s3cret@db/sweeps"])
    folder = RunFolder(tmp_path)
    folder.note_environment(seed=1)
    text = folder.environment.read_text()
    assert "s3cret" not in text
    assert "postgresql://ann:***@db/sweeps" in text
