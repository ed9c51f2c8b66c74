"""Ctrl-C, and worse, at any moment: the command ends with 130, and the same command goes on to exactly what was asked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mutransfer.recipe import Recipe
from mutransfer.schemas import BASINS, TRIALS

from ..helpers.processes import Ended, Processes, Started, contents, group_of, until
from ..helpers.sets import extended_but

TOTAL = 8
# About 0.15 s a trial, so that a signal finds one at work.
TUNE = ("tune", "experiment.yaml", "--out", "new", "--set", "steps=120", "--trials", str(TOTAL))
INTERRUPTED = "mutransfer: interrupted; run the same command again to continue."


def rows(path: Path) -> int:
    """Lines below the heading; the file is replaced whole, never half-written."""
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def assert_interrupted(ended: Ended, started: Started) -> None:
    assert ended.code == 130, ended
    assert ended.out == ""
    assert ended.err.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in ended.err
    until(lambda: not group_of(started.pid), 10)


def assert_stopped(stop: Any, ended: Ended, started: Started) -> None:
    """Interrupted or killed, as ``stop`` did; nothing that was started goes on."""
    if stop is Started.interrupt:
        assert_interrupted(ended, started)
    else:
        assert ended.code == -signal.SIGKILL
        until(lambda: not group_of(started.pid), 10)


def assert_complete(ended: Ended, run: Path) -> pd.DataFrame:
    assert ended.code == 0, ended.err
    told, trials = ended.json, TRIALS.read(run / "trials.csv")
    assert told["finished"] == TOTAL
    assert (trials["state"] == "COMPLETE").sum() + (trials["state"] == "PRUNED").sum() == TOTAL
    assert set(trials["state"]) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert trials["number"].tolist() == list(range(len(trials)))
    # What was lost is done again: every failed trial's learning rate is among those that finished.
    lost, done = trials[trials["state"] == "FAIL"], trials[trials["state"] != "FAIL"]
    assert set(lost["lr"].dropna()) <= set(done["lr"])
    assert told["default"]["value"] is not None
    assert Recipe.load(run / "best.json").lr == told["best"]["params"]["lr"]
    # A write that is killed may leave its temporary file, whose name begins with a dot.
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "experiment.yaml", "study.journal", "trials.csv", "best.json", "environment.json",
    }  # fmt: skip
    return trials


@pytest.mark.parametrize("finished", extended_but([0, 1, 3, TOTAL - 1], 1))
def test_tuning_is_interrupted_and_goes_on(finished: int, shop: Path, commands: Processes) -> None:
    run = shop / "new"
    started = commands.start(*TUNE, cwd=shop)
    until(lambda: run.joinpath("study.journal").exists() and rows(run / "trials.csv") >= finished)
    started.interrupt()
    assert_interrupted(started.wait(), started)
    before = TRIALS.read(run / "trials.csv") if finished else None

    trials = assert_complete(commands.run(*TUNE, "--json", cwd=shop), run)
    if before is not None:
        pd.testing.assert_frame_equal(trials[: len(before)][before.columns], before)
    after = contents(run)
    assert commands.run(*TUNE, "--json", cwd=shop).json["finished"] == TOTAL
    assert contents(run)["trials.csv"] == after["trials.csv"]


@pytest.mark.extended
@pytest.mark.parametrize("stop", [Started.interrupt, Started.kill], ids=["interrupt", "kill"])
def test_tuning_in_processes_is_stopped_and_goes_on(stop: Any, shop: Path, commands: Processes) -> None:
    """The processes end with the command, and what they were at is done again."""
    run, beside = shop / "new", (*TUNE, "--executor", "processes", "--at-once", "2")
    started = commands.start(*beside, cwd=shop)
    until(lambda: rows(run / "trials.csv") >= 2)
    assert len(group_of(started.pid)) > 2
    stop(started)
    ended = started.wait()
    assert_stopped(stop, ended, started)
    assert_complete(commands.run(*beside, "--json", cwd=shop), run)


@pytest.mark.parametrize(
    "stop",
    [Started.interrupt, pytest.param(Started.kill, marks=pytest.mark.extended)],
    ids=["interrupt", "kill"],
)
def test_tuning_survives_five_of_them_in_a_row(stop: Any, shop: Path, commands: Processes) -> None:
    """Each comes a little later after the study is opened: while asking, training, telling, writing."""
    run, stopped = shop / "new", 0
    for delay in (0.0, 0.03, 0.08, 0.13, 0.21):
        started = commands.start(*TUNE, cwd=shop)
        size = until(lambda: run.joinpath("study.journal").exists()) and run.joinpath("study.journal").stat().st_size
        grown = lambda size=size: run.joinpath("study.journal").stat().st_size > size  # noqa: E731
        until(grown)
        time.sleep(delay)
        stop(started)
        ended = started.wait()
        stopped += 1
        assert_stopped(stop, ended, started)
    assert stopped == 5
    begun = time.monotonic()
    assert_complete(commands.run(*TUNE, "--json", cwd=shop), run)
    assert time.monotonic() - begun < 30  # no lock is waited for


@pytest.mark.parametrize("between", extended_but([0.0, 0.002, 0.01, 0.03], 0.01))
def test_a_second_interrupt_while_the_first_is_answered(between: float, shop: Path, commands: Processes) -> None:
    """People press it twice: in the trial, and again while its parameters are being given back."""
    run = shop / "new"
    started = commands.start(*TUNE, cwd=shop)
    until(lambda: rows(run / "trials.csv") >= 2)
    before = TRIALS.read(run / "trials.csv")
    started.interrupt()
    time.sleep(between)
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        started.interrupt()
    assert_interrupted(started.wait(), started)
    trials = assert_complete(commands.run(*TUNE, "--json", cwd=shop), run)
    pd.testing.assert_frame_equal(trials[: len(before)][before.columns], before)


def imported(pid: int, library: str) -> bool:
    maps = Path(f"/proc/{pid}/maps")
    return library in maps.read_text() if maps.exists() else False


@pytest.mark.parametrize(
    "moment",
    extended_but(
        ["the interpreter is up", "torch is being imported", "the study is being made"], "torch is being imported"
    ),
)
def test_a_command_is_interrupted_at_once(moment: str, shop: Path) -> None:
    """Not forked from a process that has imported everything: as typed."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from mutransfer.cli import main; print('up', flush=True); main()", *TUNE],
        cwd=shop, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    if moment == "torch is being imported":
        until(lambda: imported(process.pid, "libtorch"))
    elif moment == "the study is being made":
        until((shop / "new").exists)
    else:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == INTERRUPTED
    if moment != "the study is being made":
        assert not (shop / "new").exists()


IMPORTING = """
import os, signal, sys
from mutransfer.cli import main

class CtrlC:
    def find_spec(self, name, *_):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)

assert sys.argv[-1] not in sys.modules
sys.meta_path.insert(0, CtrlC())
main(["plan", "mlp", "--width", "16"])
"""


@pytest.mark.parametrize(
    "module",
    extended_but(["mutransfer.printing", "tempfile", "mutransfer.errors", "typer", "mutransfer.cli.app"], "typer"),
)
def test_a_command_is_interrupted_in_any_of_its_first_imports(module: str) -> None:
    ended = subprocess.run([sys.executable, "-c", IMPORTING, module], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.splitlines() == [INTERRUPTED]


# At least 20 runs of 0.15 s.
VERIFY = ("verify", "slow", "--widths", "8,16", "--seeds", "2")
PROCESSES = ("--executor", "processes")


@pytest.fixture
def slow(shop: Path, commands: Processes) -> Path:
    ended = commands.run("tune", "experiment.yaml", "--out", "slow", "--set", "steps=120", "--trials", "1", cwd=shop)
    assert ended.code == 0, ended.err
    return shop / "slow"


@pytest.mark.extended
@pytest.mark.parametrize("executor", [PROCESSES, ("--executor", "fused", "--at-once", "4")], ids=["processes", "fused"])
def test_verifying_is_interrupted_killed_and_goes_on(
    executor: tuple[str, ...], slow: Path, shop: Path, commands: Processes
) -> None:
    basins, verify = slow / "basins.csv", (*VERIFY, *executor)
    started = commands.start(*verify, cwd=shop)
    until(lambda: rows(basins) >= 3)
    assert (len(group_of(started.pid)) > 1) == (executor == PROCESSES)  # the command and its workers
    started.interrupt()
    assert_interrupted(started.wait(), started)
    first = BASINS.read(basins)
    assert len(first) >= 3

    killed = commands.start(*verify, cwd=shop)
    until(lambda: rows(basins) > len(first))
    killed.kill()
    assert killed.wait().code == -signal.SIGKILL
    until(lambda: not group_of(killed.pid), 10)
    second = BASINS.read(basins)
    pd.testing.assert_frame_equal(second[: len(first)], first)

    resumed = commands.run(*verify, "--json", cwd=shop)
    assert resumed.code in (0, 1), resumed.err
    whole = BASINS.read(basins)
    pd.testing.assert_frame_equal(whole[: len(second)], second)
    assert not whole.duplicated(["parametrization", "width", "seed", "log2_lr"]).any()
    assert set(resumed.json["drift_octaves"]) == {"mup"}


def deaf(pid: int) -> bool:
    """Whether a process blocks or ignores Ctrl-C."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return any(int(status[kind], 16) >> (signal.SIGINT - 1) & 1 for kind in ("SigBlk", "SigIgn"))


def test_verifying_is_interrupted_while_its_processes_start(slow: Path, shop: Path, commands: Processes) -> None:
    """They hear the same Ctrl-C from their first moment on, and must not each print a traceback of their own."""

    def workers() -> list[int]:
        group = [pid for pid in group_of(started.pid) if pid != started.pid]
        return [pid for pid in group if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    started = commands.start(*VERIFY, *PROCESSES, cwd=shop)
    assert all(deaf(pid) for pid in until(workers))
    started.interrupt()
    assert_interrupted(started.wait(), started)
    assert not (slow / "verify.json").exists()


@pytest.mark.parametrize(
    "stop",
    [pytest.param(Started.interrupt, marks=pytest.mark.extended), Started.kill],
    ids=["interrupt", "kill"],
)
def test_training_is_stopped_and_ends_with_the_same_loss(stop: Any, shop: Path, commands: Processes) -> None:
    made = commands.run("transfer", "run", "--width", "16", "--tokens", str(600 * 16), cwd=shop)
    assert made.code == 0
    whole = commands.run("train", "run/target.json", "--out", "whole", "--json", cwd=shop).json

    train = ("train", "run/target.json", "--out", "parts", "--checkpoint-every", "20")
    for _ in range(2):
        checkpoint = shop / "parts" / "checkpoint.pt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        started = commands.start(*train, cwd=shop)
        until(lambda before=before, file=checkpoint: file.exists() and file.stat().st_mtime_ns > before)
        stop(started)
        ended = started.wait()
        assert_stopped(stop, ended, started)
    parts = commands.run(*train, "--json", cwd=shop).json
    assert parts["loss"] == whole["loss"]
    assert parts["steps"] == whole["steps"] == 600
    assert [path.name for path in (shop / "parts").iterdir()] == ["checkpoint.pt"]
