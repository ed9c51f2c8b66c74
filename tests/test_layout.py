"""The house keeps its shape: what is installed is what is on disk, and imports point one way only."""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mutransfer", "proxies", "sweeps", "reports")
LONGEST = 600
MOST = 108  # modules, apart from the folders with one file for each command, framework or method
# Who may import whom: the part of the house → parts it may name. The command line may name all.
MAY_IMPORT = {
    "core": {"core"},
    "proxies": {"core", "proxies"},
    "sweeps": {"core", "proxies", "sweeps"},
    "reports": {"core", "reports"},
    "cli": {"core", "proxies", "sweeps", "reports", "cli"},
}


def setuptools_table() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def modules(root: Path = ROOT) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def installed_name(folder: Path, root: Path = ROOT) -> str:
    """Where a folder of the repository is installed: `proxies/data` as mutransfer.proxies.data."""
    parts = folder.relative_to(root).parts
    return ".".join(parts if parts[0] == "mutransfer" else ("mutransfer", *parts))


def part(module: str) -> str:
    """Part of the house that a module inside mutransfer belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "core"


def imported(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere, functions included, by its absolute name."""
    package = installed_name(path.parent, root).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*start, *([node.module] if node.module else [])])
            # `from mutransfer import proxies` imports a module by its last name
            yield from ((node.lineno, f"{home}.{alias.name}") for alias in node.names)


def wrong_imports(root: Path) -> list[str]:
    wrong = []
    for path in modules(root):
        here = part(f"{installed_name(path.parent, root)}.{path.stem}")
        for line, name in imported(path, root):
            top = name.split(".")[0]
            if top in FOLDERS[1:] or (top == "mutransfer" and part(name) not in MAY_IMPORT[here]):
                wrong.append(f"{path.relative_to(root)}:{line} imports {name}")
    return wrong


def test_every_package_on_disk_is_installed() -> None:
    table = setuptools_table()
    on_disk = {installed_name(path.parent): path.parent for path in modules() if path.name == "__init__.py"}
    assert sorted(table["packages"]) == sorted(on_disk)
    # setuptools finds a package in its parent's folder unless the mapping says otherwise
    mapping = table["package-dir"]
    for name, folder in on_disk.items():
        parent, _, last = name.rpartition(".")
        expected = mapping.get(name) or f"{mapping.get(parent, parent.replace('.', '/'))}/{last}"
        assert ROOT / expected == folder, f"{name} is looked for in {expected}"
    assert set(mapping) <= set(on_disk)


def test_every_folder_with_code_is_a_package() -> None:
    assert [str(path) for path in modules() if not (path.parent / "__init__.py").exists()] == []


def test_every_data_file_is_packaged() -> None:
    patterns = setuptools_table()["package-data"]
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    data = [path for path in files if path.suffix not in {".py", ".pyc"} and path.name[0] != "."]
    left_out = [
        str(path)
        for path in data
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns.get(installed_name(path.parent), ()))
    ]
    assert len(data) >= 6
    assert left_out == []


def test_imports_point_one_way() -> None:
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mutransfer/new.py", "from mutransfer import proxies"),
        ("mutransfer/new.py", "from .proxies.training import train"),
        ("mutransfer/new.py", "from . import sweeps"),
        ("mutransfer/export/new.py", "from ..cli import app"),
        ("mutransfer/new.py", "def f():\n    import mutransfer.reports.page"),
        ("proxies/new.py", "from mutransfer.sweeps import study"),
        ("proxies/data/new.py", "from ...reports import page"),
        ("reports/new.py", "from mutransfer.proxies import training"),
        ("sweeps/new.py", "from mutransfer import reports"),
        ("proxies/new.py", "import mutransfer.cli.app"),
        ("sweeps/new.py", "import proxies"),
        ("mutransfer/cli/new.py", "from reports.page import write"),
    ],
)
def test_a_wrong_import_is_seen(file: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n", encoding="utf-8")
    assert len(wrong_imports(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mutransfer/new.py", "from .planning import plan"),
        ("mutransfer/export/new.py", "from ..planning.plan import Plan"),
        ("mutransfer/cli/new.py", "from ..sweeps.study import open_queue"),
        ("proxies/data/new.py", "from ..training import train"),
        ("sweeps/new.py", "from mutransfer.proxies.training import train"),
        ("reports/new.py", "from mutransfer.schemas import BASINS"),
    ],
)
def test_a_right_import_is_not(file: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n", encoding="utf-8")
    assert wrong_imports(tmp_path) == []


def planted(root: Path, **files: str) -> Path:
    """Write modules, ``a__b`` as ``a/b.py``, with an ``__init__.py`` in every folder."""
    for name, text in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        for folder in [path.parent, *path.parent.parents]:
            if folder == root:
                break
            (folder / "__init__.py").touch()
    return root


def module_name(path: Path, root: Path = ROOT) -> str:
    package = installed_name(path.parent, root)
    return package if path.name == "__init__.py" else f"{package}.{path.stem}"


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports anywhere, under ``TYPE_CHECKING`` and in functions included."""
    names = {module_name(path, root): path for path in modules(root)}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = {each if each in names else each.rpartition(".")[0] for _, each in imported(path, root)}
        graph[name] = {each for each in found if each in names and each != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, however indirectly."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    together = {frozenset(each for each in reach[name] if name in reach[each]) for name in graph if name in reach[name]}
    return [set(each) for each in together]


# Folders of one file per command, framework or method.
ONE_FILE_EACH = ("cli", "export", "interop", "methods")
SHORT = 150


def paragraphs(root: Path = ROOT) -> list[str]:
    """Short modules with a single importer, in their own folder: paragraphs of that importer."""
    graph, found = import_graph(root), []
    for path in modules(root):
        name = module_name(path, root)
        importers = [each for each, targets in graph.items() if name in targets]
        short = len(path.read_text(encoding="utf-8").splitlines()) <= SHORT
        at_home = [each for each in importers if each.rpartition(".")[0] == name.rpartition(".")[0]]
        exempt = path.name == "__init__.py" or any(f".{folder}." in f"{name}." for folder in ONE_FILE_EACH)
        if len(importers) == 1 and at_home and short and not exempt:
            found.append(name)
    return found


def public_names(path: Path) -> set[str]:
    """What ``__all__`` lists of the functions and classes that a module defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            listed = set(ast.literal_eval(node.value))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)} & listed


def names_of_two_things(root: Path = ROOT) -> dict[str, list[str]]:
    """Public names that two modules define, and module names that stand in two folders."""
    homes: dict[str, list[str]] = {}
    for path in modules(root):
        module = module_name(path, root)
        if any(f".{folder}." in f"{module}." for folder in ONE_FILE_EACH):
            continue
        for name in [*public_names(path), *([] if path.name == "__init__.py" else [f"{path.stem}.py"])]:
            homes.setdefault(name, []).append(module)
    return {name: found for name, found in homes.items() if len(found) > 1}


def prints(root: Path = ROOT) -> list[str]:
    """Calls of `print` in library code: it logs."""
    return [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in modules(root)
        if ".cli" not in module_name(path, root) and path.name != "_supervisor.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def too_long(root: Path = ROOT) -> dict[str, int]:
    lengths = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules(root)
    }
    return {name: length for name, length in lengths.items() if length > LONGEST}


def test_no_modules_import_each_other() -> None:
    assert circles(import_graph()) == []


def test_no_module_is_a_paragraph_of_its_only_importer() -> None:
    assert paragraphs() == []


def test_no_name_stands_for_two_things() -> None:
    assert names_of_two_things() == {}


def test_library_code_does_not_print() -> None:
    assert prints() == []


def test_no_module_is_two_concepts_long() -> None:
    assert too_long() == {}
    assert sum(path.parent.name not in ONE_FILE_EACH for path in modules()) <= MOST


def test_where_to_go_is_where_it_is() -> None:
    """CONTRIBUTING's table against the tree."""
    rows = re.findall(
        r"^\| .* \| \[`(\S+)`\]\((\S+)\): `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M
    )
    assert len(rows) >= 16
    for shown, path, name in rows:
        assert shown == path
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        targets = [each for node in tree.body for each in getattr(node, "targets", [getattr(node, "target", None)])]
        defined = {each.id for each in targets if isinstance(each, ast.Name)}
        defined |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{path} has no {name}"


def test_helpers_of_tests_stand_in_their_folder() -> None:
    files = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")]
    tests = {path for path in files if path.name.startswith("test_") or path.name == "conftest.py"}
    assert {path for path in files if path.parts[0] == "helpers"} == set(files) - tests


def test_planted_violations_of_the_layout_are_seen(tmp_path: Path) -> None:
    circle = planted(
        tmp_path / "circle",
        mutransfer__a="from . import b",
        mutransfer__b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import x",
        mutransfer__c="def f():\n    from .a import y",
    )
    assert circles(import_graph(circle)) == [{"mutransfer.a", "mutransfer.b", "mutransfer.c"}]
    lone = planted(tmp_path / "lone", sweeps__a="from .b import x", sweeps__b="x = 1", sweeps__c="from .a import x")
    assert paragraphs(lone) == ["mutransfer.sweeps.b", "mutransfer.sweeps.a"][::-1]
    twice = planted(
        tmp_path / "twice",
        proxies__a='__all__ = ["Thing"]\nclass Thing: ...',
        sweeps__b='__all__ = ["Thing"]\nclass Thing: ...',
        reports__a="x = 1",
    )
    assert set(names_of_two_things(twice)) == {"Thing", "a.py"}
    loud = planted(tmp_path / "loud", sweeps__a="print(1)", mutransfer__cli__b="print(1)")
    assert prints(loud) == ["sweeps/a.py:1"]
    long = planted(tmp_path / "long", reports__a="x = 1\n" * LONGEST)
    assert too_long(long) == {"reports/a.py": LONGEST + 1}


@pytest.mark.parametrize(
    "statement", ["import mutransfer", "import mutransfer.cli", "import mutransfer; mutransfer.Scale"]
)
def test_start_up_imports_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'pandas', 'optuna', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    # setuptools leaves a build folder and an egg-info beside the sources: build from a copy
    copy = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run([*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        installed_name(path.parent, copy).replace(".", "/") + "/" + path.name
        for folder in FOLDERS
        for path in (copy / folder).rglob("*")
        if path.is_file()
    }
    assert expected - set(names) == set()
    data = ["py.typed", "cli/experiment.yaml", "reports/report.html", "reports/report.css", "reports/report.js"]
    assert {f"mutransfer/{name}" for name in data} <= expected
    assert any(name.endswith(".mplstyle") for name in expected)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mutransfer"}
