"""Plain torch: a JSON of parameter-name patterns and settings, read in thirty lines (docs/reference/pytorch-export.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import RequestError
from ..optimizers.rules import OPTIMIZERS, OptimizerRule
from ..param_names import pattern_of
from ..planning.plan import ParameterPlan
from ..planning.target import TargetConfig

__all__ = ["matches", "patterns", "write"]

FORMAT = "mutransfer-pytorch/1"


def write(target: TargetConfig) -> tuple[str, str]:
    """Return the file name and the JSON text; docs/reference/pytorch-export.md describes its keys.

    Raises:
        RequestError: the plan needs a forward multiplier or a training method, which are not settings of a parameter.
    """
    if (method := target.plan.recipe.method.name) != "backprop":
        raise RequestError(
            f"the recipe's method is {method}, which settings of parameters cannot express: train with `mutransfer train`, or "
            "let the script call TargetConfig.load(path).plan."
        )
    for row in target.plan.rows:
        if row.columns:
            raise RequestError(
                f"{row.name} {list(row.shape)} has columns with a forward multiplier, which this format cannot express: let the "
                "script call TargetConfig.load(path).plan.attach(model) and take the settings from there, or split the layer."
            )
    data = target.as_dict()
    recipe, rule = target.plan.recipe, OPTIMIZERS[target.plan.optimizer]
    content = {
        "format": FORMAT,
        "model": target.model,
        "scale": data["scale"],
        "parametrization": data["parametrization"],
        "optimizer": {
            "class": rule.torch_name,
            "module": rule.home,
            "settings": data["optimizer"]["settings"],
        },
        "parameters": patterns(target.plan.rows, rule),
        "schedule": {
            **data["schedule"],
            "warmup_steps": round(recipe.warmup * target.steps),
            "cooldown_steps": max(1, round(recipe.cooldown * target.steps)),
        },
        "clip": data["clip"],
        **{key: data[key] for key in ("batch_size", "sequence_length", "steps", "seed", "warnings")},
    }
    return "target.pytorch.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def patterns(rows: Sequence[ParameterPlan], rule: OptimizerRule) -> list[dict[str, Any]]:
    """Return the settings by name pattern, in the plan's order; ``*`` stands for one layer number.

    Layers are combined into one pattern only if all parameters whose names differ just in these numbers have the same
    settings; otherwise each is listed by its own name.
    """
    families: dict[str, list[ParameterPlan]] = {}
    for row in rows:
        families.setdefault(pattern_of(row.name), []).append(row)
    found = []
    for template, members in families.items():
        agree = len(members) > 1 and all(_settings(row, rule) == _settings(members[0], rule) for row in members)
        for row in members[:1] if agree else members:
            found.append({"pattern": template if agree else row.name, **_settings(row, rule)})
    return found


def matches(pattern: str, name: str) -> bool:
    """Return whether ``name`` is ``pattern`` with a layer number for every ``*``."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _plain(init: dict[str, Any]) -> dict[str, Any]:
    """Drop recorded operations: the model's own constructor runs them, and a plain script has already called it."""
    parts = [{**part, "init": _plain(part["init"])} for part in init.get("parts", ())]
    kept = {key: value for key, value in init.items() if key not in ("parts", "program")}
    return {**kept, "parts": parts} if parts else kept


def _settings(row: ParameterPlan, rule: OptimizerRule) -> dict[str, Any]:
    return {
        **rule.of(row).varying(row.lr, row.weight_decay, row.eps),
        "init": {**_plain(row.init.as_dict()), "std": row.init.std},
        "gauge": row.gauge,
    }
