"""Which optimizers have a scaling rule, by name, and which are refused."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError, nearest
from ..recipe import Recipe
from .updates import Adafactor, Asgd, Growth, Muon, OptimizerRule, betas

__all__ = ["OPTIMIZERS", "Growth", "OptimizerRule", "optimizer_rule"]


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
