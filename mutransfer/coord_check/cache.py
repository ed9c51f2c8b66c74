"""Finished pieces of an interrupted check: one file per size and seeds, named by a hash of everything its numbers depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .._torch_internals import tree_leaves
from ..errors import RequestError
from ..schemas import COORDINATES

__all__ = ["CheckCache"]

INSTALLED = {"site-packages", "dist-packages"}  # whose versions are known (`_packages`)
PACKAGE = Path(__file__).resolve().parents[1]
OURS = [PACKAGE, *(PACKAGE.parent / name for name in ("proxies", "sweeps", "reports"))]


@dataclass(frozen=True)
class CheckCache:
    """A folder of finished pieces of coordinate checks.

    Args:
        folder: made when the first piece is kept.
        subject: what was asked for besides the arguments of `record`: the model's reference, the content of its config.
    """

    folder: Path
    subject: str = ""

    def piece(self, make: Callable[[], pd.DataFrame], batch: Any, **facts: Any) -> pd.DataFrame:
        """Return the rows that ``make`` measures, or those of an earlier run on the same code, packages, batch and ``facts``."""
        known = {"subject": self.subject, "batch": _content(batch), "code": _code(), "packages": _packages(), **facts}
        text = json.dumps(known, sort_keys=True, default=str)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.csv"
        if path.exists():
            try:
                return COORDINATES.read(path)
            except RequestError:
                pass  # damaged by somebody else: measured again
        found = make()
        COORDINATES.write(found, path)
        return found


def _content(batch: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().contiguous().flatten()
            digest.update(f"{leaf.dtype} {list(leaf.shape)} ".encode() + flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _code() -> str:
    """Return a hash of the source of every loaded module that no package manager installed, and of this package."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    digest = hashlib.sha256()
    found = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths = {Path(each).resolve() for each in found if isinstance(each, str) and each.endswith(".py")}
    theirs = {
        path
        for path in paths
        if not INSTALLED.intersection(path.parts) and not any(map(path.is_relative_to, (stdlib, *OURS)))
    }
    # Ours from the disk: which of them are loaded depends on the command, not on the numbers.
    for path in sorted(theirs | {path for folder in OURS for path in folder.rglob("*.py")}):
        if path.is_file():
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _packages() -> str:
    names = sorted({f"{each.name} {each.version}" for each in metadata.distributions()})
    threads = torch.get_num_threads()
    return f"{platform.python_version()} {platform.machine()} {threads} " + " ".join(names)
