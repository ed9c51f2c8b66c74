"""How an optimizer scales: which column of the tables it reads, its fold, and the names of its settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from ..errors import RequestError, nearest
from ..parametrizations.spec import ONE, Row
from ..recipe import Recipe

__all__ = ["Adafactor", "Asgd", "Growth", "Muon", "OPTIMIZERS", "OptimizerRule", "betas", "optimizer_rule"]

Column = Literal["adam", "sgd"]
TINY = 1e-15  # Adafactor's epsilon on gradients, whose square is the paper's 1e-30: it takes no part, so needs no rule


class Parameter(Protocol):
    """What a rule asks of a parameter, at base size or the target's."""

    @property
    def role(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Growth:
    """How one parameter grows from the base to the target: (m_in, m_out), both shapes, its initial std's factor."""

    m: tuple[float, float]
    base: tuple[int, ...]
    target: tuple[int, ...]
    init: float


@dataclass(frozen=True)
class OptimizerRule:
    """How one optimizer class scales.

    ``torch_name``, ``home``: the class and its module; no module for one that the user brings.
    ``column``: "adam" when the update does not change with the gradient's size, "sgd" when it is proportional to it.
    ``fold``: which of `fold.FOLDS` rewrites a forward multiplier.
    ``has_eps``: whether it adds an epsilon to the gradient's size (outside the root in all of torch's classes).
    ``keywords``: the settings that do not depend on the parameter.
    ``l2``: why its weight decay does not transfer; empty where it does. ``about``: what a reader of the plan should know.
    ``entrywise``: whether each entry of a parameter is updated by itself, so that stacked parameters step as separate ones.
    """

    name: str
    torch_name: str
    column: Column
    fold: str
    has_eps: bool
    keywords: Callable[[Recipe], dict[str, Any]]
    home: str | None = "torch.optim"
    l2: str = ""
    about: str = ""
    entrywise: bool = True

    @property
    def eps_of_gradient(self) -> bool:
        """Whether epsilon is compared with gradients, whose size a depth changes, and not with parameters."""
        return not self.fold.startswith("adafactor")

    def of(self, parameter: Parameter) -> OptimizerRule:
        """Return the rule that this parameter follows: some optimizers leave some roles to another."""
        return self

    def lr(self, row: Row, growth: Growth) -> float:
        """Return the learning rate's factor."""
        return row.lr(self.column)(*growth.m)

    def eps(self, row: Row, growth: Growth) -> float:
        """Return epsilon's factor."""
        return row.eps(*growth.m)

    def decay(self, lr: float, growth: Growth) -> float:
        """Return the factor of what weight decay is multiplied with in a step: the learning rate's own, as a rule."""
        return lr

    def base(self, recipe: Recipe) -> tuple[float, float]:
        """Return the recipe's learning rate and epsilon for parameters that follow this rule."""
        return recipe.lr, recipe.eps

    def shared(self, recipe: Recipe) -> dict[str, Any]:
        """Return the settings that are equal for all parameters of this rule, by the names that the class takes."""
        return self.keywords(recipe)

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """Return one parameter's own settings, by the names that the class takes."""
        settings = {"lr": lr, "weight_decay": weight_decay}
        return settings if eps is None else settings | {"eps": eps}

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return the settings that are equal for all parameters, of every rule in use."""
        return self.shared(recipe)

    def reads(self, recipe: Recipe) -> tuple[Any, ...]:
        """Return all that the optimizer learns of the recipe, weight decay apart: what is not in it changes nothing."""
        lr, eps = self.base(recipe)
        return self.settings(recipe), lr, eps if self.has_eps else None

    def load(self) -> type[Any]:
        """Return the class.

        Raises:
            RequestError: it is in no installed package.
        """
        try:
            if self.home is not None:
                return getattr(import_module(self.home), self.torch_name)
        except ImportError:
            pass
        missing = f"{self.home} is not installed" if self.home else "torch has no such class"
        raise RequestError(
            f"{self.name} needs an optimizer class and {missing}: pass yours, plan.make_optimizer(model, cls=...), or build it "
            "over plan.param_groups(model)."
        )


@dataclass(frozen=True)
class Asgd(OptimizerRule):
    """Averaged SGD, whose decay is called lambd."""

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """lr·lambd is what decays."""
        return {"lr": lr, "lambd": weight_decay}


@dataclass(frozen=True)
class Adafactor(OptimizerRule):
    """Steps relative to the parameter's own size, or to the smallest size that its second epsilon sets."""

    gradient_eps: float = TINY
    entrywise: bool = False

    def lr(self, row: Row, growth: Growth) -> float:
        """Where Adam's rate is one for all (SP), so is this one; otherwise the size takes over what it already holds."""
        return 1.0 if row.adam == ONE else row.adam(*growth.m) / growth.init

    def eps(self, row: Row, growth: Growth) -> float:
        """Of the initial weights: a parameter that starts at 0 has no size of its own."""
        return 1.0 if row.adam == ONE else growth.init

    def decay(self, lr: float, growth: Growth) -> float:
        """transformers' class decays relative to the size as well."""
        return lr * growth.init if self.fold == "adafactor-hf" else lr

    def base(self, recipe: Recipe) -> tuple[float, float]:
        """Its epsilon is a size of weights."""
        return recipe.lr, recipe.eps2

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """One epsilon for gradients, one for weights."""
        return {"lr": lr, "weight_decay": weight_decay, "eps": (self.gradient_eps, eps)}


@dataclass(frozen=True)
class AdamWBesideMuon(OptimizerRule):
    """What Muon leaves to AdamW, at a rate of its own."""

    def base(self, recipe: Recipe) -> tuple[float, float]:
        return recipe.lr * recipe.adamw_lr_ratio, recipe.eps

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        return {"muon": False, **super().varying(lr, weight_decay, eps)}


def betas(recipe: Recipe) -> dict[str, Any]:
    """Return the averaging constants as Adam-like classes take them."""
    return {"betas": recipe.betas}


ADAMW = AdamWBesideMuon("adamw", "AdamW", "adam", "adam", True, betas)


@dataclass(frozen=True)
class Muon(OptimizerRule):
    """Orthogonalized steps for hidden matrices, as large in spectral norm as the table asks (`Row.spectral`).

    ``adjust`` is torch's adjust_lr_fn, by which the class itself scales with the matrix's stored shape.
    """

    adjust: str = "original"
    entrywise: bool = False

    def of(self, parameter: Parameter) -> OptimizerRule:
        """Matrices with two growing sides; expert stacks and convolutions have more axes than the class takes."""
        return self if parameter.role == "hidden" and len(parameter.shape) == 2 else ADAMW

    def lr(self, row: Row, growth: Growth) -> float:
        """What the table asks of the spectral norm, over what the class does itself."""
        if row.spectral is None:
            return row.gauge(*growth.m)  # the class as it comes, under the source's multiplier
        return row.spectral(*growth.m) * self.own(growth.base) / self.own(growth.target)

    def eps(self, row: Row, growth: Growth) -> float:
        """Epsilon is added to the norm of the whole gradient, not of an entry."""
        return row.eps(*growth.m) * math.sqrt(growth.m[0] * growth.m[1])

    def own(self, shape: tuple[int, ...]) -> float:
        """Return the factor that the class applies itself; a transposed matrix swaps its sides, and the class reads sides."""
        rows, columns = shape
        return math.sqrt(max(1, rows / columns)) if self.adjust == "original" else 0.2 * math.sqrt(max(rows, columns))

    def shared(self, recipe: Recipe) -> dict[str, Any]:
        """And which factor the class applies."""
        return {**super().shared(recipe), "adjust_lr_fn": self.adjust}

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """And that the group is Muon's."""
        return {"muon": True, **super().varying(lr, weight_decay, eps)}

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """AdamW's too."""
        return {**ADAMW.shared(recipe), **self.shared(recipe)}

    def reads(self, recipe: Recipe) -> tuple[Any, ...]:
        """AdamW's share too."""
        return *super().reads(recipe), *ADAMW.base(recipe)


def momentum(recipe: Recipe) -> dict[str, Any]:
    """Return the momentum as SGD-like classes take it."""
    return {"momentum": recipe.momentum}


L2 = "is L2 regularization, which adaptive steps do not transfer: use adamw, whose decay is decoupled"
CAPPED = (
    "torch.optim.Adafactor caps every lr at 1/√step: the plan's factors hold until step 1/lr², with the largest lr."
)
MUON: dict[str, Any] = {
    "home": "mutransfer.optimizers.muon",
    "about": "hidden matrices follow Muon, all other parameters AdamW at lr · adamw_lr_ratio.",
}

OPTIMIZERS: dict[str, OptimizerRule] = {
    rule.name: rule
    for rule in (
        OptimizerRule("adamw", "AdamW", "adam", "adam", True, betas),
        OptimizerRule("adam", "Adam", "adam", "adam", True, betas, l2=L2),
        OptimizerRule("nadam", "NAdam", "adam", "adam", True, lambda r: {**betas(r), "decoupled_weight_decay": True}),
        OptimizerRule("adamax", "Adamax", "adam", "adam", True, betas, l2=L2),
        OptimizerRule(
            "rmsprop", "RMSprop", "adam", "adam", True, lambda r: {"alpha": r.betas[1], "momentum": r.momentum}, l2=L2
        ),
        OptimizerRule("adagrad", "Adagrad", "adam", "adam", True, lambda _: {"initial_accumulator_value": 0}, l2=L2),
        OptimizerRule("lion", "Lion", "adam", "adam", False, betas, home="lion_pytorch"),
        OptimizerRule("signum", "Signum", "adam", "adam", False, momentum, home=None),
        Adafactor("adafactor", "Adafactor", "adam", "adafactor", True, lambda _: {}, about=CAPPED),
        Adafactor(
            "adafactor-hf",
            "Adafactor",
            "adam",
            "adafactor-hf",
            True,
            lambda _: {"scale_parameter": True, "relative_step": False},
            home="transformers",
            gradient_eps=1e-30,
        ),
        OptimizerRule(
            "adafactor-unscaled",
            "Adafactor",
            "adam",
            "adam",
            False,
            lambda _: {"scale_parameter": False, "relative_step": False},
            home="transformers",
            entrywise=False,
        ),
        Muon("muon", "MuonWithAdamW", "adam", "muon", True, momentum, **MUON),
        Muon("muon-match-rms-adamw", "MuonWithAdamW", "adam", "muon", True, momentum, **MUON, adjust="match_rms_adamw"),
        OptimizerRule("sgd", "SGD", "sgd", "sgd", False, momentum),
        Asgd("asgd", "ASGD", "sgd", "sgd", False, lambda _: {"weight_decay": 0.0}),
    )
}

# Refused for good, each with its reason; everything else is merely unknown.
REFUSED = {
    "radam": "its first steps are not normalized, so neither column of the tables holds",
    "adadelta": "its update has no unit of learning rate",
    "lbfgs": "a line search has no learning rate to transfer",
    "rprop": "its step sizes adapt by sign and forget the learning rate",
    "sparseadam": "it updates only the rows it has seen",
}


def optimizer_rule(name: str, recipe: Recipe) -> OptimizerRule:
    """Return the rule of the optimizer called ``name`` (its torch class in lower case).

    Raises:
        RequestError: no rule is known for it, or the recipe asks an adaptive optimizer for L2 weight decay.
    """
    if name.lower() in REFUSED:
        others = ", ".join(other for other in OPTIMIZERS if other != "adamw")
        raise RequestError(
            f"{name} has no rule that transfers ({REFUSED[name.lower()]}): use adamw, or one of {others}."
        )
    if name not in OPTIMIZERS:
        raise RequestError(f"no scaling rule is known for the optimizer {name!r}: {nearest(name, OPTIMIZERS)}")
    rule = OPTIMIZERS[name]
    if rule.l2 and recipe.weight_decay > 0:
        raise RequestError(
            f"{rule.torch_name} with weight_decay {recipe.weight_decay:g} {rule.l2}, or set weight_decay to 0."
        )
    return rule
