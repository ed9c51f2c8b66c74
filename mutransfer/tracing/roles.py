"""Roles of parameters: inferred from which axes grow with the width and what the result is used for, or given by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RoleError, nearest
from ..family import Family
from .dataflow import Use

__all__ = [
    "ROLES",
    "check_patterns",
    "check_roles",
    "possible",
    "role_given",
    "role_of",
    "roles_from",
    "roles_of",
    "settled",
    "unused",
    "with_roles",
]


def role_given(roles: Mapping[str, str], name: str) -> str | None:
    """Return the role of the first pattern (as in a shell: * and ?) that matches ``name``, or None."""
    return next((role for pattern, role in roles.items() if fnmatch.fnmatchcase(name, pattern)), None)


def check_roles(roles: Any, where: str) -> dict[str, str]:
    """Return ``roles`` as a dictionary; ``where`` names their source.

    Raises:
        RoleError: not a dictionary from pattern to role, or an unknown role.
    """
    if not isinstance(roles, Mapping) or not all(isinstance(pattern, str) for pattern in roles):
        raise RoleError(f"{where} is {roles!r:.100}: give a dictionary from name pattern to role.")
    for pattern, role in roles.items():
        if role not in ROLES:
            raise RoleError(f"{where} gives {pattern} the role {role!r}, which is unknown: {nearest(str(role), ROLES)}")
    return dict(roles)


def check_patterns(roles: Mapping[str, str], names: Collection[str], family: str) -> None:
    """Raise if a pattern matches no parameter: a misspelled override would leave the role that it was meant to correct.

    Raises:
        RoleError: the message suggests the parameter with the nearest name.
    """
    for pattern in roles:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            hint = f"did you mean {close[0]!r}?" if close else "it has no trainable parameters."
            raise RoleError(f"the role pattern {pattern!r} matches no parameter of {family}: {hint}")


def roles_from(texts: Iterable[str], flag: str) -> dict[str, str]:
    """Parse ``PATTERN=ROLE`` as written on a command line.

    Raises:
        RoleError: the text has another form, or the role is unknown.
    """
    pairs = [text.rpartition("=") for text in texts]
    for pattern, _, role in pairs:
        if not pattern or not role:
            raise RoleError(
                f"{flag} {pattern + role!r} is not of the form PATTERN=ROLE, as in '*.router.weight=output'."
            )
    return check_roles({pattern: role for pattern, _, role in pairs}, flag)


def with_roles(family: Family, roles: Mapping[str, str]) -> Family:
    """Return ``family`` with ``roles`` before its own: the first pattern that matches counts."""
    return replace(family, roles={**roles, **{key: role for key, role in family.roles.items() if key not in roles}})


ROLES = ("input", "vector", "hidden", "output", "bottleneck", "finite")


def possible(growing: int) -> list[str]:
    """Return the roles that a parameter can have if ``growing`` of its axes grow with the width."""
    if growing > 1:
        return ["hidden", "input", "vector"]
    return ["input", "vector", "output", "bottleneck"] if growing else ["finite", "input", "vector"]


def settled(name: str, base: Sequence[int], wide: Sequence[int], use: Use, wider: Use) -> Use:
    """Return ``use`` with a definite label for every axis that is only partly summed over: that of the part that grows.

    Examples are an axis of heads and their entries of which only the entries are summed over, and a transposed convolution's
    channels, which are summed over within groups. ``base`` and ``wide`` are the parameter's shapes in the two uses.

    Raises:
        RoleError: both parts grow.
    """
    axes = list(use.axes)
    for axis, (size, wide_size) in enumerate(zip(base, wide, strict=True)):
        if size == 1 != wide_size:  # an axis with one entry carries no information
            axes[axis] = wider.axes[axis]
            continue
        count, wide_count = (each.summed[axis] if each.axes[axis] == "in" else 1 for each in (use, wider))
        if (
            size == wide_size
            or "in" not in (use.axes[axis], wider.axes[axis])
            or (count, wide_count) == (size, wide_size)
        ):
            continue
        if count != wide_count and size * wide_count != wide_size * count:
            raise RoleError(
                f"cannot tell the role of {name} {list(base)}: the operation {use.op!r} sums over a part of its axis {axis}, and "
                "both that part and the rest grow; give each of the two its own axis."
            )
        axes[axis] = "out" if count == wide_count else "in"
    return replace(use, axes=tuple(axes))


def _override(name: str, shape: tuple[int, ...], grows: tuple[bool, ...]) -> str:
    """Return what to write to give the parameter a role that its shape allows."""
    unlike = "vector" if sum(size > 1 for size in shape) > 1 else "input"
    likely, *others = [role for role in possible(sum(grows)) if role != unlike]
    return f"roles={{{name!r}: {likely!r}}} (or {', '.join(others)})"


def roles_of(name: str, shape: tuple[int, ...], grows: tuple[bool, ...], uses: list[Use]) -> list[str]:
    """Return the role of every use: all the same, or those of an embedding and of the readout that is tied to it.

    Raises:
        RoleError: no use, a use whose role cannot be determined, or uses that contradict each other.
    """
    if not uses:
        raise RoleError(
            f"{name} {list(shape)} is never used in the forward pass: remove it, freeze it (requires_grad=False), or name its "
            f"role in the family, {_override(name, shape, grows)}."
        )
    roles = [role_of(name, shape, use, grows) for use in uses]
    if len(set(roles)) > 1 and set(roles) != {"input", "output"}:
        raise RoleError(
            f"{name} {list(shape)} is used as {' and as '.join(sorted(set(roles)))}: only a readout tied to an embedding "
            "is supported, so give the other use its own parameter."
        )
    return roles


def unused(shape: tuple[int, ...], grows: tuple[bool, ...], *, layer: bool) -> str | None:
    """Return the role of a parameter that the traced forward pass does not use, if its shape allows only one.

    An example is an embedding for masked positions where nothing is masked. A matrix's growing axis could be in or out, and
    that of a linear ``layer`` with one output is in.
    """
    if not any(grows):
        return "finite"
    return "vector" if grows[-1] and all(size == 1 for size in shape[:-1]) and not (layer and len(shape) > 1) else None


def role_of(name: str, shape: tuple[int, ...], use: Use, grows: tuple[bool, ...]) -> str:
    """Return the role of the parameter in one use (see the table of roles in docs/explanation/rules.md).

    Raises:
        RoleError: an axis that grows enters an operation without a rule.
    """
    growing = [label for grow, label in zip(grows, use.axes, strict=True) if grow]
    if use.op == "weight_norm":
        raise RoleError(
            f"{name} {list(shape)} is the magnitude of a weight that is normalized over its outputs as well; it grows with the "
            "square root of the width and has no rule: use weight_norm with dim=0, one magnitude per output."
        )
    if "unknown" in growing:
        if use.op == "_trilinear":  # a given role would count only one of the two axes that it sums over
            raise RoleError(
                f"{name} {list(shape)} is a bilinear form, which sums over two axes and has no rule: use a linear layer for each "
                "of its two inputs and multiply their results."
            )
        raise RoleError(
            f"cannot tell the role of {name} {list(shape)}: it enters the operation {use.op!r}, for which no axis rule is "
            "known; write that step as a matmul, an embedding, a convolution or an entrywise operation, or name the role in "
            f"the family, {_override(name, shape, grows)}."
        )
    if len(growing) > 1 and set(growing) == {"each"} and len(use.axes) > 1 and "in" not in use.axes:
        raise RoleError(
            f"cannot tell the role of {name} {list(shape)}: two of its axes grow and the operation {use.op!r} sums over "
            f"neither; name the role in the family, roles={{{name!r}: 'input'}}."
        )
    if use.alone and growing == ["out"]:
        raise RoleError(
            f"cannot tell the role of {name} {list(shape)}: it is multiplied by another parameter ({use.op!r}) before any "
            f"activation; multiply the activations with one after the other, or name the role in the family, roles={{{name!r}: "
            "'bottleneck'}."
        )
    into, out = "in" in growing, any(label != "in" for label in growing)
    match into, out:
        case True, True:
            return "hidden"
        case True, False:
            return "bottleneck" if use.feature and not use.logit else "output"
        case False, True:  # embeddings, biases, gains; depthwise convolutions, whose growing axis is not summed over
            contracted = "in" in use.axes or "gather" in use.axes
            return "input" if contracted or sum(size > 1 for size in shape) > 1 else "vector"
        case _:
            return "finite"
