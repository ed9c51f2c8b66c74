"""Real commands: heard, pruned, late, tried again, and ended with everything that they started."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mutransfer.errors import RequestError
from mutransfer.frames import TRIALS
from mutransfer.recipe import Recipe
from mutransfer.runs import RunFolder
from mutransfer.sweeps.commands import Commands
from mutransfer.sweeps.executors import executor_for
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job
from mutransfer.sweeps.told import Told, told
from mutransfer.sweeps.tuning import Tuned, tune
from mutransfer.sweeps.verifying import basins

from .small import contents, each, experiment, journal, within

MODEL = """
import torch
from torch import nn

batch = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)

def build(width, depth):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 5))
"""

# What every script begins with: its files, and `tell`.
HEAD = """
import json, math, os, signal, subprocess, sys, time
recipe, plan, seed, out = json.load(open(sys.argv[1])), json.load(open(sys.argv[2])), int(sys.argv[3]), sys.argv[4]
lr = math.log2(recipe["lr"])
loss = 1 + (lr + 5) ** 2
tell = lambda **told: print(json.dumps(told), flush=True)
sleep = lambda: time.sleep(300)
"""
BOWL = """
for step in range(1, 9):
    tell(step=step, loss=loss)
"""


@pytest.fixture(autouse=True)
def _shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODEL)
    with within(60):
        yield
    until(lambda: ours(tmp_path) == [])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def ours(path: Path) -> list[psutil.Process]:
    """Living processes whose command names something in ``path``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line, status = process.info["cmdline"] or [], process.info["status"]
        if status != psutil.STATUS_ZOMBIE and any(str(path) in word for word in line) and process.pid != os.getpid():
            found.append(process)
    return found


def until(condition: Any, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.01)
    return found


def own(body: str, trainer: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    """An experiment that the script ``body`` trains."""
    script = Path("own.py").resolve()
    script.write_text(HEAD + body)
    command = f"{shlex.quote(sys.executable)} -S {script} {{recipe}} {{plan}} {{seed}} {{out}}"
    settings = {"command": command, "grace": 5, **(trainer or {})}
    return experiment(**{"model": "models.py:build", "data": "none", "trainer": settings, **changes})


def refusal(given: Experiment, folder: RunFolder) -> str:
    with pytest.raises(RequestError) as caught:
        tune(given, folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def states(found: Tuned) -> list[str]:
    return found.trials["state"].tolist()


def run_one(given: Experiment, folder: RunFolder, report: Any = None, rungs: tuple[int, ...] = (3, 5)) -> Any:
    job = Job(7, given.proxy_scale, "mup", given.recipe, 3, rungs)
    ((_, outcome),) = Commands(folder.make().path).run(given, [job], report and each(report))
    return outcome


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
        ('{"step": 100, "loss": 2.3}', Told(100, 2.3, False)),
        (' {"step": 1e2, "loss": 2, "lr": 0.1, "final": true}\r', Told(100, 2.0, True)),
        ('{"loss": 2.3}', Told(None, 2.3, False)),
        ('{"step": 1, "loss": Infinity}', Told(1, float("inf"), False)),
        ('{"step": 1, "loss": 2.3', None),
        ('{"step": NaN, "loss": 2.3}', None),
        ('{"step": 1, "loss": 2.3, "final": "yes"}', None),
        ("loss 2.3", None),
        ("", None),
    ],
)
def test_a_line_tells(line: str, expected: Told | None) -> None:
    assert told(line.encode()) == expected


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


# Notes that it was asked to end, and takes its time.
POLITE = """
def end(*_):
    open(out + "/asked", "w").write("SIGTERM")
    tell(step=9, loss=0.0, final=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
"""


def test_a_pruned_command_is_asked_to_end(folder: RunFolder) -> None:
    given = own(POLITE + "tell(step=3, loss=4.0)\nsleep()")
    outcome = run_one(given, folder, lambda job, step, loss: True)
    assert (outcome.stopped, outcome.loss, outcome.steps, outcome.failed) == (True, 4.0, 3, None)
    assert (folder.path / "trials" / "7" / "out" / "asked").read_text() == "SIGTERM"


def test_a_sweep_prunes_commands_side_by_side(folder: RunFolder) -> None:
    given = own(BOWL.replace("tell", "time.sleep(0.02); tell"), pruner="median", sampler="random", trials=15)
    with executor_for(given, "processes", 3, folder=folder.path) as executor:
        assert executor.capacity == 3
        found = tune(given, folder, executor=executor)
    assert len(found.trials) == 15
    assert 1 <= states(found).count("PRUNED") < 15
    assert set(states(found)) == {"COMPLETE", "PRUNED"}


# A child in the group, one in a session of its own, and one whose parent is gone; all deaf to SIGTERM.
FAMILY = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ignoring = "import time, signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
deaf = [sys.executable, "-S", "-c", ignoring, out]
first = subprocess.Popen(deaf, stdout=subprocess.PIPE)
second = subprocess.Popen(deaf, stdout=subprocess.PIPE, start_new_session=True)
between = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
third = subprocess.Popen([sys.executable, "-S", "-c", between, *deaf], stdout=subprocess.PIPE)
for each in (first, second, third):
    each.stdout.readline()
third.wait()
"""


def test_what_is_deaf_is_killed_with_all_it_has_started(folder: RunFolder, tmp_path: Path) -> None:
    given = own(FAMILY + "tell(step=3, loss=4.0)\nsleep()", {"grace": 0.3})
    seen: list[int] = []

    def report(job: Job, step: int, loss: float) -> bool:
        seen.append(len(ours(tmp_path)))
        return True

    begun = time.monotonic()
    assert run_one(given, folder, report).stopped
    assert seen == [5]  # the warden, the command and its three
    assert ours(tmp_path) == []
    assert time.monotonic() - begun < 20


def test_what_a_command_leaves_behind_is_ended(folder: RunFolder, tmp_path: Path) -> None:
    """It holds the command's stdout, and would be waited for as long as it lives."""
    body = "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(300)', out])\ntell(step=8, loss=4.0)"
    begun = time.monotonic()
    assert run_one(own(body), folder).loss == 4.0
    assert ours(tmp_path) == []
    assert time.monotonic() - begun < 20


def test_a_command_that_is_late_is_ended_and_not_tried_again(folder: RunFolder) -> None:
    body = "open('tries', 'a').write('x')\nprint('still\\nwaiting', file=sys.stderr)\ntell(step=1, loss=4.0)\nsleep()"
    outcome = run_one(own(body, {"timeout": 1, "retries": 3}), folder)
    home = folder.path / "trials" / "7"
    assert outcome.failed == f"the trainer's command took longer than 1 s (saying 'still / waiting'; see {home})"
    assert Path("tries").read_text() == "x"


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
        ("os.kill(os.getpid(), 11)", ["was killed by SIGSEGV"]),
        ("print('bye', file=sys.stderr)", ["ended without a loss (saying 'bye'", '{"step": 100, "loss": 2.3}']),
        ("sys.stdout.close()\nos.close(1)\ntime.sleep(0.3)", ["ended without a loss (see"]),
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


def test_patience_is_no_other_study(folder: RunFolder) -> None:
    tune(own(BOWL, {"timeout": 50}, trials=1), folder)
    assert len(tune(own(BOWL, {"timeout": 60, "retries": 2}, trials=2), folder).trials) == 2


def test_a_program_that_is_not_there_is_said_before_anything_is_written(folder: RunFolder) -> None:
    before = contents(folder.path.parent)
    given = experiment(model="models.py:build", data="none", trainer={"command": "torchrnu train.py {plan}"})
    assert "'torchrnu', which is no program here" in refusal(given, folder)
    assert {name for name in contents(folder.path.parent) if "__pycache__" not in name} == set(before)
    Path("train.py").touch()
    given = experiment(model="models.py:build", data="none", trainer={"command": "./train.py {plan}"})
    assert "'./train.py', which is no program here" in refusal(given, folder)


def test_widths_are_compared_with_a_command(folder: RunFolder) -> None:
    body = "tell(step=8, loss=1 + (lr + 5) ** 2 + plan['scale']['width'] / 1000 + seed)"
    given = own(body)
    frame = basins(given, given.recipe, [8, 16], folder=folder.make(), executor=Commands(folder.path, 2), seeds=2)
    first = frame[frame["log2_lr"] == -5]
    assert sorted(first["loss"]) == pytest.approx([1.008, 1.016, 2.008, 2.016])
    assert (folder.path / "trials" / "mup_16_1_1" / "plan.json").is_file()


def test_an_error_ends_the_commands_at_work(folder: RunFolder, tmp_path: Path) -> None:
    given = own("tell(step=3, loss=2.0)\nsleep()")
    jobs = [Job(k, given.proxy_scale, "mup", given.recipe, 0, (3,)) for k in range(2)]

    def report(job: Job, step: int, loss: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Commands(folder.make().path, 2).run(given, jobs, each(report)))
    assert ours(tmp_path) == []


COMMANDS = [sys.executable, "-c", "from mutransfer.cli import main; main()", "tune", "experiment.yaml", "--out", "run"]


@pytest.mark.parametrize("how", ["once", "twice", "killed"])
def test_tune_takes_its_commands_along(how: str, folder: RunFolder, tmp_path: Path) -> None:
    """As typed, and stopped by Ctrl-C (which only tune hears), by two of them, or by SIGKILL."""
    given = own(
        POLITE + FAMILY.replace("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n", "") + "sleep()", {"grace": 1}
    )
    given.save(tmp_path / "experiment.yaml")
    command = [*COMMANDS, "--executor", "processes", "--at-once", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as tuning:
        try:
            until(lambda: len(ours(tmp_path)) == 10)
            if how == "killed":
                tuning.kill()
            else:
                os.killpg(tuning.pid, signal.SIGINT)
                if how == "twice":
                    time.sleep(0.1)
                    os.killpg(tuning.pid, signal.SIGINT)
            _, err = tuning.communicate(timeout=30)
        finally:
            tuning.kill()
    if how == "killed":
        assert tuning.returncode == -signal.SIGKILL
    else:
        assert tuning.returncode == 130, err
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "mutransfer: interrupted; run the same command again to go on."
    until(lambda: ours(tmp_path) == [], 20)
    asked = list(tmp_path.glob("run/trials/*/out/asked"))
    assert len(asked) == 2

    own(BOWL)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] == 4
    trials = TRIALS.read(folder.trials)
    assert sorted(set(trials["state"])) == ["COMPLETE", "FAIL"]
    assert set(trials[trials["state"] == "FAIL"]["lr"]) <= set(trials[trials["state"] == "COMPLETE"]["lr"])


def test_commands_side_by_side_have_slots_and_share_the_cores(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = own(
        "print('slot', sys.argv[5], os.environ['OMP_NUM_THREADS'])\n" + BOWL,
        {"command": f"{shlex.quote(sys.executable)} -S own.py {{recipe}} {{plan}} {{seed}} {{out}} {{slot}}"},
    )
    with executor_for(given, "processes", 2, folder=folder.path) as executor:
        tune(given, folder, executor=executor)
    logs = [(folder.path / "trials" / str(k) / "stdout.log").read_text() for k in range(4)]
    assert {re.fullmatch(r"slot ([01]) [1-9]\d*\n", log)[1] for log in logs} == {"0", "1"}  # type: ignore[index]
