"""Whose parameter is it: the names that wrappers show, matched with the names that were planned."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

__all__ = ["plain_name", "planned_names", "pattern_of"]

# What torch.compile, DDP and DataParallel, activation checkpoints and the first FSDP put into a parameter's path.
WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

# A weight under a forward multiplier (`gauges.attach`).
MULTIPLIED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")


def plain_name(name: str) -> str:
    """Return the parameter's name without the path components that wrappers add, wherever they stand."""
    kept = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return MULTIPLIED.sub(r"\1\2", kept)


def planned_names(found: Collection[str], planned: Collection[str]) -> dict[str, str]:
    """Return each found name's own name: the planned one it stands for, else the name without wrappers.

    A model may own a submodule that is really called ``module``, so an exact match wins; where several names differ only
    by such components, wrappers have lengthened all of them alike and their order tells which is which.
    """
    if set(found) <= set(planned):
        return {name: name for name in found}
    alike: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for names, side in ((found, 0), (planned, 1)):
        for name in sorted(names, key=lambda name: (name.count("."), name)):
            alike[plain_name(name)][side].append(name)
    owners: dict[str, str] = {}
    for plain, (here, there) in alike.items():
        if len(here) == len(there):
            owners |= dict(zip(here, there, strict=True))
        else:
            owners |= {name: name if name in there or len(here) > 1 else plain for name in here}
    return owners


def pattern_of(name: str) -> str:
    """Return the name with a star for every layer number, which all layers of a stack share."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
