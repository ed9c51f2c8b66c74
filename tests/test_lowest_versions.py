"""The lower bounds of pyproject.toml hold: with the lowest versions that it allows, the tests of the core pass.

The environment is made from the bounds as they stand in pyproject.toml, on the lowest Python, by uv where it is installed
(it keeps what it downloaded) and by pip otherwise. torch's default build for Linux brings gigabytes of CUDA along: set
`PIP_EXTRA_INDEX_URL`, or `UV_EXTRA_INDEX_URL`, to where there is a CPU build to save them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Tools that read the source only; the tests of the core do not import them.
UNUSED = {"ruff", "mypy", "types-PyYAML", "playwright"}
# Parametrizations, optimizers, planning, tracing, initialization, the coordinate check and whole sweeps.
CORE = (
    "test_tables.py",
    "test_internals.py",
    "test_planning.py",
    "test_plan_files.py",
    "test_transfer.py",
    "test_basins.py",
    "optimizers",
    "tracing",
    "initialization/test_distributions.py",
    "coord_check",
    "sweeps/test_tune.py",
    "sweeps/test_verify.py",
)


def lowest(requirements: Iterable[str]) -> list[str]:
    """Each requirement at its lower bound, exactly; without one there is nothing to hold."""
    found = []
    for requirement in map(Requirement, requirements):
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if bounds and requirement.name not in UNUSED:
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            found.append(f"{requirement.name}{extras}=={bounds[0]}")
    return found


def requirements() -> list[str]:
    """All that users may install, and what the tests import themselves."""
    extras = PROJECT["optional-dependencies"]
    direct = [each for name, group in extras.items() if name not in ("docs", "dev") for each in group]
    return [*PROJECT["dependencies"], *(each for each in direct if not each.startswith(PROJECT["name"]))]


def command(*words: str | Path, cwd: Path) -> None:
    """Run a program whose output is that of the test; the caller's environment does not reach its imports."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, words[:4]))} … exited with {done.returncode}"


def test_a_bound_becomes_an_exact_version() -> None:
    assert lowest(["torch>=2.10,<2.14", "psycopg[binary]>=3.1,<4", "ruff>=0.9", "types-x"]) == [
        "torch==2.10",
        "psycopg[binary]==3.1",
    ]


def test_every_tested_folder_is_there() -> None:
    assert [name for name in CORE if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.slow
def test_the_core_passes_with_the_lowest_versions(tmp_path: Path) -> None:
    interpreter = shutil.which(f"python{PROJECT['requires-python'].removeprefix('>=')}")
    assert interpreter, (
        f"old versions have wheels for the oldest Python only: install Python {PROJECT['requires-python']}"
    )
    source, environment = tmp_path / "source", tmp_path / "environment"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".*cache", ".venv*", "*.egg-info", "build", "runs", "__pycache__")
    )  # fmt: skip
    python = environment / "bin" / "python"
    uv = shutil.which("uv")
    pip = [uv, "pip"] if uv else [python, "-m", "pip"]
    here = ["--python", python] if uv else []
    try:
        command(interpreter, "-m", "venv", *(["--without-pip"] if uv else []), environment, cwd=tmp_path)
        command(*pip, "install", *here, "-q", *lowest(requirements()), cwd=tmp_path)
        command(*pip, "install", *here, "-q", "--no-deps", "--no-build-isolation", source, cwd=tmp_path)
        command(*pip, "check", *here, cwd=tmp_path)
        # Beside the sources -P keeps the checkout's own folders from being imported as the package.
        tests = [Path("tests", name) for name in CORE]
        command(python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=source)
    finally:
        shutil.rmtree(environment, ignore_errors=True)  # gigabytes, which pytest would keep
