"""The command line: the one place that sees core, proxies, sweeps and reports together.

Only light modules are imported here; each command imports what it needs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import traceback

__all__ = ["main"]

BUG = "mutransfer: this is a bug of ours; please report it with the traceback above."


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed verdict, 2 wrong request, 3 bug, 130 Ctrl-C."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    import click
    import typer

    from ..errors import RequestError
    from .app import app

    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="mutransfer", standalone_mode=False)
    except RequestError as error:
        print(f"mutransfer: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, click.Abort):
        print("mutransfer: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # whoever read our output has read enough
    except Exception as error:
        if type(error).__name__ in USAGE_ERRORS or isinstance(error, click.ClickException):
            print(f"mutransfer: {_usage(error)}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(BUG, file=sys.stderr)
        return 3
    return int(code or 0)


# typer may carry its own copy of click, whose exceptions are other classes of the same names.
USAGE_ERRORS = {
    "UsageError",
    "BadParameter",
    "NoSuchOption",
    "MissingParameter",
    "BadArgumentUsage",
    "BadOptionUsage",
    "NoArgsIsHelpError",
}


def _usage(error: Exception) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split()) + " (see mutransfer COMMAND --help)"
