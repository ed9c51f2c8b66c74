"""Build hooks of the documentation site: the source as it is installed, and what is generated from code."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]
COMMANDS = "<!-- commands -->"
COLUMNS = re.compile(r"<!-- columns ([A-Z]+) -->")
_layout: list[Path] = []


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: Any) -> Any:
    """Let mkdocstrings find ``mutransfer.proxies``, ``mutransfer.sweeps`` and ``mutransfer.reports``.

    mkdocstrings reads files and cannot follow the package-dir mapping of an editable install, so links lay the source out.
    """
    folder = Path(tempfile.mkdtemp(prefix="mutransfer-docs-"))
    _layout.append(folder)
    package = folder / "mutransfer"
    package.mkdir()
    for path in (ROOT / "mutransfer").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("proxies", "sweeps", "reports"):
        (package / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    return config


def on_post_build(config: Any) -> None:
    """Remove the links."""
    while _layout:
        shutil.rmtree(_layout.pop())


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the markers of generated parts: the commands, and the columns of a table."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_reference())
    return COLUMNS.sub(lambda found: columns(found[1]), markdown)


def columns(name: str) -> str:
    """Return the columns of one schema of `mutransfer.schemas` as a table."""
    from mutransfer import schemas

    rows = [
        f"| `{column}` | {kind} | {_cell(meaning)} |"
        for column, (kind, meaning) in getattr(schemas, name).columns.items()
    ]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def command_reference() -> str:
    """Return one section per command: its usage, arguments and options, as the parser has them."""
    import typer

    from mutransfer.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    records = [found for each in command.get_params(context) if (found := each.get_help_record(context))]
    names = {each: (each.metavar or each.name.upper()).strip("[]") for each in command.params if _is_argument(each)}
    arguments = [name if each.required else f"[{name}]" for each, name in names.items()]
    text = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
    lines = [f"## {name}", "", text, "", "```text", " ".join(["mutransfer", name, *arguments, "[OPTIONS]"]), "```", ""]
    lines += ["| argument or option | meaning |", "|---|---|"]
    lines += [f"| {_code(left)} | {_cell(right)} |" for left, right in records]
    return "\n".join([*lines, ""])


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _code(spelling: str) -> str:
    name, _, kind = spelling.strip().partition(" ")
    return f"`{name}` {_cell(kind)}" if kind else f"`{name}`"


def _cell(text: str) -> str:
    text = re.sub(r"([|*_<\[])", r"\\\1", " ".join(text.split()))
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\", ""), text)
