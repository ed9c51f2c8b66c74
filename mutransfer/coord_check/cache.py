"""Cache for interrupted checks: one file per size and set of seeds, named by a hash of everything its values depend on."""

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
from ..errors import FrameError
from ..schemas import COORDINATES

__all__ = ["CheckCache"]

INSTALLED = {"site-packages", "dist-packages"}  # hashed by package version instead of by source (`_environment`)
PACKAGE = Path(__file__).resolve().parents[1]
OURS = [PACKAGE, *(PACKAGE.parent / name for name in ("proxies", "sweeps", "reports"))]


@dataclass(frozen=True)
class CheckCache:
    """A folder of finished parts of coordinate checks.

    Args:
        folder: the folder; created when the first part is saved.
        subject: inputs of the check besides the arguments of `record`: the model's reference and the content of its config.
    """

    folder: Path
    subject: str = ""

    def piece(self, make: Callable[[], pd.DataFrame], batch: Any, **facts: Any) -> pd.DataFrame:
        """Return the rows measured by ``make``, or by an earlier run with the same code, packages, batch and ``facts``."""
        known = {
            "subject": self.subject,
            "batch": _batch_hash(batch),
            "code": _code_hash(),
            "packages": _environment(),
            **facts,
        }
        text = json.dumps(known, sort_keys=True, default=str)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.csv"
        if path.exists():
            try:
                return COORDINATES.read(path)
            except FrameError:
                pass  # the file was damaged by another program: measure again
        found = make()
        COORDINATES.write(found, path)
        return found


def _batch_hash(batch: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().contiguous().flatten()
            digest.update(f"{leaf.dtype} {list(leaf.shape)} ".encode() + flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _code_hash() -> str:
    """Return a hash of this package's source and of every loaded module that was not installed by a package manager."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    digest = hashlib.sha256()
    found = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths = {Path(each).resolve() for each in found if isinstance(each, str) and each.endswith(".py")}
    user_files = {
        path
        for path in paths
        if not INSTALLED.intersection(path.parts) and not any(map(path.is_relative_to, (stdlib, *OURS)))
    }
    # Hash this package from disk: which of its modules are loaded depends on the command and does not affect the values.
    for path in sorted(user_files | {path for folder in OURS for path in folder.rglob("*.py")}):
        if path.is_file():
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _environment() -> str:
    names = sorted({f"{each.name} {each.version}" for each in metadata.distributions()})
    threads = torch.get_num_threads()
    return f"{platform.python_version()} {platform.machine()} {threads} " + " ".join(names)
