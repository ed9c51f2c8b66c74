"""Commands that are pruned, late, deaf or interrupted: ended with everything that they started."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS
from mutransfer.sweeps.commands import Commands
from mutransfer.sweeps.executors import executor_for
from mutransfer.sweeps.jobs import Job, RunContext, run_jobs
from mutransfer.sweeps.tune import tune

from ..helpers.scripts import BOWL, ours, own, run_one, states, until
from ..helpers.small import each

pytestmark = pytest.mark.usefixtures("command_shop")


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


def test_an_error_ends_the_commands_at_work(folder: RunFolder, tmp_path: Path) -> None:
    given = own("tell(step=3, loss=2.0)\nsleep()")
    jobs = [Job(k, given.proxy_scale, "mup", given.recipe, 0, (3,)) for k in range(2)]

    def report(job: Job, step: int, loss: float) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_jobs(Commands(folder.make().path, 2), RunContext(given), jobs, each(report)))
    assert ours(tmp_path) == []


COMMANDS = [sys.executable, "-c", "from mutransfer.cli import main; main()", "tune", "experiment.yaml", "--out", "run"]


@pytest.mark.extended
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
        assert err.splitlines()[-1] == "mutransfer: interrupted; run the same command again to continue."
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
