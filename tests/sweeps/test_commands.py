"""Real commands: what they are given, what is heard of them, and what is said when they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mutransfer.recipe import Recipe
from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.commands import Commands, ParsedReport, parse_report
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.tune import tune
from mutransfer.sweeps.verify import basins

from ..helpers.scripts import BOWL, own, run_one, states
from ..helpers.small import contents, experiment, journal
from ..helpers.tuned import refusal

pytestmark = pytest.mark.usefixtures("command_shop")


def test_a_command_has_the_trials_settings_and_tells_its_losses(folder: RunFolder) -> None:
    given = own(
        BOWL + "print('hello'); print('careful', file=sys.stderr); open(out + '/mark', 'w').write(str(seed))", seed=5
    )
    found = tune(given, folder)
    assert states(found) == ["COMPLETE"] * 4
    assert found.default == 2.0
    assert found.trials["flops"].isna().all()
    assert [list(trial.intermediate_values) for trial in journal(folder).trials] == [[3, 5]] * 4
    for trial in journal(folder).trials:
        home = folder.path / "trials" / str(trial.number)
        assert Recipe.load(home / "recipe.json") == given.recipe.with_(lr=trial.params["lr"])
        plan = json.loads((home / "plan.json").read_text())
        assert plan["format"] == "mutransfer-pytorch/1"
        assert (plan["steps"], plan["seed"], plan["batch_size"], plan["scale"]["width"]) == (8, 5, 16, 8)
        assert {rule["lr"] for rule in plan["parameters"]} == {trial.params["lr"]}  # the proxy is the base here
        assert (home / "stdout.log").read_text() == "hello\n"
        assert (home / "stderr.log").read_text() == "careful\n"
        assert (home / "out" / "mark").read_text() == "5"


def test_what_stdout_holds_besides_is_kept_and_harmless(folder: RunFolder) -> None:
    noise = r"""
sys.stdout.buffer.write(b"\xff\xfe\x00 binary\n{\n{}\n[1, 2]\n" + b'{"loss": "low"}\n{"loss": true}\n{"loss": [1]}\n')
sys.stdout.buffer.write(b'{"step": -1, "loss": 1.5}\n{"step": 1.5, "loss": 0.1}\n{"step": "x", "loss": 0.1}\n{"epoch": 3}\n')
sys.stdout.buffer.write(b"x" * 3_000_000 + b"\n" + b"[" * 100_000 + b"\n" + b"{\"a\":" * 100_000 + b"\n")
sys.stdout.flush()
tell(step=8, loss=2.5)
sys.stdout.write("no line break at the end")
"""
    outcome = run_one(own(noise), folder)
    assert outcome.loss == 2.5
    log = (folder.path / "trials" / "7" / "stdout.log").read_bytes()
    assert len(log) > 3_600_000
    assert b"\xff\xfe\x00 binary\n{\n{}\n[1, 2]\n" in log
    assert log.endswith(b"no line break at the end\n")
    assert b"2.5" not in log


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"step": 100, "loss": 2.3}', ParsedReport(100, 2.3, False)),
        (' {"step": 1e2, "loss": 2, "lr": 0.1, "final": true}\r', ParsedReport(100, 2.0, True)),
        ('{"loss": 2.3}', ParsedReport(None, 2.3, False)),
        ('{"step": 1, "loss": Infinity}', ParsedReport(1, float("inf"), False)),
        ('{"step": 1, "loss": 2.3', None),
        ('{"step": NaN, "loss": 2.3}', None),
        ('{"step": 1, "loss": 2.3, "final": "yes"}', None),
        ("loss 2.3", None),
        ("", None),
    ],
)
def test_a_line_tells(line: str, expected: ParsedReport | None) -> None:
    assert parse_report(line.encode()) == expected


@pytest.mark.parametrize(
    ("body", "loss"),
    [
        ("tell(step=1, loss=3.0)\ntell(loss=2.5)", 2.5),
        ("tell(step=1, loss=3.0)\ntell(loss=2.5, final=True)\ntell(step=9, loss=9.0)", 2.5),
        # Its answer is known: that it then fell over while cleaning up is no reason to train again.
        ("tell(step=8, loss=2.5, final=True)\nos.abort()", 2.5),
        ("tell(step=8, loss=2.5, final=True)\nsleep()", 2.5),
    ],
)
def test_the_final_loss_is_the_last_or_the_one_called_so(body: str, loss: float, folder: RunFolder) -> None:
    outcome = run_one(own(body, {"timeout": 2, "grace": 0}), folder)
    assert (outcome.loss, outcome.failed, outcome.stopped, outcome.steps) == (loss, None, False, 8)


@pytest.mark.parametrize("loss", ["NaN", "null", "Infinity"])
def test_a_loss_that_is_no_number_has_diverged_and_ends_the_command(loss: str, folder: RunFolder) -> None:
    outcome = run_one(
        own(f'tell(step=0, loss=2.0)\nprint(\'{{"step": 3, "loss": {loss}}}\', flush=True)\nsleep()'), folder
    )
    assert outcome.diverged
    assert outcome.start == 2.0
    assert outcome.failed is None


def test_a_command_is_tried_again_and_finds_what_it_left(folder: RunFolder) -> None:
    body = """
tries = len(os.listdir(out))
open(f"{out}/{tries}", "w").close()
tell(step=3, loss=9.0 - tries)
if tries < 2:
    sys.exit(f"network is down, {tries}")
tell(step=8, loss=2.0)
"""
    asked: list[tuple[int, float]] = []
    report = lambda job, step, loss: asked.append((step, loss))  # noqa: E731
    given = own(body, {"retries": 2})
    outcome = run_one(given, folder, report)
    assert (outcome.loss, outcome.failed) == (2.0, None)
    assert asked == [(3, 9.0), (5, 2.0)]
    # Another job of that name begins with an empty folder.
    (folder.path / "trials" / "7" / "out" / "3").touch()
    assert run_one(given, folder).loss == 2.0

    fewer = run_one(own(body, {"retries": 1}), folder)
    home = folder.path / "trials" / "7"
    assert fewer.failed == (
        f"the trainer's command ended with code 1 in each of 2 tries (saying 'network is down, 1'; see {home})"
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "raise ValueError('no such dataset')",
            [
                "trial 0 failed because the trainer's command ended with code 1",
                "ValueError: no such dataset",
                "/trials/0",
            ],
        ),
        ("os.kill(os.getpid(), 9)", ["was killed by SIGKILL (often: the machine is out of memory)"]),
        pytest.param("os.kill(os.getpid(), 11)", ["was killed by SIGSEGV"], marks=pytest.mark.extended),
        ("print('bye', file=sys.stderr)", ["ended without a loss (saying 'bye'", '{"step": 100, "loss": 2.3}']),
        pytest.param(
            "sys.stdout.close()\nos.close(1)\ntime.sleep(0.3)",
            ["ended without a loss (see"],
            marks=pytest.mark.extended,
        ),
    ],
)
def test_a_command_that_never_works_ends_the_sweep_in_a_sentence(body: str, said: list[str], folder: RunFolder) -> None:
    given = own(body)
    sentence = refusal(given, folder)
    assert all(part in sentence for part in said), sentence
    assert [trial.state.name for trial in journal(folder).trials] == ["FAIL", "WAITING"]
    own(BOWL)  # mended: the same command does what was not done, the recipe to beat first
    assert tune(given, folder).default == 2.0


def test_a_failing_trial_is_replaced_and_named(folder: RunFolder) -> None:
    given = own("if lr > -6: sys.exit('out of memory')\n" + BOWL, trials=6, sampler="random",
                search={"lr": {"low": 2**-9, "high": 2**-5.5, "log": True}})  # fmt: skip
    found = tune(given, folder)
    assert states(found).count("COMPLETE") == 6
    assert states(found).count("FAIL") >= 1
    assert any("saying 'out of memory'" in warning for warning in found.warnings)


@pytest.mark.extended
def test_patience_is_no_other_study(folder: RunFolder) -> None:
    tune(own(BOWL, {"timeout": 50}, trials=1), folder)
    assert len(tune(own(BOWL, {"timeout": 60, "retries": 2}, trials=2), folder).trials) == 2


def test_a_program_that_is_not_there_is_said_before_anything_is_written(folder: RunFolder) -> None:
    before = contents(folder.path.parent)
    given = experiment(model="models.py:build", data="none", trainer={"command": "torchrnu train.py {plan}"})
    assert "'torchrnu', which was not found" in refusal(given, folder)
    assert {name for name in contents(folder.path.parent) if "__pycache__" not in name} == set(before)
    Path("train.py").touch()
    given = experiment(model="models.py:build", data="none", trainer={"command": "./train.py {plan}"})
    assert "'./train.py', which was not found" in refusal(given, folder)


@pytest.mark.extended
def test_widths_are_compared_with_a_command(folder: RunFolder) -> None:
    body = "tell(step=8, loss=1 + (lr + 5) ** 2 + plan['scale']['width'] / 1000 + seed)"
    given = own(body)
    frame = basins(
        RunContext(given), given.recipe, [8, 16], folder=folder.make(), executor=Commands(folder.path, 2), seeds=2
    )
    first = frame[frame["log2_lr"] == -5]
    assert sorted(first["loss"]) == pytest.approx([1.008, 1.016, 2.008, 2.016])
    assert (folder.path / "trials" / "mup_16_1_1" / "plan.json").is_file()
