"""The page on own trainers runs as it stands: both examples are tuned, and the command trains the big model as well."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.experiment import Experiment

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/how-to/user-trainer.md").read_text(encoding="utf-8")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A folder with the files that the page shows, under the names in their first lines."""
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL):
        name = re.match(r"# ([a-z]+\.(?:py|yaml))\n", block)
        assert name, block[:80]
        (tmp_path / name[1]).write_text(block, encoding="utf-8")
    export = (ROOT / "docs/how-to/export.md").read_text(encoding="utf-8")
    readers = re.findall(r"```python\n(.*?)```", export, re.DOTALL)
    assert len(readers) == 2
    (tmp_path / "read_plan.py").write_text("\n".join(readers), encoding="utf-8")
    return tmp_path


def lines(about: str) -> list[str]:
    (found,) = [block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if about in block]
    return found.splitlines()


def run(line: str, folder: Path) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", line], cwd=folder, env={**os.environ, "PATH": tools}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def assert_learned(run: Path, trials: int) -> None:
    frame = TRIALS.read(RunFolder(run).trials)
    assert frame["state"].isin(["COMPLETE", "PRUNED"]).sum() == trials
    assert frame["value"].min() < 4.5 < 5.5  # a guess costs log 256 = 5.5
    assert frame["value"].nunique() == len(frame)


def test_the_function_is_tuned(page: Path) -> None:
    alone, _ = lines("own.yaml")
    run(alone, page)
    assert_learned(page / "runs/own", 6)


@pytest.mark.slow
def test_the_function_is_tuned_in_processes(page: Path) -> None:
    _, beside = lines("own.yaml")
    run(beside, page)
    assert_learned(page / "runs/beside", 6)


def test_the_command_is_tuned_and_trains_the_big_model(page: Path) -> None:
    assert shutil.which("bash")
    for line in lines("command.yaml"):
        run(line, page)
    assert_learned(page / "runs/command", 4)
    assert (page / "runs/command/big/model.pt").is_file()
    finished = TRIALS.read(page / "runs/command/trials.csv")
    first = page / "runs/command/trials" / str(finished.loc[finished["state"] == "COMPLETE", "number"].iloc[0])
    assert (first / "stdout.log").read_text().startswith("training ")
    assert (first / "out/model.pt").is_file()


def test_the_page_names_every_key_and_placeholder() -> None:
    from mutransfer.sweeps.experiment import PLACEHOLDERS, Trainer

    assert {key for key in Trainer.model_fields if key != "call" and key not in PAGE} == set()
    assert {name for name in PLACEHOLDERS if f"`{{{name}}}`" not in PAGE} == set()
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        Experiment.read(yaml.safe_load(block), "page")
