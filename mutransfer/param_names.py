"""Match the parameter names of wrapped models with the names in a plan."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

__all__ = ["plain_name", "planned_names", "pattern_of"]

# Name components added by torch.compile, DDP and DataParallel, activation checkpointing and FSDP1.
WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

# A weight under a forward multiplier (`planning.plan.attach`).
MULTIPLIED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")


def plain_name(name: str) -> str:
    """Return the parameter's name without the components that wrappers add, at any level."""
    kept = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return MULTIPLIED.sub(r"\1\2", kept)


def planned_names(found: Collection[str], planned: Collection[str]) -> dict[str, str]:
    """Map every name in ``found`` to the planned name it stands for, or to its name without wrapper components.

    A model may have a submodule that is really called ``module``, so an exact match takes precedence. Where several names
    differ only in such components, wrappers have lengthened all of them in the same way, and they are matched in order.
    """
    if set(found) <= set(planned):
        return {name: name for name in found}
    alike: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for names, side in ((found, 0), (planned, 1)):
        for name in sorted(names, key=lambda name: (name.count("."), name)):
            alike[plain_name(name)][side].append(name)
    matched: dict[str, str] = {}
    for plain, (here, there) in alike.items():
        if len(here) == len(there):
            matched |= dict(zip(here, there, strict=True))
        else:
            matched |= {name: name if name in there or len(here) > 1 else plain for name in here}
    return matched


def pattern_of(name: str) -> str:
    """Return the name with ``*`` for every layer number, which is the same for all layers of a stack."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
