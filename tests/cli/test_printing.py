"""What a person's model prints is captured while it is built: whatever interrupts that leaves standard output as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
