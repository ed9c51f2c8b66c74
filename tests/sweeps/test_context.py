"""What the runs of a command share is loaded and traced once, and only where the experiments agree."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mutransfer.errors import RequestError
from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps import jobs
from mutransfer.sweeps.control import tune_control
from mutransfer.sweeps.executors import executor_for
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.tune import price, tune
from mutransfer.sweeps.verify import basins

from ..helpers.small import Planted, experiment
from ..helpers.tuned import bowl


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each was loaded or traced, the model by scale and parametrization."""
    found: Counter[Any] = Counter()

    def counted(name: str, key: Any) -> None:
        make = getattr(jobs, name)

        def counting(*args: Any, **options: Any) -> Any:
            found[key(*args)] += 1
            return make(*args, **options)

        monkeypatch.setattr(jobs, name, counting)

    for name in ("load_data", "load_family", "observe"):
        counted(name, lambda *_, name=name: name)
    counted("observed_model", lambda family, scale, parametrization, _: ("model", scale.width, parametrization))
    counted("step_cost", lambda family, scale, _: ("cost", scale.width))
    return found


def test_a_whole_command_loads_and_traces_once(folder: RunFolder, made: Counter[Any]) -> None:
    given = experiment(trials=3, repeats={"top": 1, "seeds": 2})
    context = RunContext(given, {})
    with executor_for(given, "auto", context=context) as executor:
        tune(given, folder, executor=executor, context=context)
    recipe, planted = Recipe(lr=2**-6, warmup=0.0), Planted(bowl)
    basins(context, recipe, [8, 16], folder=folder, executor=planted, parametrizations=("mup", "sp"), seeds=1)
    tune_control(context, folder, "sp", 16, executor=planted, trials=2, seeds=1)
    assert price(context, folder, given.proxy_scale.with_(width=16))["ratio"] is not None
    once = ["load_data", "load_family", "observe", ("model", 8, "mup"), ("model", 16, "mup"), ("model", 8, "sp")]
    assert made == Counter([*once, ("model", 16, "sp"), ("cost", 8), ("cost", 16)])


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"steps": 9, "seed": 3, "optimizer": "sgd", "trials": 7, "recipe": {"lr": 0.5}}, False),
        ({"proxy": {"width": 16, "depth": 2}, "base": {"width": 8, "depth": 2}}, False),
        ({"base": {"width": 16, "depth": 2}}, True),
        ({"model": "resnet"}, True),
        ({"roles": {"*.bias": "hidden"}}, True),
    ],
)
def test_experiments_share_what_they_agree_on(changes: dict[str, Any], again: bool, made: Counter[Any]) -> None:
    context = RunContext(experiment(), {})
    first = context.family
    other = context.for_(experiment(**changes))
    assert (other.family is not first) == again
    assert made["load_family"] == 1 + again
    assert context.for_(experiment()).family is first


def test_what_failed_is_tried_again() -> None:
    context, tries = RunContext(experiment(), {}), []

    def fails() -> int:
        tries.append(1)
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            context.once("key", fails)
    assert len(tries) == 2
    assert [context.once("key", lambda: 1), context.once("key", lambda: 2)] == [1, 1]


def test_data_that_is_required_and_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    given = experiment(model="mlp", data="digits")
    context = RunContext(given, {})
    assert context.required_data is context.data is not None
    without = context.for_(given.model_copy(update={"data": "none"}))
    monkeypatch.setattr(RunContext, "data", None)
    with pytest.raises(
        RequestError, match="data is none, which only a user trainer can train on: name data or a trainer"
    ):
        _ = without.required_data
