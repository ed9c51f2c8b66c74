"""Tests that need a server or a browser are left out where there is none, and fail where there has to be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from .helpers.services import REQUIRE, program


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH without any program, outside of CI."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in (REQUIRE, "CI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_without_the_program_a_test_is_left_out_with_the_reason(bare: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="redis-server is not installed: apt-get install redis-server"):
        program(["redis-server"], "redis-server")


@pytest.mark.parametrize("variable", [REQUIRE, "CI"])
@pytest.mark.parametrize(("value", "fails"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_in_ci_it_fails(variable: str, value: str, fails: bool, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(pytest.fail.Exception if fails else pytest.skip.Exception, match="not installed"):
        program(["chromium", "google-chrome"], "chromium")


def test_a_program_is_found_in_the_path_or_where_a_package_puts_it(bare: Path) -> None:
    (bare / "16" / "bin").mkdir(parents=True)
    for path in (bare / "16" / "bin" / "initdb", bare / "google-chrome"):
        path.touch(mode=0o755)
    assert program(["initdb"], "postgresql", f"{bare}/*/bin/initdb") == str(bare / "16" / "bin" / "initdb")
    assert program(["chromium", "google-chrome"], "chromium") == str(bare / "google-chrome")
