"""Roles given by name: where a person knows better than one forward pass what a parameter is for."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import RequestError, nearest
from ..family import Family
from .roles import ROLES

__all__ = ["check_patterns", "check_roles", "role_given", "roles_from", "with_roles"]


def role_given(roles: Mapping[str, str], name: str) -> str | None:
    """Return the role of the first pattern (as in a shell: * and ?) that fits ``name``."""
    return next((role for pattern, role in roles.items() if fnmatch.fnmatchcase(name, pattern)), None)


def check_roles(roles: Any, where: str) -> dict[str, str]:
    """Return ``roles`` as a dictionary; ``where`` says who gave them.

    Raises:
        RequestError: no dictionary from pattern to role, or an unknown role.
    """
    if not isinstance(roles, Mapping) or not all(isinstance(pattern, str) for pattern in roles):
        raise RequestError(f"{where} is {roles!r:.100}: give a dictionary from name pattern to role.")
    for pattern, role in roles.items():
        if role not in ROLES:
            raise RequestError(
                f"{where} gives {pattern} the role {role!r}, which is unknown: {nearest(str(role), ROLES)}"
            )
    return dict(roles)


def check_patterns(roles: Mapping[str, str], names: Collection[str], family: str) -> None:
    """Refuse a pattern without a parameter: a misspelt override would leave the role that it was to correct.

    Raises:
        RequestError: with the parameter whose name is nearest.
    """
    for pattern in roles:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            hint = f"did you mean {close[0]!r}?" if close else "it has none to train."
            raise RequestError(f"the role of {pattern!r} fits no parameter of {family}: {hint}")


def roles_from(texts: Iterable[str], flag: str) -> dict[str, str]:
    """Read ``PATTERN=ROLE`` as written on a command line.

    Raises:
        RequestError: another form, or an unknown role.
    """
    pairs = [text.rpartition("=") for text in texts]
    for pattern, _, role in pairs:
        if not pattern or not role:
            raise RequestError(
                f"{flag} {pattern + role!r} is not of the form PATTERN=ROLE, as in '*.router.weight=output'."
            )
    return check_roles({pattern: role for pattern, _, role in pairs}, flag)


def with_roles(family: Family, roles: Mapping[str, str]) -> Family:
    """Return ``family`` with ``roles`` before its own: the first pattern that fits counts."""
    return replace(family, roles={**roles, **{key: role for key, role in family.roles.items() if key not in roles}})
