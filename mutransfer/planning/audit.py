"""Audit a live optimizer against a plan: check which settings the target run really trains with, after any wrappers."""

from __future__ import annotations

import math
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..errors import FileError
from ..io import read_json
from ..optimizers.rules import OPTIMIZERS
from ..param_names import planned_names
from .plan import Plan

__all__ = ["COLUMNS", "audit", "live"]

COLUMNS = ("name", "setting", "planned", "found")
TOLERANCE = 1e-6  # relative: float32 learning rates round at 6e-8, a wrong factor is never this close
EXPECTED = "expected an optimizer's state_dict, at the top level or under the key 'optimizer'"

Difference = tuple[str, str, Any, Any]


def audit(plan: Plan, dump: dict[str, Any] | str | os.PathLike[str]) -> pd.DataFrame:
    """Return every difference between ``plan`` and an optimizer's settings; an empty frame means that they agree.

    Learning rates are compared before the schedule is applied: where a scheduler recorded ``max_lr`` or ``initial_lr``, that
    value is used. The current ratio lr / initial_lr must be the same for all parameters (setting "lr/initial_lr"; the planned
    value is the most common ratio).

    Args:
        plan: the plan of the target model.
        dump: what `live` returned, or ``optimizer.state_dict()`` with parameter names, or a dictionary with either of them
            under the key "optimizer" and, optionally, a state_dict under the key "model", whose shapes are then compared too.
            May also be the path of a file that holds one of these, written by `torch.save` or as JSON.

    Returns:
        A frame with the columns name, setting, planned, found: one row per parameter and setting that differs by more than
            1e-6 of its value. A parameter that one side lacks has the setting "parameter".

    Raises:
        FileError: the file is missing or damaged, holds no optimizer, or its parameters have no names.
    """
    if not isinstance(dump, dict):
        dump = _read(Path(dump))
    found: dict[str, dict[str, Any]] = {}
    differences: list[Difference] = []
    for name, group in _by_name(_groups(dump), plan):
        if name in found:
            differences.append((name, "parameter", "in one group", "in several groups"))
        found[name] = group
    for row in plan.rows:
        if row.name not in found:
            differences.append((row.name, "parameter", "present", "missing"))
            continue
        group = found[row.name]
        planned = plan.settings_of(row)
        if row.weight_decay and "decoupled_weight_decay" in group:  # torch's AdamW is Adam with this flag set
            planned["decoupled_weight_decay"] = OPTIMIZERS[plan.optimizer].of(row).name != "adam"
        for setting, value in planned.items():
            # OneCycleLR's initial_lr is the start of its warmup; the tuned rate is its max_lr
            actual = (
                group.get("max_lr", group.get("initial_lr", group.get("lr"))) if setting == "lr" else group.get(setting)
            )
            if not _close(value, actual):
                differences.append((row.name, setting, _plain_value(value), _plain_value(actual)))
    known = {row.name for row in plan.rows}
    differences += [(name, "parameter", "missing", "present") for name in found if name not in known]
    differences += [*_uneven_schedule(found), *_shapes(plan, dump)]
    return pd.DataFrame(differences, columns=list(COLUMNS), dtype=object)


def live(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what `audit` needs from a running optimizer as plain JSON data: settings, names and shapes, but no weights."""
    groups, shapes = [], {}
    for group in optimizer.param_groups:
        groups.append({key: _plain_value(value) for key, value in group.items() if key != "params"})
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
            shapes[name] = list(parameter.shape)
    return {"optimizer": {"param_groups": groups}, "model": shapes}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if not start.startswith((b"PK", b"\x80")):
            found = read_json(path, "a torch checkpoint or the JSON of one")
        else:  # zip files are memory-mapped: auditing a large checkpoint reads no weights
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=start == b"PK" or None)
    except FileNotFoundError:
        raise FileError(f"there is no {path}: {EXPECTED}.") from None
    except IsADirectoryError:
        raise FileError(f"{path} is a folder: {EXPECTED}, in one file.") from None
    except PermissionError:
        raise FileError(f"cannot read {path}: make it readable.") from None
    except pickle.UnpicklingError:
        raise FileError(
            f"{path} holds more than tensors and plain values, which is not safe to load: save "
            "{'optimizer': optimizer.state_dict(), 'model': model.state_dict()} alone."
        ) from None
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise FileError(
            f"{path} is not a readable checkpoint ({' '.join(str(error).split())[:120]}): save it again."
        ) from None
    if not isinstance(found, dict):
        raise FileError(f"{path} holds {type(found).__name__}: {EXPECTED}.")
    return found


def _groups(dump: dict[str, Any]) -> list[dict[str, Any]]:
    state = dump if "param_groups" in dump else dump.get("optimizer")
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups) or not groups:
        raise FileError(f"the dump has the keys {', '.join(sorted(map(str, dump))) or 'none'}: {EXPECTED}.")
    return groups


def _by_name(groups: list[dict[str, Any]], plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    named: list[tuple[str, dict[str, Any]]] = []
    for i, group in enumerate(groups):
        parameters = group.get("params")
        names = group.get("param_names", parameters)  # distributed checkpoints hold names instead of indices
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            rule = OPTIMIZERS[plan.optimizer]
            raise FileError(
                f"parameter group {i} of the dump has no names (param_names): build the optimizer with "
                f"{rule.home or 'your'}.{rule.torch_name}(plan.param_groups(model)), which keeps them."
            )
        if isinstance(parameters, list) and len(parameters) != len(names):
            raise FileError(
                f"parameter group {i} of the dump has {len(names)} names for {len(parameters)} parameters: save it again."
            )
        named += [(name, group) for name in names]
    owners = planned_names({name for name, _ in named}, {row.name for row in plan.rows})
    return [(owners[name], group) for name, group in named]


def _uneven_schedule(found: dict[str, dict[str, Any]]) -> Iterator[Difference]:
    """Yield the parameters whose lr/initial_lr differs from the most common ratio.

    A scheduler that writes one lr into all groups undoes the plan, while initial_lr still holds the planned value.
    """
    ratios = {}
    for name, group in found.items():
        start, now = _number(group.get("initial_lr")), _number(group.get("lr"))
        if start and now is not None:
            ratios[name] = now / start
    if not ratios:
        return
    usual = Counter(float(f"{ratio:.6e}") for ratio in ratios.values()).most_common(1)[0][0]
    for name, ratio in ratios.items():
        if not _close(usual, ratio, 2 * TOLERANCE):
            yield name, "lr/initial_lr", usual, ratio


def _shapes(plan: Plan, dump: dict[str, Any]) -> Iterator[Difference]:
    if dump.get("model") is None:
        return
    if not isinstance(dump["model"], dict):
        raise FileError(f"the dump's model is of type {type(dump['model']).__name__}: expected model.state_dict().")
    model = {str(name): value for name, value in dump["model"].items()}
    owners = planned_names(model, {row.name for row in plan.rows})
    model = {owners[name]: value for name, value in model.items()}
    for row in plan.rows:
        value = model.get(row.name)
        shape = None if value is None else list(getattr(value, "shape", value))
        if shape != list(row.shape):
            yield row.name, "shape", list(row.shape), shape


def _close(planned: Any, found: Any, tolerance: float = TOLERANCE) -> bool:
    if isinstance(planned, (bool, str)):
        return planned == found
    if isinstance(planned, (tuple, list)):
        same = isinstance(found, (tuple, list)) and len(found) == len(planned)
        return same and all(_close(a, b, tolerance) for a, b in zip(planned, found, strict=True))
    number = _number(found)
    return number is not None and math.isclose(planned, number, rel_tol=tolerance)


def _number(value: Any) -> float | None:
    """Return a setting as a float, or None if it is not a number; torch allows tensors as learning rates."""
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _plain_value(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain_value(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value
