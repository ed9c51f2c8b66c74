"""Real processes of the command line, to be limited, interrupted and killed.

Each is forked from one that has imported everything, because importing takes seconds and a hundred commands are tried. It
leads its own process group, as a command does that is typed into a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mutransfer.cli.output import OUTPUTS

__all__ = ["Ended", "Processes", "Started", "contents", "group_of", "until", "validated"]

PATIENCE = 90.0  # seconds after which a command hangs

SERVER = """
import json, os, resource, selectors, signal, sys

import torch
import mutransfer.cli

torch.set_num_threads(1)
kept = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
mutransfer.cli.run(["plan", "mlp", "--width", "16"])
import optuna, pandas, scipy.stats, mutransfer.planning.audit, mutransfer.proxies.target_run, mutransfer.sweeps.verify
import mutransfer.sweeps.tune, mutransfer.reports, mutransfer.planning.target
sys.stdout.flush()
os.dup2(kept, 1)


def answer(**told):
    print(json.dumps(told), flush=True)


def child(job, out, err):
    try:
        os.setsid()
        os.chdir(job["cwd"])
        os.dup2(os.open(job["stdout"], os.O_WRONLY | os.O_CREAT) if job["stdout"] else out, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 64)
        sys.argv = ["mutransfer", *job["arguments"]]
        if job["limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        code = mutransfer.cli.run(job["arguments"])
        try:
            sys.stdout.flush()
        except OSError:
            code = 120  # as Python's own exit has it
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 99
    os._exit(code)


answer(ready=True)
for line in sys.stdin:
    job = json.loads(line)
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        child(job, out[1], err[1])
    os.close(out[1])
    os.close(err[1])
    answer(pid=pid)
    texts = {out[0]: b"", err[0]: b""}
    with selectors.DefaultSelector() as open_ends:
        for end in texts:
            open_ends.register(end, selectors.EVENT_READ)
        while open_ends.get_map():
            for key, _ in open_ends.select():
                read = os.read(key.fd, 65536)
                texts[key.fd] += read
                if not read:
                    open_ends.unregister(key.fd)
                    os.close(key.fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    answer(code=status, out=texts[out[0]].decode(), err=texts[err[0]].decode())
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code (negative for a signal), stdout and stderr."""

    code: int
    out: str
    err: str
    command: str | None = None

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.out.endswith("\n"), (self.out, self.err)
        assert self.out.count("\n") == 1, self.out
        return validated(self.command, self.out)


class Started:
    """A command that runs."""

    def __init__(self, pid: int, answer: Callable[[], dict[str, Any]], command: str | None = None) -> None:
        self.pid, self._answer, self.command = pid, answer, command
        self.waited_for = False

    def interrupt(self) -> None:
        """Ctrl-C: the whole group hears it."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to the command itself."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for its end."""
        self.waited_for = True
        return Ended(**self._answer(), command=self.command)


class Processes:
    """Starts commands, one at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._read = b""
        self._answer()
        self._running: Started | None = None

    def start(self, *arguments: str, cwd: Path, limit: int | None = None, stdout: str | None = None) -> Started:
        """Start ``mutransfer ARGUMENTS`` in ``cwd``; files may grow to ``limit`` bytes, stdout may be a file."""
        assert self._server.stdin is not None
        if self._running is not None and not self._running.waited_for:  # by a test that failed in between
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
        job = {"arguments": arguments, "cwd": str(cwd), "limit": limit, "stdout": stdout}
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self._running = Started(self._answer()["pid"], self._answer, next(iter(arguments), None))
        return self._running

    def run(self, *arguments: str, cwd: Path, limit: int | None = None, stdout: str | None = None) -> Ended:
        """Start it and wait for its end."""
        return self.start(*arguments, cwd=cwd, limit=limit, stdout=stdout).wait()

    def close(self) -> None:
        """End the process that the commands are forked from."""
        self._server.communicate(timeout=PATIENCE)

    def _answer(self) -> dict[str, Any]:
        """Return the next line of the server; a command may be so quick that both of its lines arrive at once."""
        assert self._server.stdout is not None
        while b"\n" not in self._read:
            if not select.select([self._server.stdout], [], [], PATIENCE)[0]:
                raise TimeoutError(
                    f"no answer for {PATIENCE} s: the command hangs, or left a process that holds its output"
                )
            self._read += os.read(self._server.stdout.fileno(), 2**16)
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)


def validated(command: str | None, line: str) -> dict[str, Any]:
    """Return the JSON object in ``line``, as the command's model describes it: no key more, none less, no NaN."""
    assert command in OUTPUTS, command
    try:
        OUTPUTS[command].model_validate_json(line, strict=True)
    except ValidationError as error:
        raise AssertionError(
            f"{command} --json is not what mutransfer/cli/output.py says of it: change it there, then run "
            f"`python -m mutransfer.cli.output docs`.\n{error}"
        ) from None
    return json.loads(line, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Yield what starts commands."""
    made = Processes()
    try:
        yield made
    finally:
        made.close()


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until ``condition`` holds, and return what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.005)
    return found


def group_of(pid: int) -> list[int]:
    """Living processes of the group that ``pid`` leads or led."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == pid and state != "Z":
                    found.append(int(entry.name))
    return found


def contents(path: Path) -> dict[str, bytes | None]:
    """Everything below ``path`` by name, folders and special files as None; Python's caches and locks left out."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None
        for file in sorted(path.rglob("*"))
        if "__pycache__" not in file.parts and file.name != ".lock"
    }
