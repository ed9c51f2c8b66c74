"""Scaling rules of optimizers: the column of the tables that each reads, its fold, and the names of its settings."""

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
TINY = 1e-15  # Adafactor's epsilon on gradients, with the paper's 1e-30 as its square; too small to matter, so without a rule


class Parameter(Protocol):
    """Attributes of a parameter that a rule reads, at base or target size."""

    @property
    def role(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Growth:
    """Growth of one parameter from base to target: (m_in, m_out), both shapes, and the factor of its initial std."""

    m: tuple[float, float]
    base: tuple[int, ...]
    target: tuple[int, ...]
    init: float


@dataclass(frozen=True)
class OptimizerRule:
    """Scaling rule of one optimizer class.

    ``torch_name``, ``home``: the class and its module; no module for a class that the user provides.
    ``column``: "adam" if the update does not depend on the gradient's size, "sgd" if it is proportional to it.
    ``fold``: the key in `spec.FOLDS` by which a forward multiplier is folded.
    ``has_eps``: whether it adds an epsilon to the gradient's size (outside the square root in all of torch's classes).
    ``keywords``: the settings that do not depend on the parameter.
    ``l2``: why its weight decay does not transfer; empty if it does. ``about``: a note for readers of the plan.
    ``entrywise``: whether it updates each entry of a parameter independently, so that stacked parameters step as separate ones.
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
        """Whether epsilon is compared with gradients, whose size depends on depth, and not with parameters."""
        return not self.fold.startswith("adafactor")

    def of(self, parameter: Parameter) -> OptimizerRule:
        """Return the rule for this parameter; some optimizers leave some roles to another optimizer."""
        return self

    def lr(self, row: Row, growth: Growth) -> float:
        """Return the factor of the learning rate."""
        return row.lr(self.column)(*growth.m)

    def eps(self, row: Row, growth: Growth) -> float:
        """Return the factor of epsilon."""
        return row.eps(*growth.m)

    def decay(self, lr: float, growth: Growth) -> float:
        """Return the factor of the quantity that multiplies weight decay in a step; by default, the learning rate."""
        return lr

    def base(self, recipe: Recipe) -> tuple[float, float]:
        """Return the recipe's learning rate and epsilon for parameters that follow this rule."""
        return recipe.lr, recipe.eps

    def shared(self, recipe: Recipe) -> dict[str, Any]:
        """Return the settings shared by all parameters of this rule, by their names in the class."""
        return self.keywords(recipe)

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """Return the settings of one parameter, by their names in the class."""
        settings = {"lr": lr, "weight_decay": weight_decay}
        return settings if eps is None else settings | {"eps": eps}

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return the settings shared by all parameters, for every rule in use."""
        return self.shared(recipe)

    def reads(self, recipe: Recipe) -> tuple[Any, ...]:
        """Return everything that the optimizer uses from the recipe, except weight decay; nothing else affects it."""
        lr, eps = self.base(recipe)
        return self.settings(recipe), lr, eps if self.has_eps else None

    def load(self) -> type[Any]:
        """Return the optimizer class.

        Raises:
            RequestError: no installed package provides it.
        """
        try:
            if self.home is not None:
                return getattr(import_module(self.home), self.torch_name)
        except ImportError:
            pass
        missing = f"{self.home} is not installed" if self.home else "torch has no such class"
        raise RequestError(
            f"{self.name} needs an optimizer class, but {missing}: pass yours to plan.make_optimizer(model, cls=...), or build "
            "it from plan.param_groups(model)."
        )


@dataclass(frozen=True)
class Asgd(OptimizerRule):
    """Averaged SGD, whose weight decay is called ``lambd``."""

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """Return the settings of one parameter, with weight decay as ``lambd``: a step decays it by lr·lambd."""
        return {"lr": lr, "lambd": weight_decay}


@dataclass(frozen=True)
class Adafactor(OptimizerRule):
    """Adafactor, whose steps are relative to the size of the parameter, bounded below by the second epsilon."""

    gradient_eps: float = TINY
    entrywise: bool = False

    def lr(self, row: Row, growth: Growth) -> float:
        """Return 1 if Adam's rate is not scaled (SP), else Adam's factor divided by that of the size, which a step includes."""
        return 1.0 if row.adam == ONE else row.adam(*growth.m) / growth.init

    def eps(self, row: Row, growth: Growth) -> float:
        """Return epsilon's factor: it scales with the initial std, as a parameter that starts at 0 has no size itself."""
        return 1.0 if row.adam == ONE else growth.init

    def decay(self, lr: float, growth: Growth) -> float:
        """Return the factor of what multiplies weight decay; in transformers' class, decay is relative to the size as well."""
        return lr * growth.init if self.fold == "adafactor-hf" else lr

    def base(self, recipe: Recipe) -> tuple[float, float]:
        """Return the recipe's learning rate and second epsilon, which is compared with the size of weights."""
        return recipe.lr, recipe.eps2

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """Return the settings of one parameter, with one epsilon for gradients and one for weights."""
        return {"lr": lr, "weight_decay": weight_decay, "eps": (self.gradient_eps, eps)}


@dataclass(frozen=True)
class AdamWWithMuon(OptimizerRule):
    """AdamW for the parameters that Muon does not update, with a separate learning rate."""

    def base(self, recipe: Recipe) -> tuple[float, float]:
        return recipe.lr * recipe.adamw_lr_ratio, recipe.eps

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        return {"muon": False, **super().varying(lr, weight_decay, eps)}


def betas(recipe: Recipe) -> dict[str, Any]:
    """Return the averaging coefficients in the form that Adam-like classes take."""
    return {"betas": recipe.betas}


ADAMW = AdamWWithMuon("adamw", "AdamW", "adam", "adam", True, betas)


@dataclass(frozen=True)
class Muon(OptimizerRule):
    """Muon: orthogonalized steps for hidden matrices, with the spectral norm that the table requires (`Row.spectral`).

    ``adjust`` is torch's ``adjust_lr_fn``, by which the class itself scales steps with the stored shape of the matrix.
    """

    adjust: str = "original"
    entrywise: bool = False

    def of(self, parameter: Parameter) -> OptimizerRule:
        """Return this rule for hidden matrices, else AdamW's; expert stacks and convolutions have more axes than Muon accepts."""
        return self if parameter.role == "hidden" and len(parameter.shape) == 2 else ADAMW

    def lr(self, row: Row, growth: Growth) -> float:
        """Return the factor that the table requires of the spectral norm, divided by the factor that the class applies."""
        if row.spectral is None:
            return row.gauge(*growth.m)  # the unmodified class, with the forward multiplier of the table's source
        return row.spectral(*growth.m) * self.own(growth.base) / self.own(growth.target)

    def eps(self, row: Row, growth: Growth) -> float:
        """Return epsilon's factor; epsilon is added to the norm of the whole gradient, not to each entry."""
        return row.eps(*growth.m) * math.sqrt(growth.m[0] * growth.m[1])

    def own(self, shape: tuple[int, ...]) -> float:
        """Return the factor that the class applies; it depends on the stored shape, so transposing the matrix changes it."""
        rows, columns = shape
        return math.sqrt(max(1, rows / columns)) if self.adjust == "original" else 0.2 * math.sqrt(max(rows, columns))

    def shared(self, recipe: Recipe) -> dict[str, Any]:
        """Return the shared settings, with the factor that the class applies (``adjust_lr_fn``)."""
        return {**super().shared(recipe), "adjust_lr_fn": self.adjust}

    def varying(self, lr: float, weight_decay: float, eps: float | None) -> dict[str, Any]:
        """Return the settings of one parameter, with its group marked for Muon."""
        return {"muon": True, **super().varying(lr, weight_decay, eps)}

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return the shared settings of Muon and AdamW."""
        return {**ADAMW.shared(recipe), **self.shared(recipe)}

    def reads(self, recipe: Recipe) -> tuple[Any, ...]:
        """Return everything that Muon and AdamW use from the recipe, except weight decay."""
        return *super().reads(recipe), *ADAMW.base(recipe)


def momentum(recipe: Recipe) -> dict[str, Any]:
    """Return the momentum in the form that SGD-like classes take."""
    return {"momentum": recipe.momentum}


L2 = "is L2 regularization, which does not transfer with adaptive steps: use adamw, whose decay is decoupled"
CAPPED = "torch.optim.Adafactor caps every lr at 1/√step: the plan's factors hold until step 1/lr², for the largest lr."
MUON: dict[str, Any] = {
    "home": "mutransfer.optimizers.muon",
    "about": "hidden matrices use Muon, all other parameters use AdamW at lr · adamw_lr_ratio.",
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

# Optimizers that cannot be supported, with the reason; any other name is merely unknown.
REFUSED = {
    "radam": "its first steps are not normalized, so neither column of the tables applies",
    "adadelta": "its update is not measured in units of a learning rate",
    "lbfgs": "a line search has no learning rate to transfer",
    "rprop": "its step sizes adapt to the signs of gradients and become independent of the learning rate",
    "sparseadam": "it updates only the rows that occur in a batch",
}


def optimizer_rule(name: str, recipe: Recipe) -> OptimizerRule:
    """Return the rule of the optimizer called ``name`` (its torch class in lower case).

    Raises:
        RequestError: no rule is known for it, or the recipe sets weight decay for an adaptive optimizer that applies it as L2.
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
