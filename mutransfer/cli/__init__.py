"""The command line: the only package that imports the core, proxies, sweeps and reports together.

Only light modules are imported here; each command imports what it needs when it runs, so ``--help`` is fast.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from typing import Any

__all__ = ["main"]

BUG = "mutransfer: this is a bug; please report it with the traceback above."
SMALLER = "use a smaller batch or a smaller width, or a device with more memory"
INTERRUPTED = "mutransfer: interrupted; run the same command again to continue."


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with 0 (success), 1 (failed verdict), 2 (invalid request), 3 (bug) or 130 (Ctrl-C)."""
    try:
        from .. import printing

        printing.release_at_exit_only()
        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # while importing the modules of `run`, or while printing a message
        code = _interrupted()
    if code == 130:
        _ignore_interrupts()  # nothing is left to interrupt
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        code = _run(arguments)
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was being handled
        code = 130
    return _interrupted() if code == 130 else code


def _interrupted() -> int:
    """Print that the command was interrupted, ignoring a second Ctrl-C meanwhile."""
    before = _ignore_interrupts()
    print(INTERRUPTED, file=sys.stderr)
    if before is not None:
        signal.signal(signal.SIGINT, before)
    return 130


def _ignore_interrupts() -> Any:
    """Ignore Ctrl-C from now on and return its handler, or None outside the main thread, where no signal arrives."""
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
        from ..devices import is_out_of_memory
        from ..errors import describe

        if is_out_of_memory(error):
            print(f"mutransfer: there is not enough memory ({describe(error)}): {SMALLER}.", file=sys.stderr)
            return 2
        # Depending on its version, typer bundles click or imports it; the class names are the same.
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
    return int(code or 0)  # typer does not propagate Ctrl-C, but returns 130 for it
