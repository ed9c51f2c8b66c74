"""What the repository's files state twice agrees: versions of tools, of Python, of the package and of its dependencies."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import mutransfer as mt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ARXIV = re.compile(r"\b[0-3]\d(?:0[1-9]|1[0-2])\.\d{5}\b")


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def constraints() -> dict[str, str]:
    """Package, normalized → the exact version that was tested."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pinned}


def of_users() -> list[Requirement]:
    """What users install: dependencies and extras, without those of tests, docs and development."""
    extras = [each for name, found in EXTRAS.items() if name not in ("test", "docs", "dev") for each in found]
    return [Requirement(each) for each in [*PROJECT["dependencies"], *extras]]


def cited() -> set[str]:
    return set(ARXIV.findall((ROOT / "CITATION.cff").read_text(encoding="utf-8")))


def test_pre_commit_runs_the_ruff_of_the_constraints() -> None:
    (ruff,) = [each for each in loaded(".pre-commit-config.yaml")["repos"] if each["repo"].endswith("/ruff-pre-commit")]
    assert ruff["rev"] == f"v{constraints()['ruff']}"


def test_the_workflow_runs_every_python_that_is_supported() -> None:
    jobs = loaded(".github/workflows/ci.yml")["jobs"]
    run = jobs["tests"]["strategy"]["matrix"]["python-version"]
    named = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", each)]
    assert run == named
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(version in supported for version in run)
    first = run[0].split(".")
    assert f"{first[0]}.{int(first[1]) - 1}" not in supported
    others = [step["with"]["python-version"] for name in jobs for step in jobs[name]["steps"] if "with" in step
              and "python-version" in step["with"] and name != "tests"]  # fmt: skip
    assert set(others) == {run[0]}


def test_every_job_that_installs_the_package_does_it_with_the_constraints() -> None:
    lines = [
        line.strip()
        for job in loaded(".github/workflows/ci.yml")["jobs"].values()
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
        if "install" in line and "pip" in line
    ]
    assert len(lines) >= 4
    assert [line for line in lines if "-c constraints.txt" not in line] == []


def test_the_citation_is_of_this_version() -> None:
    citation = loaded("CITATION.cff")
    assert citation["version"] == PROJECT["version"] == mt.__version__
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])


def test_every_paper_that_rules_are_taken_from_is_cited() -> None:
    named = {
        number
        for folder in ("parametrizations", "planning", "optimizers")
        for path in (ROOT / "mutransfer" / folder).glob("*.py")
        for number in ARXIV.findall(path.read_text(encoding="utf-8"))
    }
    assert "2203.03466" in named
    assert named - cited() == set()


def test_the_changelog_has_the_version() -> None:
    assert f"{PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", of_users(), ids=lambda each: each.name)
def test_a_dependency_has_bounds_around_what_was_tested(requirement: Requirement) -> None:
    operators = sorted(each.operator for each in requirement.specifier)
    assert operators == ["<", ">="]
    assert constraints()[canonicalize_name(requirement.name)] in requirement.specifier
