"""A workplace with everything that commands read: an experiment, run folders, corpora, model files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..helpers import processes as _processes
from ..helpers.processes import Processes

EXPERIMENT = """
model: mlp
data: digits
proxy: {width: 8, depth: 2}
steps: 8
batch_size: 16
rungs: 2
trials: 3
recipe: {lr: 0.015625, warmup: 0.0}
search:
  lr: {low: 0.001953125, high: 0.125, log: true}
"""

LANGUAGE = """
model: transformer
options: {head_dim: 16}
data: text:corpus.txt
sequence_length: 8
proxy: {width: 16, depth: 1}
steps: 2
batch_size: 2
rungs: 1
trials: 1
"""

MODEL = """
from torch import nn

def build(width, depth):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
"""

# Families whose own batch or loss is wrong, or which the experiment's data does not fit.
FAULTY = """
import torch
import mutransfer as mt

def family(x, loss=None, classes=10):
    return mt.Family(
        lambda s: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, s.width), torch.nn.Linear(s.width, classes)),
        (x, torch.full((2,), 9)),
        loss or (lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])),
        mt.Scale(8, 1),
    )

x = torch.ones(2, 64)
labels, nan = family(x, classes=5), family(x.clone().fill_diagonal_(torch.nan))
detached = family(x, lambda model, batch: model(batch[0]).mean().detach())
alone = mt.Family(family(x).build, x, lambda model, batch: model(batch).mean(), mt.Scale(8, 1))
"""


@pytest.fixture(scope="session")
def commands() -> Iterator[Processes]:
    with _processes.processes() as made:
        yield made


@pytest.fixture(scope="session")
def _shop(commands: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shop = tmp_path_factory.mktemp("shop")
    (shop / "experiment.yaml").write_text(EXPERIMENT)
    (shop / "language.yaml").write_text(LANGUAGE)
    (shop / "model.py").write_text(MODEL)
    (shop / "faulty.py").write_text(FAULTY)
    (shop / "broken.py").write_text("raise OSError('the licence\\nserver is away')\n")
    (shop / "empty.txt").write_text("")
    (shop / "tiny.txt").write_text("to be or not to be")
    (shop / "corpus.txt").write_bytes(random.Random(0).randbytes(2000))
    (shop / "file").write_text("in the way")
    (shop / "words.yaml").write_text("just words")
    (shop / "recipe.json").write_text('{"lr": 0.01, "weight_decay": 0.1}')
    (shop / "nothing").mkdir()
    for arguments in (
        ("tune", "experiment.yaml", "--out", "run"),
        ("transfer", "run", "--width", "16"),
        ("train", "run/target.json"),
        ("tune", "language.yaml", "--out", "language"),
        ("transfer", "language", "--width", "32"),
    ):
        ended = commands.run(*arguments, cwd=shop)
        assert ended.code == 0, ended.err
    # The same folder, and a corpus that has changed since.
    shutil.copytree(shop / "language", shop / "other")
    target, experiment = shop / "other" / "target.json", shop / "other" / "experiment.yaml"
    for file in (target, experiment):
        file.write_text(file.read_text().replace("text:corpus.txt", "text:changed.txt"))
    (shop / "changed.yaml").write_text(LANGUAGE.replace("corpus", "changed"))
    (shop / "changed.txt").write_bytes(random.Random(1).randbytes(2000))
    shutil.copytree(shop / "run", shop / "unfinished")
    (shop / "unfinished" / "best.json").unlink()
    return shop


@pytest.fixture
def shop(_shop: Path, tmp_path: Path) -> Path:
    """A copy of the workplace, to be damaged at will."""
    return Path(shutil.copytree(_shop, tmp_path / "shop"))
