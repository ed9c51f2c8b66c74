"""`mutransfer doctor`: what this machine supports, and how to fix a broken installation."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from typing import Any

import typer

from .console import AsJson, UnusedDevice, UnusedSeed, emit

ENOUGH = 1.0  # GiB of disk: a run folder takes a few megabytes, checkpoints of fused trials a few hundred
REQUIRED = ("torch", "mup", "optuna", "pandas", "matplotlib", "numpy", "scipy", "sklearn", "pydantic", "yaml", "jinja2")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("doctor")(doctor)


def doctor(
    seed: UnusedSeed = 0,
    device: UnusedDevice = "auto",
    as_json: AsJson = False,
) -> int:
    """Check the installation and the machine.

    Exit with 1 if a required part is broken.
    """
    checks = [_import(name) for name in REQUIRED]
    checks += [_guarded(check) for check in (_torchvision, _transformers, _gpu, _compiler, _cores, _bfloat16, _disk)]
    failed = [check for check in checks if not check["ok"]]
    marks = ["FAIL" if not check["ok"] else "note" if check["fix"] else "ok  " for check in checks]
    lines = [f"{mark} {check['name']:<14} {check['detail']}" for mark, check in zip(marks, checks, strict=True)]
    lines += [f"fix {check['name']}: {check['fix']}" for check in checks if check["fix"]]
    emit({"checks": checks, "verdict": "fail" if failed else "pass"}, as_json, "\n".join(lines))
    return 1 if failed else 0


def _check(name: str, ok: bool, detail: str, fix: str | None = None) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail, "fix": fix}


def _guarded(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check()
    except Exception as error:  # report the failure instead of failing with it
        return _check(check.__name__.strip("_"), False, _first_line(error), "reinstall with -c constraints.txt")


def _import(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return _check(name, False, _first_line(error), "pip install -c constraints.txt -e .")
    return _check(name, True, str(getattr(module, "__version__", "") or metadata.version(name)))


def _torchvision() -> dict[str, Any]:
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return _check("torchvision", True, "not installed, not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        # mup requires torchvision but never imports it; transformers imports it, and fails.
        detail = f"{version} is broken with this version of torch ({_first_line(error)}); hf: models "
        detail += "work without it, but importing transformers in your code fails"
        return _check("torchvision", True, detail, "pip uninstall torchvision, or install the build that matches torch")
    return _check("torchvision", True, version)


def _transformers() -> dict[str, Any]:
    fix = "pip install 'mutransfer[hf]'"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return _check("transformers", True, "not installed; hf: models need it", fix)
    if int(version.split(".")[0]) < 5:
        return _check("transformers", True, f"{version}; hf: models need 5 or newer", fix)
    return _check("transformers", True, version)


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return _check("gpu", True, "none seen by torch: everything runs on the CPU")
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return _check("gpu", True, f"{torch.cuda.get_device_name()}, {total:.0f} GiB")


def _compiler() -> dict[str, Any]:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return _check("compiler", True, found or "none: torch.compile is not available on the CPU")


def _cores() -> dict[str, Any]:
    import torch

    return _check("cores", True, f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads")


def _bfloat16() -> dict[str, Any]:
    from ..devices import SLOW, bfloat16_slowdown

    times = bfloat16_slowdown()
    detail = f"products on the CPU take {times:.1f} times as long as in float32"
    if times > SLOW:
        detail += "; Muon iterates in float32 here, and --precision bfloat16 brings no gain"
    return _check("bfloat16", True, detail)


def _disk() -> dict[str, Any]:
    free = shutil.disk_usage(".").free / 2**30
    return _check("disk", free > 0.1, f"{free:.1f} GiB free here", "free some disk space" if free < ENOUGH else None)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
