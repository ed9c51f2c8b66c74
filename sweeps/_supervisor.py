"""Run one command, and end it with all processes it started when the sweep asks for it or has itself ended.

Usage: ``python -I -S _supervisor.py GRACE COMMAND…``. It is a separate process because only that can outlive a killed sweep. The
signal to stop is the end of its stdin, which needs no writer: a pipe closes with the process that held it. The command's process
group then gets SIGTERM, and whatever is left after GRACE seconds gets SIGKILL. Processes that a command leaves behind when it
ends normally are ended in the same way, with SIGKILL after one second. Exits with the command's code, or 128 + signal as a shell
does. It imports little because it is started for every attempt of a command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

LEFT_BEHIND = 1.0  # seconds before SIGKILL for the processes that an ended command has left behind
STUCK = 30.0  # seconds after which to give up on processes that do not end even after SIGKILL
BETWEEN = 0.02  # seconds between checks
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(grace: float, command: list[str]) -> int:
    """Run ``command`` until it ends or stdin is closed, and return the exit code."""
    _adopt_orphans()
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    try:
        nothing = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=nothing, setpgroup=0)
    except OSError as error:
        print(f"cannot run {command[0]}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return 127
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the command's stdout must end with the command
    code, asked = None, False
    while code is None and not asked:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        asked = 0 in ready
        code, _ = _reaped(child)
    _end(child, grace if asked else LEFT_BEHIND)
    return 128 + signal.SIGTERM if code is None else code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """Become the parent of all orphaned descendants, which also finds those that have left the command's group."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere only the group is ended
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reaped(child: int) -> tuple[int | None, bool]:
    """Reap ended processes; return the child's exit code if it is among them, and whether any process is left."""
    code = None
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == child:
                code = os.waitstatus_to_exitcode(found[1])
    except ChildProcessError:
        return code, False
    return code, True


def _end(child: int, grace: float) -> None:
    """Send SIGTERM to the command's group and, after ``grace`` seconds, SIGKILL to the group and all descendants."""
    if not _reaped(child)[1]:
        return
    _send(-child, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (left := _reaped(child)[1]) and time.monotonic() < deadline:
        time.sleep(BETWEEN)
    deadline = time.monotonic() + STUCK
    while left and time.monotonic() < deadline:
        _send(-child, signal.SIGKILL)
        for pid in _below(os.getpid()):
            _send(pid, signal.SIGKILL)
        time.sleep(BETWEEN)
        left = _reaped(child)[1]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _below(ancestor: int) -> list[int]:
    """Return the IDs of all living descendants of ``ancestor``; none where /proc does not exist."""
    parents = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with (
                    contextlib.suppress(OSError),
                    open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file,
                ):
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
    found: list[int] = []
    known = {ancestor}
    while fresh := {pid for pid, parent in parents.items() if parent in known and pid not in known}:
        found += fresh
        known |= fresh
    return found


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
