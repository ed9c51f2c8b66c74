"""What a sweep loses when it is killed: SIGKILLs at random moments of real `mutransfer tune` processes, one alone and several."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from harness import Claim, arguments, publish
from optuna.storages import JournalStorage

from mutransfer.cli import run
from mutransfer.sweeps import storage
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import RunContext
from mutransfer.sweeps.storage import Journal

PER_KILL = 5  # trials of the whole sweep; a life is killed after three on average
LIFE = 0.4  # seconds; a trial takes about a tenth
LEASE = 5
# By TPE trials differ in their parameters, by which one that is done twice is told.
EXPERIMENT: dict[str, Any] = {
    "sampler": "tpe",
    "model": "mlp", "data": "digits", "proxy": {"width": 8, "depth": 2}, "steps": 40, "batch_size": 16, "rungs": 3,
    "recipe": {"lr": 2**-6, "warmup": 0.0}, "search": {"lr": {"low": 2**-9, "high": 2**-3, "log": True}},
}  # fmt: skip
Finished = dict[int, tuple[Any, ...]]


def begin(command: list[str], slow_writes: bool) -> int:
    """Start the command in a process of its own, forked from this one, which has imported everything; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if slow_writes:
            storage.os = Slow()  # type: ignore[assignment]
        code = run(command)
    finally:
        os._exit(code)


class Slow:
    """`os`, but that a line is written in pieces: the kernel takes it at once, and a kill would never fall inside."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, file: int, line: bytes) -> int:
        """Write a piece of ``line``."""
        time.sleep(0.001)
        return os.write(file, line[:20])


def finished(journal: Path) -> tuple[Finished, list[optuna.trial.FrozenTrial]]:
    """What the journal says, read from a copy: reading it in place would heal it."""
    copy = Path(shutil.copy(journal, "copy"))
    study = optuna.load_study(study_name=None, storage=JournalStorage(Journal(copy)))
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    return {
        t.number: (t.state, t.value, tuple(t.params.items()), t.user_attrs["outcome"]["loss"]) for t in done
    }, trials


def torn(journal: Path) -> bool:
    """Whether the journal ends inside of a line."""
    with journal.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


def killed(kills: int, workers: int, rng: random.Random) -> list[Claim]:
    """Kill one of ``workers`` at random, begin another, and so on; then let the sweep end."""
    name = "alone" if workers == 1 else f"of {workers} workers"
    journal = Path("run/study.journal" if workers == 1 else "shared.journal")
    total = PER_KILL * kills
    command = ["tune", "experiment.yaml", "--trials", str(total), "--out", "run"]
    if workers > 1:
        command += ["--storage", f"journal:{journal}", "--lease", str(LEASE)]
    known: Finished = {}
    changed = tails = 0
    lives: list[int] = []
    for kill in range(kills):
        inside = kill % 3 == 0  # every third one inside of a write
        while len(lives) < workers:
            lives.append(begin(command, slow_writes=inside or workers > 1))
        size = journal.stat().st_size if journal.exists() else 0
        while not journal.exists() or (journal.stat().st_size == size):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, LIFE))
        end = time.monotonic() + 5
        while inside and not torn(journal) and time.monotonic() < end:
            pass
        victim = lives.pop(rng.randrange(workers))
        os.kill(victim, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL, (
            "it had ended before it was killed"
        )
        tails += torn(journal)
        now, _ = finished(journal)
        changed += sum(now.get(number) != what for number, what in known.items())
        known = now
    while len(lives) < workers:
        lives.append(begin(command, slow_writes=False))
    codes = [os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]) for life in lives]
    now, trials = finished(journal)
    changed += sum(now.get(number) != what for number, what in known.items())
    parameters = [what[2] for what in now.values()]
    lost = {tuple(t.params.items()) for t in trials if t.state.name == "FAIL" and "lr" in t.params} - set(parameters)
    zombies = [trial for trial in trials if trial.state.name in ("RUNNING", "WAITING")]
    inside_a_write = (
        f", {tails} inside of a write" if workers == 1 else ""
    )  # half a line may be a living worker's as well
    return [
        exactly(f"{name}: finished trials after {kills} kills{inside_a_write}", len(now), total),
        exactly(f"{name}: finished trials lost or changed by a kill", changed, 0),
        exactly(f"{name}: trials done twice", len(parameters) - len(set(parameters)), 0),
        exactly(f"{name}: begun trials whose parameters were not tried again", len(lost), 0),
        exactly(f"{name}: trials left running or waiting", len(zombies), 0),
        exactly(f"{name}: processes that did not end well", sum(code != 0 for code in codes), 0),
    ]


def exactly(name: str, value: int, bar: int) -> Claim:
    """Return the claim that ``value`` is ``bar``."""
    return Claim(name, value, value, value, bar, value == bar)


if __name__ == "__main__":
    given = arguments(__doc__ or "")
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    experiment = Experiment.read(EXPERIMENT, "experiment")
    context = RunContext(experiment)
    context.plan(experiment.proxy_scale, "mup", experiment.recipe)  # the forked processes have imported what it needs
    context.flops(experiment.proxy_scale)
    found = []
    for count in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            Path("experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
            found += killed(6 if given.quick else 100, count, random.Random(count))
            if not all(claim.ok for claim in found):
                print(Path("errors").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
            os.chdir("/")
    publish(found, given.json)
    sys.exit(not all(claim.ok for claim in found))
