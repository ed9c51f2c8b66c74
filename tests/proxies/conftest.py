"""The data sources, loaded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mutransfer.proxies.data import Data, load_data

from ..helpers.corpora import SOURCES, T


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "text.txt").write_bytes(random.integers(256, size=5000, dtype=np.uint8).tobytes())
    random.integers(1000, size=5000).astype("<u2").tofile(folder / "tokens.bin")
    return folder


@pytest.fixture(scope="session")
def sources(files: Path) -> dict[str, Data]:
    specs = {"text": f"text:{files / 'text.txt'}", "bin": f"bin:{files / 'tokens.bin'}"}
    return {name: load_data(specs.get(name, name), sequence_length=T) for name in SOURCES}
