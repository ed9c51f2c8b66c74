"""Code blocks of Markdown pages: read from the page, run in its folder, compared with the output that the page shows.

Directives are HTML comments on the line before a block, so that no reader sees them:

``<!-- not run: REASON -->``             the block is not run; its commands are parsed
``<!-- slow: REASON -->``                the block is run with ``pytest -m slow`` only; its commands are parsed
``<!-- not an experiment: REASON -->``   YAML of another kind
``<!-- uses: PAGE -->``                  the files that another page shows are there as well

A hidden block does what a page takes for granted; its first line is ``<!-- hidden python``, ``<!-- hidden sh`` or
``<!-- hidden file NAME``, its last ``-->``. A block whose first line is a comment with a file name is that file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml

from mutransfer.cli.app import app
from mutransfer.sweeps.experiment import Experiment

__all__ = ["Block", "PageRun", "ROOT", "blocks", "commands_in", "every_page", "inline_commands", "parse_command"]

ROOT = Path(__file__).parents[2]
DIRECTIVES = ("not run", "slow", "not an experiment", "uses")
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))(?:, continued)?(?:: (mutransfer .*))?\n")
# An environment that inherits torch from another one has no script of that name.
TORCHRUN = 'command -v torchrun >/dev/null || torchrun() { python -m torch.distributed.run "$@"; }\n'
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    """One fenced or hidden block of a page."""

    page: str
    line: int
    language: str
    text: str
    directives: dict[str, str] = field(default_factory=dict)
    hidden: bool = False

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that the block shows, or None."""
        found = FILE.match(self.text) if self.language in ("python", "yaml") else None
        return found[1] if found else None

    @property
    def file_command(self) -> str | None:
        """The command that stands behind the file's name, or None."""
        found = FILE.match(self.text)
        return found[2] if found else None


def every_page() -> list[str]:
    """Every Markdown page of the documentation, and the README."""
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str) -> list[Block]:
    """Read the blocks of a page; a directive, a fence or a language that is not known is an error."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines(keepends=True)
    found: list[Block] = []
    directives: dict[str, str] = {}
    numbered = iter(enumerate(lines, start=1))
    for number, line in numbered:
        if opened := re.match(r"( *)(```+|~~~+)(.*)\n", line):
            indent, fence, info = opened.groups()
            body = _until(numbered, re.compile(rf" *{fence} *\n?"), f"{page}:{number}")
            language = info.strip().split(" ")[0]
            found.append(Block(page, number, language, textwrap.dedent("".join(body)), directives))
            assert not indent or body, f"{page}:{number} is empty"
            directives = {}
        elif hidden := re.match(r"<!-- hidden (python|sh|file [\w./-]+)\n", line):
            body = _until(numbered, re.compile(r"-->\n?"), f"{page}:{number}")
            found.append(Block(page, number, hidden[1], "".join(body), hidden=True))
        elif comment := re.match(r" *<!-- ([a-z ]+): (.+) -->\n", line):
            assert comment[1] in DIRECTIVES, f"{page}:{number}: unknown directive {comment[1]!r}"
            directives = {**directives, comment[1]: comment[2]}
        else:
            assert not directives, f"{page}:{number}: a directive stands on the line before a block"
    return found


def _until(numbered: Iterator[tuple[int, str]], end: re.Pattern[str], where: str) -> list[str]:
    body = []
    for _, line in numbered:
        if end.fullmatch(line):
            return body
        body.append(line)
    raise AssertionError(f"{where}: the block has no end")


def commands_in(text: str) -> list[list[str]]:
    """Return the arguments of every ``mutransfer`` command in shell source, comments and operators left out."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not re.search(r"(?:^|[\s;&|('\"])mutransfer\s", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = [*lexer]
        for place, word in enumerate(words):
            if word == "mutransfer" and not (place and words[place - 1] == "install"):
                arguments = words[place + 1 :]
                ends = [i for i, each in enumerate(arguments) if set(each) <= set("();<>|&")]
                found.append(arguments[: min(ends, default=None)])
    return found


def commands_in_yaml(value: Any) -> list[list[str]]:
    """Return the same for YAML: strings that a shell runs, and lists of arguments."""
    if isinstance(value, dict):
        return [found for each in value.values() for found in commands_in_yaml(each)]
    if isinstance(value, list):
        if value and value[0] == "mutransfer":
            return [[str(each) for each in value[1:]]]
        return [found for each in value for found in commands_in_yaml(each)]
    return commands_in(value) if isinstance(value, str) else []


def parse_command(arguments: list[str], where: str) -> None:
    """Parse a command with the real parser, and run nothing."""
    assert arguments, f"{where}: mutransfer without a command"
    if arguments[0].startswith("-"):
        assert arguments in (["--help"], ["--version"]), f"{where}: mutransfer {' '.join(arguments)}"
        return
    assert arguments[0] in COMMANDS, f"{where}: mutransfer has no command {arguments[0]!r}"
    try:
        COMMANDS[arguments[0]].make_context(arguments[0], [*arguments[1:]])
    except Exception as error:
        raise AssertionError(f"{where}: mutransfer {' '.join(arguments)}: {error}") from error


def inline_commands(page: str) -> list[tuple[str, list[str]]]:
    """Return each command in running text, with the names of its options."""
    text = re.sub(r"^ *(```+).*?^ *\1", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    codes = re.findall(r"`mutransfer ([a-z]+)([^`]*)`", text)
    return [(name, re.findall(r"(?<!\S)--[a-z-]+", rest)) for name, rest in codes]


class PageRun:
    """Runs the blocks of one page in ``folder``: Python in one namespace, commands in a shell, files written as shown."""

    def __init__(self, page: str, folder: Path, *, slow: bool) -> None:
        self.page, self.folder, self.slow = page, folder, slow
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.outputs: list[str] = []  # of every block that was run
        self.left_out: list[str] = []
        self.ran_last = False  # the output below a block that was left out is left out with it

    def run(self, capture: Any) -> None:
        """Run all blocks in order; ``capture`` is pytest's capsys."""
        for block in blocks(self.page):
            for other in filter(None, [block.directives.get("uses")]):
                for each in blocks(other):
                    self._write(each)
            reason = block.directives.get("not run") or (not self.slow and block.directives.get("slow"))
            if not reason and block.language == "text" and self.left_out and not self.ran_last:
                reason = "the output of a block that is not run"
            if block.language != "text":
                self.ran_last = not reason
            if reason:
                self.left_out.append(f"{block.where} ({block.language}): {reason}")
                self._check_unrun(block)
            else:
                self._run(block, capture)

    def _check_unrun(self, block: Block) -> None:
        if block.language == "python":
            compile(block.text, block.where, "exec")
        for arguments in commands_in(block.text):
            parse_command(arguments, block.where)

    def _run(self, block: Block, capture: Any) -> None:
        if block.language.startswith("file "):
            self._put(block.language.removeprefix("file "), block.text)
        elif block.language == "python":
            if not self._write(block):
                capture.readouterr()
                exec(compile(block.text, block.where, "exec"), self.names)
                self.outputs.append(capture.readouterr().out)
            elif block.file_command:
                self._shell(block.file_command, block)
        elif block.language == "sh":
            self._shell(block.text, block)
        elif block.language == "yaml":
            self._yaml(block)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "text":
            assert self.outputs, f"{block.where}: output without a block that prints it"
            assert_shows(self.outputs[-1], block.text, block.where)
        else:
            raise AssertionError(f"{block.where}: a block of {block.language or 'no language'}: mark it `not run`")

    def _yaml(self, block: Block) -> None:
        found = yaml.safe_load(block.text)
        if "not an experiment" in block.directives:
            for arguments in commands_in_yaml(found):
                parse_command(arguments, block.where)
        else:
            Experiment.read(found, block.where)
            self._write(block)

    def _write(self, block: Block) -> bool:
        """Write the file that a block shows, if it shows one; parts of one file follow each other."""
        if block.file is None or block.hidden:
            return False
        earlier = ""
        if ", continued" in block.text.partition("\n")[0]:
            earlier = (self.folder / block.file).read_text(encoding="utf-8")
        self._put(block.file, earlier + block.text)
        return True

    def _put(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def _shell(self, source: str, block: Block) -> None:
        for arguments in commands_in(source):
            parse_command(arguments, block.where)
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", TORCHRUN + source], cwd=self.folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": tools, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, f"{block.where}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        self.outputs.append(done.stdout)


NUMBER = re.compile(r"[-+−]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?|[-+−]?\binf\b")


def assert_shows(printed: str, shown: str, where: str) -> None:
    """Compare what was printed with the output on the page.

    Numbers and spaces may differ, since machines do; "…" stands for any text, on a line of its own for any lines.
    """
    pattern = "".join(r"(?:.*\n)?" if line.strip() == "…" else _pattern(line) + r"\n" for line in _plain(shown))
    lines = "".join(f"{line}\n" for line in _plain(printed))
    assert re.fullmatch(pattern, lines, re.DOTALL), f"{where} shows\n{shown}\nbut the block prints\n{printed}"


def _plain(text: str) -> list[str]:
    return [" ".join(NUMBER.sub("#", line).split()) for line in text.strip("\n").splitlines()]


def _pattern(line: str) -> str:
    return r"[^\n]*".join(re.escape(part) for part in line.split("…"))
