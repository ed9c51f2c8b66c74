"""Run one command, and end it with all that it has started, when asked or when whoever asked for it is gone.

``python -I -S _supervisor.py GRACE COMMAND…``: a process of its own beside the command, as no other can outlive a sweep that is
killed. It is told by the end of its stdin, which nobody needs to write for: a pipe closes with the process that held it.
Then the command's group gets SIGTERM, and what is left after GRACE seconds SIGKILL. So does, after a second, what a command
leaves behind when it ends by itself. Exits with the command's code, or 128 + signal as a shell does. Imports little: it is
started with every try of a command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

LEFT_BEHIND = 1.0  # seconds for what a command that has ended leaves behind
STUCK = 30.0  # seconds until what not even SIGKILL ends is given up
BETWEEN = 0.02
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(grace: float, command: list[str]) -> int:
    """Run ``command`` to its end, or to that of stdin."""
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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the command's stdout is to end with the command
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
    """Become the parent of all processes below whose own is gone: those that left the command's group are found as well."""
    with contextlib.suppress(OSError, AttributeError):  # Linux; elsewhere only the group is ended
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reaped(child: int) -> tuple[int | None, bool]:
    """Bury the dead: return the child's exit code if it is among them, and whether anybody is left."""
    code = None
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == child:
                code = os.waitstatus_to_exitcode(found[1])
    except ChildProcessError:
        return code, False
    return code, True


def _end(child: int, grace: float) -> None:
    """Ask the command's group to end, then make sure that nothing is left of it or below it."""
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
    """All living processes below ``ancestor``, as far as the system tells."""
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
