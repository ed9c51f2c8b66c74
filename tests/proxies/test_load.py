"""From MODEL strings to families: every form that works, in every kind of process, and every one that is refused."""

from __future__ import annotations

import multiprocessing
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import mutransfer as mt
from mutransfer.errors import RequestError
from mutransfer.proxies.data import load_data
from mutransfer.proxies.load import load_family
from mutransfer.recipe import Scale

BASE = Scale(16, 2)
GOOD = """
from __future__ import annotations
import functools
from dataclasses import dataclass
import torch
from torch import nn
from mutransfer import Family, Scale

@dataclass
class Shape:
    width: int

def build(width, depth, bias=True):
    torch.zeros(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, Shape(width).width, bias=bias), nn.ReLU(), nn.Linear(width, 10))

batch = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)

def loss(model, batch):
    return model(batch[0]).square().mean()

family = Family(lambda s: build(s.width, s.depth), batch, loss, Scale(32, 2), "mine")
number = 3
instance = build(4, 1)

def fails(width, depth):
    raise ValueError("no\\nsuch size.")

def one(width):
    return build(width, 1)

def nothing(width, depth):
    pass

def made():
    return family

def sized(function):
    @functools.wraps(function)
    def sizing(width, depth):
        sizes.append(width)
        return function()
    return sizing

@sized
def wrapped():
    return build(sizes[-1], 1)

sizes = []
"""


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, "good.py", GOOD)


def refusal(model: str, data: Any = None, base: Scale | None = BASE, **options: Any) -> str:
    before = list(sys.path)
    with pytest.raises(RequestError) as caught:
        load_family(model, data, base, options=options)
    assert sys.path == before
    sentence = str(caught.value)
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence
    return sentence


def trains(family: mt.Family) -> bool:
    model = family.build(family.base)
    loss = family.loss(model, family.batch)
    loss.backward()
    return bool(torch.isfinite(loss)) and all(p.grad is not None for p in model.parameters())


# What works


@pytest.mark.parametrize(("name", "data"), [("mlp", "digits"), ("transformer", "markov"), ("resnet", "digits")])
def test_builtins(name: str, data: str) -> None:
    family = load_family(name, load_data(data, 8), BASE, batch_size=3)
    assert (family.name, family.base, len(family.batch[0])) == (name, BASE, 3)
    assert trains(family)


def test_options_reach_a_builtin() -> None:
    family = load_family("transformer", load_data("markov", 8), BASE, options={"tied": True})
    model: Any = family.build(BASE)
    assert model.readout.weight is model.embedding.weight


def test_a_family_in_a_file_keeps_its_base_unless_given_another(good: Path) -> None:
    own = load_family(f"{good}:family", None, None)
    assert (own.base, own.name) == (Scale(32, 2), "mine")
    assert trains(own)
    assert load_family(f"{good}:family", None, BASE).base == BASE


def test_a_build_function_with_the_batch_and_loss_beside_it(good: Path) -> None:
    family = load_family(f"{good}:build", None, BASE, options={"bias": False})
    assert len(family.batch[0]) == 2
    model = family.build(BASE)
    assert family.loss(model, family.batch) == model(family.batch[0]).square().mean()
    assert "1.bias" not in dict(family.build(BASE).named_parameters())
    assert mt.plan(family, Scale(64, 2)).scale.width == 64


def test_a_build_function_alone_takes_the_datas_batch_and_cross_entropy(tmp_path: Path) -> None:
    text = GOOD.partition("batch =")[0]
    path = write(tmp_path, "bare.py", text)
    family = load_family(f"{path}:build", load_data("digits"), BASE, batch_size=5)
    assert len(family.batch[0]) == 5
    assert trains(family)
    assert "no example batch" in refusal(f"{path}:build")


def test_batch_may_be_a_function(tmp_path: Path) -> None:
    path = write(tmp_path, "made.py", GOOD.replace("batch = torch", "def batch(): return torch").partition("family")[0])
    assert len(load_family(f"{path}:build", None, BASE).batch[0]) == 2


def test_a_relative_path_and_a_module_of_the_current_folder(
    good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_family("good.py:family", None, None).name == "mine"
    write(tmp_path / "zoo_of_models", "small.py", GOOD)
    assert load_family("zoo_of_models.small:family", None, None).name == "mine"


def test_helpers_beside_the_file_and_twice_in_one_process(tmp_path: Path) -> None:
    """Two folders with helpers of the same name, one of them imported only when the model is built."""
    for name, width in (("a", 1), ("b", 2)):
        write(tmp_path / name, "shared_helper.py", f"EXTRA = {width}")
        write(tmp_path / name, "late_helper.py", f"LATE = {width}")
        write(tmp_path / name, "model.py", GOOD + LATE)
    for _ in range(2):
        for name, width in (("a", 1), ("b", 2)):
            family = load_family(f"{tmp_path / name / 'model.py'}:late", None, BASE)
            assert dict(family.build(BASE).named_parameters())["1.weight"].shape == (16 + 110 * width, 64)


LATE = """
from shared_helper import EXTRA

def late(width, depth):
    import late_helper
    return build(width + 10 * EXTRA + 100 * late_helper.LATE, depth)
"""


def test_a_packages_own_folder_is_not_put_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "zoo_of_more", "only_inside.py", "")
    write(tmp_path / "zoo_of_more", "large.py", GOOD + "\ndef inside(width, depth):\n    import only_inside\n")
    monkeypatch.chdir(tmp_path)
    assert "No module named 'only_inside' (line " in refusal("zoo_of_more.large:inside")


def test_a_file_is_imported_once_until_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path, "counted.py", GOOD + "\nimport sys; sys.counted = getattr(sys, 'counted', 0) + 1\n")
    try:
        load_family(f"{path}:family", None, None)
        load_family(f"{path}:build", None, BASE)
        assert sys.counted == 1  # type: ignore[attr-defined]
        path.write_text(path.read_text().replace('"mine"', '"theirs"'))
        assert load_family(f"{path}:family", None, None).name == "theirs"
    finally:
        del sys.counted  # type: ignore[attr-defined]


@pytest.mark.extended
def test_a_spawned_worker_needs_only_the_string(good: Path) -> None:
    for reference, code in ((f"{good}:family", 0), (f"{good}:fails", 1)):
        worker = multiprocessing.get_context("spawn").Process(target=load_family, args=(reference, None, BASE))
        worker.start()
        worker.join(120)
        assert worker.exitcode == code


# What is refused


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tranformer", "did you mean 'transformer'?"),
        ("frobnicator", "give a built-in (mlp, resnet, transformer)"),
        ("", "unknown model ''"),
        ("hf:nowhere/config.json", "there is no file nowhere/config.json"),
        ("models/gpt.py", "write models/gpt.py:name"),
        ("models/gpt.py:", "write models/gpt.py:name"),
        ("package.module", "write package.module:name"),
        ("nowhere/gpt.py:build", "there is no file nowhere/gpt.py"),
        ("no_such_package.module:build", "there is no module 'no_such_package'"),
        ("torch.no_such_module:build", "there is no module 'torch.no_such_module'"),
        ("..up:build", "could not be imported"),
        ("torch.nn:Linaer", "torch.nn has no 'Linaer'"),
        ("mlp", "--data digits"),
    ],
)
def test_a_wrong_reference(model: str, expected: str) -> None:
    assert expected in refusal(model)


def test_a_base_is_asked_for() -> None:
    assert "--base-width" in refusal("mlp", load_data("digits"), None)


def test_a_decorated_function_takes_what_its_wrapper_takes(good: Path) -> None:
    assert load_family(f"{good}:wrapped", None, mt.Scale(8, 1)).built(mt.Scale(16, 1))[1].out_features == 16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("familly", "did you mean 'family'?"),
        ("number", "of type int: give a Family"),
        ("instance", "a model of one size (Sequential)"),
        ("fails", "ValueError: no such size (line"),
        ("one", "TypeError: one() takes 1 positional argument"),
        ("nothing", "returned NoneType"),
        ("made", "store it in a variable and name that"),
    ],
)
def test_a_wrong_thing_in_the_file(good: Path, name: str, expected: str) -> None:
    sentence = refusal(f"{good}:{name}")
    assert expected in sentence
    if name == "fails":
        line = 1 + GOOD.splitlines().index('    raise ValueError("no\\nsuch size.")')
        assert f"(line {line} of {good})" in sentence


def test_a_function_asks_for_its_base_and_a_family_takes_no_options(good: Path) -> None:
    assert "--base-width" in refusal(f"{good}:build", base=None)
    assert "takes no options, but bias is given" in refusal(f"{good}:family", bias=True)
    assert "unexpected keyword argument 'bios'" in refusal(f"{good}:build", bios=True)
    assert "tide" in refusal("transformer", load_data("markov", 8), tide=True)
    assert "no option 'batch_size'" in refusal("transformer", load_data("markov", 8), batch_size=1)


@pytest.mark.parametrize(
    ("text", "expected", "line"),
    [
        ("import torch\n\n1 / 0\n", "ZeroDivisionError: division by zero", 3),
        ("x = 1\nx = = 2\n", "SyntaxError: invalid syntax", 2),
        ("import sys\nsys.exit(4)\n", "SystemExit: 4", 2),
        ("\nimport helper_that_is_not_there\n", "ModuleNotFoundError: No module named", 2),
        ("import json\n\n\njson.loads('{')\n", "JSONDecodeError", 4),
        ("\nraise RuntimeError('several\\n  lines')", "RuntimeError: several lines", 2),
    ],
)
def test_a_file_that_fails_says_where(tmp_path: Path, text: str, expected: str, line: int) -> None:
    path = write(tmp_path, "broken.py", text)
    for _ in range(2):  # a failed import leaves nothing behind
        sentence = refusal(f"{path}:build")
        assert expected in sentence
        assert f"(line {line} of {path})" in sentence


def test_a_batch_that_fails_and_a_file_of_another_kind(tmp_path: Path) -> None:
    path = write(tmp_path, "bad_batch.py", GOOD.partition("batch =")[0] + "def batch():\n    return {}['x']\n")
    assert "batch() next to" in refusal(f"{path}:build")
    assert "is not a Python file" in refusal(f"{write(tmp_path, 'notes.txt', '')}:build")
    assert "there is no file" in refusal(f"{tmp_path}{os.sep}:build")
