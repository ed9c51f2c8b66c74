"""The command line: the one place that sees core, proxies, sweeps and reports together.

Only light modules are imported here; each command imports what it needs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from typing import Any

__all__ = ["main"]

BUG = "mutransfer: this is a bug of ours; please report it with the traceback above."
INTERRUPTED = "mutransfer: interrupted; run the same command again to go on."


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed verdict, 2 wrong request, 3 bug, 130 Ctrl-C."""
    try:
        from .. import printing

        printing.release_at_exit_only()
        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # while the modules of `run` itself were imported, or an answer was written
        code = _interrupted()
    if code == 130:
        _ignore_interrupts()  # nothing is left to interrupt
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        code = _run(arguments)
    except KeyboardInterrupt:  # a second one, while the first was answered
        code = 130
    return _interrupted() if code == 130 else code


def _interrupted() -> int:
    """Print that the command was interrupted; a second Ctrl-C meanwhile is ignored."""
    before = _ignore_interrupts()
    print(INTERRUPTED, file=sys.stderr)
    if before is not None:
        signal.signal(signal.SIGINT, before)
    return 130


def _ignore_interrupts() -> Any:
    """Ignore Ctrl-C from now on, and return the handler it had; None outside of the main thread, where no signal arrives."""
    with contextlib.suppress(ValueError):
        return signal.signal(signal.SIGINT, signal.SIG_IGN)
    return None


def _run(arguments: list[str]) -> int:
    from ..errors import RequestError

    try:
        import typer

        from ..printing import log_to_stderr
        from .app import app

        with log_to_stderr():
            code = typer.main.get_command(app).main(args=arguments, prog_name="mutransfer", standalone_mode=False)
    except RequestError as error:
        print(f"mutransfer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # typer has its own copy of click or imports it, depending on its version: the names are the same.
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "ClickException" in kinds:
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            one_line = f"mutransfer: {' '.join(text.split())} (see mutransfer COMMAND --help)"
            print(text if "NoArgsIsHelpError" in kinds else one_line, file=sys.stderr)
            return 2
        if "Abort" not in kinds:
            traceback.print_exc()
            print(BUG, file=sys.stderr)
            return 3
        return 130
    return int(code or 0)  # 130 is typer's own answer to Ctrl-C, which it does not let through
