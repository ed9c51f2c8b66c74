"""What every parameter of a family is for: seen in one forward pass and two builds, not guessed from names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .errors import RequestError, describe
from .family import Family
from .inits import Init, InitWatcher
from .scale import Scale
from .uses import Use, UseWatcher

__all__ = ["Observation", "ParamSpec", "build", "observe", "shapes_of"]

WIDER = 2  # a doubled width keeps every divisibility the base has


@dataclass(frozen=True)
class ParamSpec:
    """One parameter at base width.

    ``axes`` names what becomes of each axis (in, out, gather, each); ``grows`` says which of them grow with width.
    ``carriers`` is set for a tied readout: the parameters that carry a factor into its input (the final norm's);
    ``meets`` are those that carry one into what this parameter is applied to, in any of its uses.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    axes: tuple[str, ...]
    grows: tuple[bool, ...]
    init: Init
    tied: bool
    carriers: frozenset[str]
    on_data: bool
    meets: frozenset[str] = frozenset()

    def multipliers(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Return (m_in, m_out) of the same parameter with another ``shape``: every axis counts by its own ratio.

        Raises:
            RequestError: an axis differs that does not grow with the width.
        """
        if len(shape) != len(self.shape):
            raise RequestError(f"{self.name} has shape {list(shape)} in the target and {list(self.shape)} in the base.")
        m_in = m_out = 1.0
        for axis, (label, grows, size, base) in enumerate(zip(self.axes, self.grows, shape, self.shape, strict=True)):
            if not grows and size != base:
                raise RequestError(
                    f"axis {axis} of {self.name} is {size} in the target and {base} in the base, yet does not grow when "
                    "the width doubles: build both with the same data, vocabulary and fixed sizes."
                )
            if label == "in":
                m_in *= size / base
            else:
                m_out *= size / base
        return m_in, m_out


@dataclass(frozen=True)
class Observation:
    """All parameters of a family, and its attention.

    ``queries`` carry a factor into the attention logits, ``shared_queries`` of them also into keys or values.
    ``head_dim_ratio`` is what the head dim grows by when the width doubles, and ``scale_power`` the power of the head dim
    by which the model itself scales the logits (−½ as usual).
    """

    specs: dict[str, ParamSpec]
    queries: frozenset[str]
    shared_queries: frozenset[str]
    head_dim: int | None
    head_dim_ratio: float
    scale_power: float


def observe(family: Family, depth: int | None = None) -> Observation:
    """Watch the family at base width and, if given, another ``depth``.

    Nothing is allocated: both builds and the forward pass run on fake tensors.

    Raises:
        RequestError: a parameter whose role or initialization cannot be told, with its name, shape and the operation
            seen; or a model that does not run on the example batch.
    """
    base = family.base.with_(depth=depth or family.base.depth)
    watcher = InitWatcher()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with watcher:
            model = build(family, base)
        with InitWatcher():  # as it answers a constructor that asks for values
            wider = build(family, base.with_(width=WIDER * base.width))
        seen = _forward(family, model, mode)
        seen_wider = _forward(family, wider, mode)
    wide = shapes_of(wider)
    if set(wide) != {name for name, _ in model.named_parameters()}:
        odd = sorted(set(wide) ^ {name for name, _ in model.named_parameters()})[0]
        raise RequestError(
            f"{odd} is there at one width and not at the other: one family must have the same parameters."
        )
    specs, uses, inits = {}, seen.uses(), watcher.named(model)
    for name, parameter in model.named_parameters():
        grows = tuple(a != b for a, b in zip(parameter.shape, wide[name], strict=True))
        specs[name] = _spec(name, tuple(parameter.shape), grows, uses[name], inits[name])
    if len(seen.attentions) != len(seen_wider.attentions):
        raise RequestError(
            "the number of attention layers depends on the width: build the same modules at every width."
        )
    dims = [(a.head_dim, b.head_dim) for a, b in zip(seen.attentions, seen_wider.attentions, strict=True)]
    if len(set(dims)) > 1:
        raise RequestError(
            f"attention layers differ in head dim ({sorted({base for base, _ in dims})}): use one for all."
        )
    return Observation(
        specs,
        queries=frozenset().union(*(attention.queries for attention in seen.attentions)),
        shared_queries=frozenset().union(*(attention.queries & attention.others for attention in seen.attentions)),
        head_dim=dims[0][0] if dims else None,
        head_dim_ratio=dims[0][1] / dims[0][0] if dims else 1.0,
        scale_power=_scale_power(seen, seen_wider),
    )


def _scale_power(seen: UseWatcher, wider: UseWatcher) -> float:
    """Power p in scale ∝ head_dim^p; of no consequence where the head dim does not grow."""
    pairs = zip(seen.attentions, wider.attentions, strict=True)
    powers = [math.log(b.scale / a.scale, b.head_dim / a.head_dim) for a, b in pairs if a.head_dim != b.head_dim]
    if powers and max(powers) - min(powers) > 1e-6:
        raise RequestError(
            f"attention layers scale their logits by different powers of the head dim ({sorted(powers)}): use one."
        )
    return round(powers[0], 6) if powers else -0.5


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def build(family: Family, scale: Scale) -> torch.nn.Module:
    """Build the family's model under the caller's fake tensor mode.

    Raises:
        RequestError: the build raised, or returned something else than a module.
    """
    try:
        model = family.build(scale)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"building {family.name} at {scale} on fake tensors failed ({describe(error)}).") from error
    if not isinstance(model, torch.nn.Module):
        raise RequestError(f"build({scale}) returned {type(model).__name__}: return a torch.nn.Module.")
    return model


def _forward(family: Family, model: torch.nn.Module, mode: FakeTensorMode) -> UseWatcher:
    batch = tree_map_only(torch.Tensor, mode.from_tensor, family.batch)
    watcher = UseWatcher(model)
    try:
        with torch.no_grad(), watcher:
            loss = family.loss(model, batch)
    except Exception as error:
        raise RequestError(
            f"{family.name} does not run on its example batch with fake tensors ({describe(error)}): check that build, batch "
            "and loss fit together and that the forward pass reads no values."
        ) from error
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise RequestError(f"loss(model, batch) returned {loss!r:.80}: return a tensor with one entry.")
    return watcher


def _spec(name: str, shape: tuple[int, ...], grows: tuple[bool, ...], uses: list[Use], init: Init) -> ParamSpec:
    if not uses:
        raise RequestError(
            f"{name} {list(shape)} is never used in the forward pass: remove it, or freeze and exclude it."
        )
    roles = [_role(name, shape, use, grows) for use in uses]
    tied = len(set(roles)) > 1
    if tied and set(roles) != {"input", "output"}:
        raise RequestError(
            f"{name} {list(shape)} is used as {' and as '.join(sorted(set(roles)))}: only a readout tied to an embedding "
            "is known, so give the other use its own parameter."
        )
    first = uses[roles.index("input")] if tied else uses[0]
    readout = uses[roles.index("output")] if tied else first
    return ParamSpec(
        name, shape, roles[roles.index("input")] if tied else roles[0], first.axes, grows, init, tied,
        carriers=readout.carriers if tied else frozenset(), on_data=first.on_data,
        meets=frozenset().union(*(use.carriers for use in uses if "in" in use.axes)),
    )  # fmt: skip


def _role(name: str, shape: tuple[int, ...], use: Use, grows: tuple[bool, ...]) -> str:
    """RULES of the roles: which axes grow, and whether the result is a logit."""
    if "unknown" in use.axes and any(grow for grow, label in zip(grows, use.axes, strict=True) if label == "unknown"):
        raise RequestError(
            f"cannot tell the role of {name} {list(shape)}: it enters the operation {use.op!r}, for which no axis rule is "
            "known; write that step as a matmul, an embedding, a convolution or an entrywise operation."
        )
    into = any(grow for grow, label in zip(grows, use.axes, strict=True) if label == "in")
    out = any(grow for grow, label in zip(grows, use.axes, strict=True) if label != "in")
    contracted = "in" in use.axes or "gather" in use.axes
    match into, out:
        case True, True:
            return "hidden"
        case True, False:
            return "bottleneck" if use.feature else "output"
        case False, True:
            return "input" if contracted or len(shape) > 1 else "vector"
        case _:
            return "finite"
