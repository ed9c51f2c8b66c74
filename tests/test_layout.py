"""The house keeps its shape: what is installed is what is on disk, and imports point one way only."""

from __future__ import annotations

import ast
import fnmatch
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
        ("mutransfer/new.py", "from . import plans"),
        ("mutransfer/export/new.py", "from ..plans import Plan"),
        ("mutransfer/cli/new.py", "from ..sweeps.study import open_study"),
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


def test_no_module_is_two_ideas_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


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
