"""What a person meets first: the time left, a name of another library, an assertion of their own, a file of a package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mutransfer.cli import console, run
from mutransfer.cli.console import Progress
from mutransfer.cli.models import BASE_WIDTH_HELP, MODEL
from mutransfer.errors import RequestError, describe, nearest
from mutransfer.proxies.data import load_data
from mutransfer.proxies.load import load_family
from mutransfer.recipe import Scale
from mutransfer.sweeps.experiment import Experiment

ROOT = Path(__file__).parents[2]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


def test_the_time_left_leaves_out_what_was_before_the_first_trial(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """15 minutes of measuring before the first of 24 trials of 10 seconds: 230 seconds are left, not 6 hours."""
    with Progress("tuning") as progress:
        progress(0, 24)
        clock.now = 900
        progress(0, 24)  # the first trial begins
        clock.now = 910
        progress(1, 24)
        clock.now = 920.5
        progress(2, 24)
    lines = capsys.readouterr().err.splitlines()
    assert "1/24, about 230 s left" in lines[-2]
    assert "2/24, about 226 s left" in lines[-1]


def test_the_time_left_of_pieces_that_are_not_alike(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("basins") as progress:
        progress(0, 3, "", None)
        clock.now = 20
        progress(1, 3, "width 256", 0.5)
    assert "1/3, about 10 s left, width 256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("search.learning_rate", "'lr'"),
        ("search.wd", "'weight_decay'"),
        ("recipe.learning_rate", "'lr'"),
        ("n_trials", "'trials'"),
    ],
)
def test_what_others_call_it(key: str, meant: str) -> None:
    section, _, name = key.rpartition(".")
    given: dict[str, Any] = {"model": "mlp", "data": "digits", "proxy": {"width": 8}}
    value: Any = {"low": 0.001, "high": 0.1} if section == "search" else 2
    with pytest.raises(RequestError, match=f"did you mean {meant}"):
        Experiment.read(given | ({section: {name: value}} if section else {name: value}), "test")
    assert nearest("learning_rate", ["momentum", "beta"]).startswith("known names are")  # where there is no lr


MODEL_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        {built}
        self.layer = nn.Linear(8, width)

    def forward(self, x):
        {run}
        return self.layer(x)

def build(width, depth):
    return Net(width)

def loss(model, batch):
    return model(batch).square().mean()

batch = torch.randn(4, 8)
"""


def written(path: Path, built: str = "pass", run: str = "pass") -> Path:
    path.write_text(MODEL_FILE.format(built=built, run=run), encoding="utf-8")
    return path


def test_an_assertion_in_the_build_is_shown_with_its_own_line(tmp_path: Path) -> None:
    path = written(tmp_path / "net.py", built="assert width % 3 == 0")
    with pytest.raises(RequestError, match=r"AssertionError: assert width % 3 == 0 \(line 8 of .*net\.py\)"):
        load_family(f"{path}:build", None, Scale(8, 1))


def test_an_assertion_in_the_forward_pass_is_shown_with_its_own_line(tmp_path: Path) -> None:
    path = written(tmp_path / "net.py", run="assert x.shape[-1] == 9")
    family = load_family(f"{path}:build", None, Scale(8, 1))
    with pytest.raises(RequestError, match=r"AssertionError: assert x\.shape\[-1\] == 9 \(line 12 of .*net\.py\)"):
        family.loss_on(family.build(family.base), family.batch)


def test_an_assertion_with_a_message_is_its_message() -> None:
    assert describe(AssertionError("two wanted")) == "AssertionError: two wanted"
    assert describe(AssertionError()) == "AssertionError"


def test_a_file_of_a_package_is_named_as_a_module(tmp_path: Path) -> None:
    package = tmp_path / "things" / "models"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "sizes.py").write_text("EXTRA = 1\n", encoding="utf-8")
    path = written(package / "net.py")
    path.write_text("from . import sizes\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        load_family(f"{path}:build", None, Scale(8, 1))
    assert "things.models.net:name" in str(caught.value)
    assert f"run the command in {tmp_path}" in str(caught.value)


@pytest.mark.parametrize(("free", "ok", "fix"), [(51, True, False), (0.5, True, True), (0.01, False, True)])
def test_the_doctor_asks_for_space_only_where_there_is_little(
    free: float, ok: bool, fix: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(".")._replace(free=int(free * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run(["doctor", "--json"])
    (check,) = [each for each in json.loads(capsys.readouterr().out)["checks"] if each["name"] == "disk"]
    assert (check["ok"], check["fix"] is not None) == (ok, fix)


def test_a_bare_function_needs_a_base_width_says_everyone(tmp_path: Path) -> None:
    path = written(tmp_path / "net.py")
    with pytest.raises(RequestError, match="pass --base-width"):
        load_family(f"{path}:build", load_data("digits", 8), None)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "`build(width, depth)` function with `--base-width`" in readme
    assert "needs --base-width" in MODEL
    assert "bare build function" in BASE_WIDTH_HELP


def test_servers_without_a_password_are_not_opened_to_everyone() -> None:
    docs = (ROOT / "docs/how-to/many-workers.md").read_text(encoding="utf-8")
    assert "host='0.0.0.0'" not in docs
    assert "host='10.0.0.1'" in docs
    assert "bind 10.0.0.1" in docs
