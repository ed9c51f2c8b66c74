"""What tests of `tune` share: a loss with a known optimum, its refusals, and that all records agree."""

from __future__ import annotations

from typing import Any

import pytest

from mutransfer.errors import RequestError
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.jobs import Job
from mutransfer.sweeps.tune import Tuned, tune

from .small import journal, octaves


def bowl(job: Job) -> float:
    """A loss with its optimum at log2 lr = −5."""
    return 1 + (octaves(job.recipe) + 5) ** 2 / 10


def states(folder: RunFolder) -> list[str]:
    return [trial.state.name for trial in journal(folder).trials]


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(RequestError) as caught:
        tune(*args, **kwargs)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def assert_agrees(found: Tuned, folder: RunFolder) -> None:
    """What is returned, what the journal holds and what the folder's files say are the same."""
    trials = TRIALS.read(folder.trials)
    assert trials["state"].tolist() == states(folder) == found.trials["state"].tolist()
    assert trials["number"].tolist() == list(range(len(trials)))
    assert Recipe.load(folder.best) == found.best
    chosen = trials[(trials["state"] == "COMPLETE") & ~trials["diverged"]]
    assert found.value == chosen["value"].min()
