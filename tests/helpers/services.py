"""Programs that only some tests need: a test whose program is not installed is left out with the reason, in CI it fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["REQUIRE", "missing_service", "program"]

REQUIRE = "MUTRANSFER_REQUIRE_SERVICES"  # set by .ci/run, which installs them


def program(names: Sequence[str], package: str, places: str = "") -> str:
    """Return the path of the first of ``names`` that is installed, where the glob ``places`` finds it or in PATH.

    Otherwise the test is skipped; with $MUTRANSFER_REQUIRE_SERVICES or $CI set it fails.
    """
    packaged = sorted(Path("/").glob(places.lstrip("/"))) if places else []
    found = str(packaged[-1]) if packaged else next((path for name in names if (path := shutil.which(name))), None)
    if found:
        return found
    missing_service(f"{names[0]} is not installed: apt-get install {package}, as .ci/run does, to run this test")


def missing_service(reason: str) -> NoReturn:
    """Skip the test with the reason; with $MUTRANSFER_REQUIRE_SERVICES or $CI set it fails instead."""
    if any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in (REQUIRE, "CI")):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
