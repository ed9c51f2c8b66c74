"""Real `mutransfer` commands side by side, forked from one process that has imported everything, to be killed at will."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Worker", "Workers", "workers"]

PATIENCE = 300.0  # seconds after which a worker hangs

SERVER = """
import json, os, signal, sys

import torch
import mutransfer.cli

torch.set_num_threads(1)
import optuna, pandas, scipy.stats, grpc, psycopg, sqlalchemy.orm
import mutransfer.sweeps.tune, mutransfer.sweeps.experiment, mutransfer.cli.tune
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "pid" in job:
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(job["pid"], 0)[1])), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(job["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for end, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['name']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), end)
        sys.argv = ["mutransfer", *job["arguments"]]
        code = 99
        try:
            code = mutransfer.cli.run(job["arguments"])
            sys.stdout.flush()
        finally:
            os._exit(code)
    print(json.dumps(pid), flush=True)
"""


@dataclass(frozen=True)
class Worker:
    """A command that was started as process ``pid``; its stdout and stderr go to files of its name."""

    pid: int
    cwd: Path
    name: str

    @property
    def err(self) -> str:
        return (self.cwd / f"{self.name}.err").read_text()

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        return json.loads((self.cwd / f"{self.name}.out").read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


class Workers:
    """Starts commands and waits for them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )  # fmt: skip
        assert self._line() == "ready\n"

    def start(self, name: str, *arguments: str, cwd: Path) -> Worker:
        print(json.dumps({"name": name, "arguments": arguments, "cwd": str(cwd)}), file=self._server.stdin, flush=True)
        return Worker(json.loads(self._line()), cwd, name)

    def wait(self, worker: Worker) -> int:
        """Wait for the end and return the exit code, negative for a signal."""
        print(json.dumps({"pid": worker.pid}), file=self._server.stdin, flush=True)
        return json.loads(self._line())

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def _line(self) -> str:
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], PATIENCE)[0]:
            raise TimeoutError(f"no answer for {PATIENCE} s: a worker hangs")
        return self._server.stdout.readline()


@contextlib.contextmanager
def workers() -> Iterator[Workers]:
    made = Workers()
    try:
        yield made
    finally:
        made.close()
