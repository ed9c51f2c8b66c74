"""What the documents tell a person to write runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mutransfer as mt
from mutransfer.cli import run

ROOT = Path(__file__).parents[1]


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("docs/how-to/own-training-loop.md"):
        exec(block, names)
    out = capsys.readouterr().out
    assert str(names["plan"]) in out
    assert "law sqrt" in out
    columns = re.search(
        r"frame\(\)  # (.*?) and their factors", (ROOT / "docs/how-to/own-training-loop.md").read_text(encoding="utf-8")
    )
    assert columns
    assert columns[1].split(", ") == list(names["frame"].columns)[: columns[1].count(",") + 1]
    assert (
        names["loss"].item() < names["family"].loss(names["build"](names["plan"].scale), names["family"].batch).item()
    )


def test_the_python_page_names_every_field_of_a_recipe() -> None:
    text = (ROOT / "docs/how-to/own-training-loop.md").read_text(encoding="utf-8")
    assert {name for name in mt.Recipe.model_fields if f"`{name}`" not in text} == set()


def test_the_readmes_model_file_is_planned_by_the_command_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = [block for block in blocks("README.md") if block.startswith("# model.py")]
    (tmp_path / "model.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    command = re.match(r"# model\.py: mutransfer (.*)", source)
    assert command
    assert run(command[1].split()) == 0
    assert "width 64 → 1024" in capsys.readouterr().out


def test_the_github_action_runs_the_check_and_keeps_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/how-to/coordinate-check.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    steps = yaml.safe_load(block)["jobs"]["check"]["steps"]
    (command,) = [step["run"] for step in steps if step.get("run", "").startswith("mutransfer ")]
    (kept,) = [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")]
    source = (ROOT / "tests/coord_check/mup_models.py").read_text(encoding="utf-8")
    (tmp_path / "my_model.py").write_text(source + "\nfamily = plain_mlp\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(command.split()[1:]) == 0, capsys.readouterr().out
    assert "control sp: fail" in capsys.readouterr().out
    assert (tmp_path / kept).is_file()
