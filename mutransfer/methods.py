"""Training methods: how gradients are computed and which weights are trained, as settings of a recipe.

A method other than backpropagation has a scaling rule of its own, which `planning.build.plan` applies, and a cost that differs
from what dense layers take. What a method needs while it trains stands in ``proxies/methods``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, WithJsonSchema

from .config import Settings, sentence_of
from .errors import RequestError, nearest

__all__ = ["METHODS", "Backprop", "ForwardGradient", "Method", "MethodOf", "Pruned", "erdos_renyi"]


class Method(Settings):
    """Settings of a training method.

    Attributes:
        name: the method's name.
        searchable: the settings that a sweep can search.
    """

    searchable: ClassVar[tuple[str, ...]] = ()

    name: str

    def __str__(self) -> str:
        """Return the name with the settings in parentheses, or the name alone if there are none."""
        settings = ", ".join(f"{key} {value}" for key, value in self.model_dump(exclude={"name"}).items())
        return f"{self.name} ({settings})" if settings else self.name

    def densities(
        self, shapes: Mapping[str, tuple[int, ...]], measured: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Return the density (fraction of weights that are not pruned) of each hidden matrix of the base model.

        Args:
            shapes: the shapes of the hidden matrices by name.
            measured: their densities by name, if the method's settings do not determine them.

        Raises:
            RequestError: ``measured`` is needed, or lacks a matrix.
        """
        return dict.fromkeys(shapes, 1.0)

    def flops(self, backprop: float) -> float:
        """Return the floating point operations of a step, given those of one with backpropagation (three products a layer)."""
        return backprop


class Backprop(Method):
    """Every weight is trained by its gradient."""

    name: Literal["backprop"] = "backprop"


class Pruned(Method):
    """Pruning at initialization: hidden matrices keep a fraction of their weights, and the others are 0 from the start.

    Only the density of each layer matters, not which of its weights remain (Frankle et al. 2009.08576, Section 5). So ``score``
    determines the densities, once at the base scale; the remaining weights of each run are random.

    Attributes:
        density: fraction of the hidden weights that remain, in (0, 1].
        score: what determines the densities of the layers: "erk" (Erdős–Rényi kernel, 1911.11134), "random" (the same
            density in every layer), or scores of the base model's initial weights: "synflow" (2006.05467), "snip"
            (1810.02340), "grasp" (2002.07376) and "magnitude".
        rule: "supar" (2405.15743) scales the remaining weights and their learning rates with the density; "none" does not.
    """

    searchable: ClassVar[tuple[str, ...]] = ("density",)

    name: Literal["pruned"] = "pruned"
    density: Annotated[float, Field(gt=0, le=1)] = 0.1
    score: Literal["synflow", "snip", "grasp", "magnitude", "random", "erk"] = "erk"
    rule: Literal["supar", "none"] = "supar"

    @property
    def needs_scores(self) -> bool:
        """Whether the model has to be scored to know the densities of its layers."""
        return self.density < 1 and self.score not in ("random", "erk")

    def densities(
        self, shapes: Mapping[str, tuple[int, ...]], measured: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """See `Method`."""
        if self.density == 1 or self.score == "random":
            return dict.fromkeys(shapes, self.density)
        if self.score == "erk":
            return erdos_renyi(shapes, self.density)
        if measured is None:
            raise RequestError(
                f"the densities of the layers under score {self.score!r} have to be measured: pass "
                "pruned=mutransfer.proxies.methods.pruned_densities(recipe, family) to plan, or use score 'random' or 'erk'."
            )
        if missing := sorted(shapes.keys() - measured.keys()):
            raise RequestError(f"no density was measured for {missing[0]}: measure those of the same family.")
        return {name: measured[name] for name in shapes}


class ForwardGradient(Method):
    """Gradients are estimated from directional derivatives along random tangents, without a backward pass (2202.08587).

    Attributes:
        tangents: number of tangents of a step, K.
        covariance: "preconditioned": tangents have the variance of µP's learning rate factors, and every parameter has the same
            learning rate; the mean of the update is that of SGD under µP. "isotropic": tangents have variance 1.
        derivative: "jvp" (forward-mode differentiation) or "difference" (central differences of the loss, as in MeZO,
            2305.17333), which needs no forward mode.
    """

    searchable: ClassVar[tuple[str, ...]] = ("tangents",)

    name: Literal["forward-gradient"] = "forward-gradient"
    tangents: Annotated[int, Field(ge=1)] = 8
    covariance: Literal["preconditioned", "isotropic"] = "preconditioned"
    derivative: Literal["jvp", "difference"] = "jvp"

    def flops(self, backprop: float) -> float:
        """See `Method`. A product takes one, and two for each tangent; a difference takes two for each."""
        passes = (1 if self.derivative == "jvp" else 0) + 2 * self.tangents
        return backprop * passes / 3


METHODS: dict[str, type[Method]] = {"backprop": Backprop, "pruned": Pruned, "forward-gradient": ForwardGradient}


def _read(given: Any) -> Any:
    """Accept a method's name, or a mapping with its name and settings."""
    if isinstance(given, Method):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ValueError(
            f"{given!r:.200} does not name a method: write a name ({', '.join(METHODS)}) or name and settings."
        )
    if (name := given["name"]) not in METHODS:
        raise ValueError(f"unknown method {name!r}: {nearest(name, METHODS)}")
    try:
        return METHODS[name].model_validate(given)
    except ValidationError as error:
        raise ValueError(sentence_of(METHODS[name], error)) from None


MethodOf = Annotated[
    SerializeAsAny[Method],
    BeforeValidator(_read),
    WithJsonSchema({"anyOf": [each.model_json_schema() for each in METHODS.values()]}),
]


def erdos_renyi(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Return layer densities proportional to (sum of the sizes of the axes) / (their product), with ``density`` overall.

    This is the Erdős–Rényi kernel of RigL (Evci et al. 1911.11134, Section 3). A layer whose density would exceed 1 stays
    dense, and the others share the rest.

    Args:
        shapes: shapes of the matrices and kernels by name.
        density: fraction of all their weights that remain, in (0, 1].
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        open_ = [name for name in shapes if name not in dense]
        scale = left / sum(sum(shapes[name]) for name in open_) if open_ else 0.0
        full = {name for name in open_ if scale * sum(shapes[name]) / sizes[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else scale * sum(shape) / sizes[name] for name, shape in shapes.items()}
        dense |= full
