"""The command-line application, with the commands in the order of ``--help``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated

import typer

from .. import printing
from . import audit, check, demo, doctor, init, plan, report, train, transfer, tune, verify

app = typer.Typer(
    name="mutransfer",
    help="Tune hyperparameters on small proxies, verify that they transfer, and write the settings of the wide model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"mutransfer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for module in (demo, init, doctor, plan, check, tune, verify, transfer, train, audit, report):
    module.add_to(app)


def _with_reserved_stdout(command: Callable[..., int]) -> Callable[..., int]:
    """Return ``command`` with standard output reserved for its result."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> int:
        with printing.reserved():
            return command(*args, **options)

    return run


for each in app.registered_commands:
    assert each.callback is not None
    each.callback = _with_reserved_stdout(each.callback)
