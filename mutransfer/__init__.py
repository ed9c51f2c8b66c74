"""Tune hyperparameters on small proxies, transfer them to wide models under µP, and verify that they transferred.

The public names are imported on first use, so the command line can respond before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coord_check import record as record
    from .coord_check import verdict as verdict
    from .coord_check.check import assert_coordinates_hold as assert_coordinates_hold
    from .coord_check.recorder import Recorder as Recorder
    from .errors import RequestError as RequestError
    from .family import Family as Family
    from .family import Scale as Scale
    from .optimizers.muon import MuonWithAdamW as MuonWithAdamW
    from .planning.build import plan as plan
    from .planning.plan import Plan as Plan
    from .planning.target import TargetConfig as TargetConfig
    from .recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOMES = {
    "Family": "family",
    "MuonWithAdamW": "optimizers.muon",
    "Plan": "planning.plan",
    "Recipe": "recipe",
    "Recorder": "coord_check.recorder",
    "RequestError": "errors",
    "Scale": "recipe",
    "TargetConfig": "planning.target",
    "assert_coordinates_hold": "coord_check.check",
    "plan": "planning.build",
    "record": "coord_check",
    "verdict": "coord_check",
}

__all__ = [
    "Family",
    "MuonWithAdamW",
    "Plan",
    "Recipe",
    "Recorder",
    "RequestError",
    "Scale",
    "TargetConfig",
    "assert_coordinates_hold",
    "plan",
    "record",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mutransfer' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
