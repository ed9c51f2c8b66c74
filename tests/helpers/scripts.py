"""Scripts that train an experiment, and what is left of them."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mutransfer.run_dir import RunFolder
from mutransfer.sweeps.commands import Commands
from mutransfer.sweeps.experiment import Experiment
from mutransfer.sweeps.jobs import Job, RunContext, run_jobs
from mutransfer.sweeps.tune import Tuned

from .small import each, experiment

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


def states(found: Tuned) -> list[str]:
    return found.trials["state"].tolist()


def run_one(given: Experiment, folder: RunFolder, report: Any = None, rungs: tuple[int, ...] = (3, 5)) -> Any:
    job = Job(7, given.proxy_scale, "mup", given.recipe, 3, rungs)
    reports = each(report or (lambda *_: False))
    ((_, outcome),) = run_jobs(Commands(folder.make().path), RunContext(given), [job], reports)
    return outcome
