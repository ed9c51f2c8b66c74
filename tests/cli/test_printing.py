"""What a person's model prints is captured while it is built: whatever interrupts that leaves standard output as it was."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pandas as pd
import pytest

from mutransfer.cli.console import table

SCRIPT = """
import os, sys, tempfile
from mutransfer import printing

def interrupted(*_, **__):
    raise KeyboardInterrupt

module, name = sys.argv[1].split(".")
with printing.reserved():
    real = getattr(sys.modules[module], name)
    setattr(sys.modules[module], name, interrupted)
    try:
        with printing.shown_once("a build"):
            pass
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    setattr(sys.modules[module], name, real)
    os.write(1, b"to descriptor 1\\n")
    with printing.shown_once("a build"):
        print("a print")
print("the result")
"""


@pytest.mark.parametrize("moment", ["tempfile.TemporaryFile", "os.fdopen"])
def test_ctrl_c_while_capturing_begins(moment: str) -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT, moment], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "the result\n"), ended.stderr
    assert ended.stderr == "interrupted\nto descriptor 1\na print\n"


def test_a_table_is_aligned_in_any_script() -> None:
    rows = pd.DataFrame(
        {"name": ["日本.weight", "a", "µ"], "lr": [0.5, 12.25, float("nan")], "role": ["hidden", "output", None]}
    )
    assert table(rows, lr=".2f").splitlines() == [
        "name            lr  role",
        "日本.weight   0.50  hidden",
        "a            12.25  output",
        "µ                –  –",
    ]


TABLE = """
import sys, pandas as pd
from mutransfer.cli.console import emit, table
emit({}, False, table(pd.DataFrame({"name": ["m" * 150], "lr": [0.5]})))
assert "rich" not in sys.modules
"""


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"COLUMNS": "40", "TERM": "xterm-256color"}], ids=str)
def test_a_table_is_the_same_text_on_a_terminal_and_in_a_pipe(variables: dict[str, str]) -> None:
    command, environment = [sys.executable, "-c", TABLE], {**os.environ, **variables}
    piped = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    assert piped == b"name" + b" " * 148 + b" lr\n" + b"m" * 150 + b"  0.5\n"
    master, slave = pty.openpty()
    subprocess.run(command, stdout=slave, check=True, env=environment)
    os.close(slave)
    shown = os.read(master, 10_000)
    os.close(master)
    assert shown.replace(b"\r\n", b"\n") == piped
