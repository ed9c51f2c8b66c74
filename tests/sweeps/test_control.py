"""The control of a comparison: tuned over all that the proxy was tuned over, at the width where it is compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.commands import Commands
from mutransfer.sweeps.control import (
    Control,
    comparison,
    conclusion,
    control_experiment,
    control_folder,
    finished_trials,
    tune_control,
)
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, RunContext
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.verify import basins

from ..helpers.small import Counting, Failing, Planted, contents, experiment, journal, octaves

SEARCH: dict[str, Any] = {
    "lr": {"low": 2**-9, "high": 2**-3, "log": True},
    "alpha_output": {"low": 0.25, "high": 8.0, "log": True},
}
PROXY, WIDE = 8, 64


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def given(**changes: Any) -> Experiment:
    return experiment(**{"search": SEARCH, "trials": 6, "sampler": "random", "pruner": "half", "seed": 1, **changes})


def landscape(job: Job) -> float:
    """µP has its optimum at lr 2^-6 and alpha_output 4 at every width, SP at width 64 at 2^-9.5 and 1, 1% above."""
    ours = job.parametrization == "mup" or job.scale.width == PROXY
    lr, alpha, floor = (-6.0, 2.0, 2.0) if ours else (-9.5, 0.0, 2.02)
    off = (octaves(job.recipe) - lr) ** 2 / 60 + (math.log2(job.recipe.alpha_output) - alpha) ** 2 / 50
    return floor + off + job.seed / 1000


def tuned(folder: RunFolder, executor: Any = None, **options: Any) -> Control:
    options = {"trials": 6, "seeds": 5, **options}
    return tune_control(
        RunContext(options.pop("experiment", given())),
        folder,
        "sp",
        WIDE,
        executor=executor or Planted(landscape),
        **options,
    )


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({}, {"low": 2**-12, "high": 2**-3, "log": True}),
        # What the learning rate refers to is the base; SP's is the same at every width, and higher in a narrower model.
        ({"base": {"width": 16, "depth": 2}}, {"low": 2**-11, "high": 2**-3, "log": True}),
        ({"base": {"width": 256, "depth": 2}}, {"low": 2**-9, "high": 0.5, "log": True}),
        ({"search": {**SEARCH, "lr": {"low": 2**-9, "high": 2**-3}}}, {"low": 2**-12, "high": 2**-3, "log": True}),
        ({"search": {"lr": {"choices": [0.5, 0.25, 2.0]}}}, {"choices": [0.03125, 0.0625, 0.25, 0.5, 2.0]}),
        ({"search": {"alpha_output": SEARCH["alpha_output"]}}, {"low": 2**-11, "high": 2**-4, "log": True}),
    ],
)
def test_the_same_question_at_the_wide_model_with_learning_rates_down_to_the_ratio(
    changes: dict[str, Any], lr: dict[str, Any]
) -> None:
    ours = experiment(**{"search": SEARCH, "budget": {"seconds": 9}, "sampler": "tpe", "seed": 3, **changes})
    theirs = control_experiment(ours, "sp", WIDE, 7)
    found = {
        key: value for key, value in theirs.search["lr"].model_dump(mode="json").items() if value not in (None, False)
    }
    assert found == lr
    assert {name: theirs.search[name] for name in ours.search if name != "lr"} == {
        name: range_ for name, range_ in ours.search.items() if name != "lr"
    }
    assert (theirs.parametrization, theirs.proxy_scale.width, theirs.trials) == ("sp", WIDE, 7)
    assert theirs.base_scale == ours.base_scale
    assert theirs.budget.seconds is None  # ours may have been cut short: as many trials count
    same = set(ours.question()) - {"parametrization", "proxy", "base", "search"}
    assert {key: theirs.question()[key] for key in same} == {key: ours.question()[key] for key in same}


def test_the_control_finds_its_own_values_and_is_compared_with_the_same_seeds(folder: RunFolder) -> None:
    ours = given(trials=24, sampler="independent")
    found = tune(ours, folder, executor=Planted(landscape))
    recipe = found.best.with_(lr=2**-6, alpha_output=4.0)
    counting = Counting(Planted(landscape))
    control = tuned(folder, counting, experiment=ours, trials=finished_trials(given(), folder))
    assert control.trials == 24
    assert {job.parametrization for job in counting.jobs} == {"sp"}
    assert {job.scale.width for job in counting.jobs} == {WIDE}
    assert math.log2(control.params["lr"]) == pytest.approx(-9.5, abs=0.7)
    assert math.log2(control.params["alpha_output"]) == pytest.approx(0.0, abs=1.0)
    assert list(control.runs["seed"]) == [0, 1, 2, 3, 4]
    trials, each = (
        TRIALS.read(control_folder(folder, "sp", WIDE).trials),
        RunContext(given()).flops(given().proxy_scale.with_(width=WIDE)),
    )
    assert each is not None
    assert control.flops == pytest.approx(each * (trials["steps"].sum() + 5 * given().steps))

    frame = basins(
        RunContext(given()),
        recipe,
        (PROXY, WIDE),
        folder=folder,
        executor=Planted(landscape),
        parametrizations=("mup", "sp"),
        seeds=5,
    )
    rows = comparison(frame, ["mup", "sp"], recipe, PROXY, control)
    assert [row["label"] for row in rows] == [
        "µP, recipe from width 8",
        "µP, learning rate alone tuned at width 64",
        "SP, recipe from width 8",
        "SP, learning rate alone tuned at width 64, other values as µP's",
        "SP, tuned at width 64 over lr and alpha_output with 24 trials",
    ]
    assert rows[0]["loss"] == pytest.approx(2.002)
    # With µP's alpha_output SP is 5% above, with its own 1%.
    assert rows[3]["difference"] / rows[0]["loss"] == pytest.approx(0.05, abs=0.005)
    assert rows[4]["difference"] / rows[0]["loss"] == pytest.approx(0.0125, abs=0.005)
    # The seeds' own differences are in both: the pairs' spread is none.
    assert rows[4]["difference_high"] - rows[4]["difference_low"] == pytest.approx(0, abs=1e-9)
    assert rows[4]["high"] - rows[4]["low"] == pytest.approx(2 * 2.776 * math.sqrt(2.5e-6 / 5), rel=1e-3)
    assert math.isnan(rows[0]["difference"])
    said = conclusion(rows, ["mup", "sp"], 24, control, found.trials["flops"].sum())
    assert said.startswith(f"{rows[4]['label']}: {rows[4]['loss']:.4f} [")
    assert "; µP, recipe from width 8 (24 trials there): 2.0020 [2.0000, 2.0040]. SP is " in said
    assert f"higher ({rows[4]['difference'] / rows[0]['loss']:.1%}), paired over 5 seeds. The search of SP cost" in said


def test_the_search_goes_on_where_it_stopped_and_leaves_the_proxys_study_alone(folder: RunFolder) -> None:
    tune(given(), folder, executor=Planted(landscape))
    before = contents(folder.path)
    whole = tuned(RunFolder(folder.path.parent / "other").make())
    for at in (3, 4):  # while it is tuned, and while the best is trained again
        with pytest.raises(KeyboardInterrupt):
            tuned(folder, Failing(at, KeyboardInterrupt(), Planted(landscape)))
    control = tuned(folder, rest := Counting(Planted(landscape)))
    assert [job.key for job in rest.jobs] == [("seed", seed) for seed in (1, 2, 3, 4)]
    assert control.trials == whole.trials == 6
    assert len(journal(control_folder(folder, "sp", WIDE)).get_trials()) >= 6
    assert len(journal(folder).get_trials()) == 6
    pd.testing.assert_frame_equal(tuned(folder, idle := Counting()).runs, control.runs)
    assert idle.jobs == []
    more = tuned(folder, Counting(Planted(landscape)), seeds=7)
    assert list(more.runs["seed"]) == list(range(7))
    assert list(tuned(folder, idle, seeds=2).runs["seed"]) == [0, 1]
    tune_control(
        RunContext(given()), folder, "sp", 16, executor=Planted(landscape), trials=2, seeds=1
    )  # another width, another study
    after = contents(folder.path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before} == {"control-sp-64", "control-sp-16"}


def test_another_best_recipe_is_trained_over_all_seeds(folder: RunFolder) -> None:
    tuned(folder.make(), trials=2)
    again = Counting(Planted(landscape))
    control = tuned(folder, again)
    assert [job.seed for job in again.jobs][-5:] == [0, 1, 2, 3, 4]
    assert len({job.recipe for job in again.jobs[-5:]} | {control.recipe}) == 1


def test_commands_of_a_trainer_have_their_files_with_the_control(folder: RunFolder) -> None:
    (script := folder.path.parent / "train.sh").write_text("echo '{\"loss\": 1.5}'")
    tuned_by = given(trainer={"command": f"sh {script} {{plan}}"}, search={"lr": SEARCH["lr"]}, trials=2)
    tune(tuned_by, folder, executor=Commands(folder.path))
    before = contents(folder.path)
    tune_control(RunContext(tuned_by), folder, "sp", WIDE, executor=Commands(folder.path), trials=2, seeds=1)
    after = contents(folder.path)
    assert {name: after[name] for name in before} == before
    assert (control_folder(folder, "sp", WIDE).path / "trials" / "seed_0" / "recipe.json").is_file()


def frame_of(losses: dict[tuple[str, float], list[float]], width: int = WIDE) -> pd.DataFrame:
    """Runs at one width: (parametrization, log2_lr) → a loss per seed, infinite where it diverged."""
    return pd.DataFrame(
        [
            {
                "parametrization": name, "width": width, "depth": 2, "seed": seed, "log2_lr": x, "flops": 1.0, "seconds": 1.0,
                "loss": loss if math.isfinite(loss) else math.nan, "diverged": not math.isfinite(loss),
            }
            for (name, x), given in losses.items()
            for seed, loss in enumerate(given)
        ]
    )  # fmt: skip


RECIPE = Recipe(lr=2**-6)
OURS = {("mup", -7.0): [2.3, 2.4, 2.5], ("mup", -6.0): [2.0, 2.1, 2.2], ("sp", -6.0): [9.0, math.inf, 9.0]}


def test_a_difference_is_paired_and_has_the_pairs_interval() -> None:
    rows = comparison(frame_of({**OURS, ("sp", -9.0): [2.11, 2.2, 2.29]}), ["mup", "sp"], RECIPE, PROXY, None)
    assert rows[3]["difference"] == pytest.approx(0.1)
    half = 4.3027 * 0.01 / math.sqrt(3)  # Student's t with 2 degrees of freedom
    assert rows[3]["difference_low"] == pytest.approx(0.1 - half, abs=1e-5)
    assert rows[3]["difference_high"] == pytest.approx(0.1 + half, abs=1e-5)
    assert math.isnan(rows[2]["loss"])  # one of its seeds diverged
    assert math.isnan(rows[2]["difference"])
    said = conclusion(rows, ["mup", "sp"], 6, None, 1.0)
    assert said == (
        "SP, learning rate alone tuned at width 64, other values as µP's: 2.2000 [1.9764, 2.4236]; µP, recipe from width 8 "
        "(6 trials there): 2.1000 [1.8516, 2.3484]. SP is 0.1000 [0.0752, 0.1248] higher (4.8%), paired over 3 seeds. This SP "
        "keeps the other values that were tuned for µP, which need not be its own best ones."
    )


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([1.9, 2.0, 2.1], "SP is 0.1000 [0.1000, 0.1000] lower (4.8%), paired over 3 seeds."),
        (
            [2.1, 2.0, 2.3],
            "SP is 0.0333 [-0.2535, 0.3202] higher (1.6%), paired over 3 seeds, which does not tell which of them is better.",
        ),
        ([math.inf] * 3, "SP, tuned at width 64 over lr with 5 trials: diverged; µP, recipe from width 8"),
    ],
)
def test_the_conclusion_says_who_is_lower_and_whether_that_is_known(theirs: list[float], said: str) -> None:
    runs = frame_of({("sp", -9.0): theirs})
    control = Control(
        "sp",
        WIDE,
        5,
        ("lr",),
        RECIPE.with_(lr=2**-9),
        {"lr": 2**-9},
        runs,
        4.0,
        ("lr 0.002 at the low end of its range",),
    )
    rows = comparison(frame_of({**OURS, ("sp", -8.0): [math.inf] * 3}), ["mup", "sp"], RECIPE, PROXY, control)
    whole = conclusion(rows, ["mup", "sp"], 6, control, 2.0)
    assert said in whole
    assert whole.endswith(
        "cost 4.00e+00 FLOPs, 2 times the proxy's. SP may do better still: lr 0.002 at the low end of its range."
    )


def test_a_control_that_is_better_with_our_values_is_compared_with_them() -> None:
    runs = frame_of({("sp", -9.0): [2.4, 2.4, 2.4]})
    control = Control("sp", WIDE, 5, ("lr",), RECIPE, {"lr": 2**-6}, runs, None)
    rows = comparison(frame_of({**OURS, ("sp", -8.0): [2.2, 2.2, 2.2]}), ["mup", "sp"], RECIPE, PROXY, control)
    assert conclusion(rows, ["mup", "sp"], 6, control, None).startswith(
        "SP, learning rate alone tuned at width 64, other values as µP's: 2.2000"
    )


def test_one_seed_makes_no_interval_and_a_negative_loss_no_share() -> None:
    frame = frame_of({("mup", -6.0): [-2.0], ("sp", -6.0): [-1.5]})
    rows = comparison(frame, ["mup", "sp"], RECIPE, PROXY, None)
    assert all(math.isnan(row["low"]) for row in rows)
    said = conclusion(rows, ["mup", "sp"], 1, None, None)
    assert "(1 trial there): -2.0000. SP is 0.5000 higher, paired over 1 seed, which does not tell" in said
