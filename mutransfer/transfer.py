"""From a tuned recipe and a plan to the big run's settings, with what is known not to transfer said out loud."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import paths
from .errors import RequestError, nearest
from .files import read_json, write_json
from .optimizers.rules import optimizer_rule
from .parametrizations.tables import table
from .planning import apply_law
from .plans import Plan
from .scale import Scale
from .transferability import of_columns, of_depth, of_laws, of_model, of_recipe, of_width

__all__ = ["TargetConfig", "target_config"]

FORMAT = "mutransfer-target/1"
KEYS = (
    "format", "model", "options", "data", "sequence_length", "scale", "base", "parametrization", "optimizer", "recipe",
    "parameters", "groups", "schedule", "clip", "batch_size", "steps", "tokens", "seed", "provenance", "warnings", "notes",
)  # fmt: skip


@dataclass(frozen=True)
class TargetConfig:
    """Everything the big run needs. A type of its own, so that a proxy's result cannot be mistaken for it.

    Args:
        model: reference of the model, as on the command line.
        options: further arguments of the model.
        data: name of the data, as on the command line.
        sequence_length: tokens per example; 1 for images.
        plan: the settings of every parameter at the target's scale.
        batch_size: examples per step.
        steps: optimizer steps of the whole run.
        seed: of the initial weights and of the order of the data.
        provenance: where the recipe came from (plain JSON data): proxy, study, hashes, versions.
        warnings: what does not, or may not, transfer; one sentence each.
        beside: the folder of the file that it was read from.

    Raises:
        RequestError: a value of the wrong kind, or one that JSON cannot hold.
    """

    model: str
    options: dict[str, Any]
    data: str
    sequence_length: int
    plan: Plan
    batch_size: int
    steps: int
    seed: int
    provenance: dict[str, Any]
    warnings: tuple[str, ...] = ()
    beside: Path = field(default=Path(), compare=False)

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 1), ("batch_size", 1), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RequestError(f"{name} is {value!r}: give a whole number of at least {least}.")
        for name in ("model", "data"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise RequestError(f"{name} is {getattr(self, name)!r}: give its name as on the command line.")
        for name in ("options", "provenance"):
            value = getattr(self, name)
            try:
                plain = json.loads(json.dumps(value, allow_nan=False))  # a copy of our own, tuples as lists
            except (TypeError, ValueError):
                plain = None
            if not isinstance(plain, dict):
                raise RequestError(f"{name} is {value!s:.200}: give a dictionary that JSON can hold.")
            object.__setattr__(self, name, plain)
        if not all(isinstance(text, str) for text in self.warnings):
            raise RequestError(f"warnings is {self.warnings!s:.200}: give sentences.")

    def found(self) -> tuple[dict[str, str], str | None]:
        """Return the references to model, data and trainer as they lead from the current folder, and the folder they are in.

        What was recorded is looked for from the file of the target, then where it was (`paths.found`).

        Raises:
            RequestError: one of them is gone.
        """
        call = (self.provenance.get("trainer") or {}).get("call")
        references = {"model": self.model, "data": self.data, **({} if call is None else {"call": str(call)})}
        folder = self.provenance.get("folder")
        if folder is None:  # written by an earlier version, whose paths led from the current folder
            return references, None
        places = self.provenance.get("places", {})
        now, home = paths.found(references, folder, places, self.beside, f"the target {self.model}")
        return {key: paths.from_here(key, each, home) for key, each in now.items()}, home

    @property
    def tokens(self) -> int:
        """Training examples (tokens for language models) of the whole run."""
        return self.batch_size * self.steps * self.sequence_length

    def as_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON data with the keys ``KEYS``; `load` reads it back."""
        planned, recipe = self.plan.as_dict(), self.plan.recipe
        rule = optimizer_rule(self.plan.optimizer, recipe)
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in rule.settings(self.plan.in_force).items()}
        found = {
            **{key: planned[key] for key in ("scale", "base", "parametrization", "recipe", "parameters", "notes")},
            "format": FORMAT,
            "model": self.model,
            "options": self.options,
            "data": self.data,
            "sequence_length": self.sequence_length,
            "optimizer": {"name": rule.name, "torch_name": rule.torch_name, "settings": settings},
            "groups": self.plan.groups(),
            "schedule": {
                "name": recipe.schedule,
                "warmup": recipe.warmup,
                "cooldown": recipe.cooldown,
                "final": recipe.final,
                "steps": self.steps,
            },
            "clip": recipe.clip,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "tokens": self.tokens,
            "seed": self.seed,
            "provenance": self.provenance,
            "warnings": list(self.warnings),
        }
        return {key: found[key] for key in KEYS}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the config as JSON, whole or not at all."""
        return write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TargetConfig:
        """Read what `save` wrote.

        Raises:
            RequestError: the file is missing, is not a target config, is damaged, or was edited so that its parts
                contradict each other.
        """
        data = read_json(path, "a target config, as `mutransfer transfer` writes it")
        _refuse_other_files(data, path)
        try:
            plan = Plan.from_dict({**data, "optimizer": data["optimizer"]["name"]}, str(path))
            table(plan.parametrization)
            names = ("model", "options", "data", "sequence_length", "batch_size", "steps", "seed", "provenance")
            target = cls(
                plan=plan, warnings=tuple(data["warnings"]), beside=Path(path).parent,
                **{name: data[name] for name in names},
            )  # fmt: skip
            again = json.loads(json.dumps(target.as_dict()))
        except RequestError as error:
            sentence = str(error)
            raise RequestError(sentence if str(path) in sentence else f"{path}: {sentence}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{path} holds a damaged target config ({_text(error)}): write it again.") from None
        target._refuse_contradictions(again, data, path)
        return target

    def _refuse_contradictions(self, again: dict[str, Any], data: dict[str, Any], path: Any) -> None:
        """Some keys follow from others: a reader who edits one of them would be silently ignored."""
        for key in KEYS:
            if again[key] != data[key]:
                raise RequestError(
                    f"{path}: {key} contradicts the rest of the file, from which it follows: change the recipe and run "
                    "`mutransfer transfer` again instead of editing it."
                )
        recipe = self.plan.recipe
        rule = optimizer_rule(self.plan.optimizer, recipe)
        if recipe.alpha_input == recipe.alpha_attention == recipe.alpha_residual == recipe.alpha_output == 1:
            for row in self.plan.rows:
                lr, _ = rule.of(row).base(recipe)
                if row.multiplier == 1 and not math.isclose(row.lr, lr * row.lr_factor, rel_tol=1e-9):
                    raise RequestError(
                        f"{path}: lr of {row.name} is {row.lr:g}, and the recipe's lr {lr:g} times its factor "
                        f"{row.lr_factor:g} is not: run `mutransfer transfer` again instead of editing it."
                    )


def target_config(
    plan: Plan,
    *,
    model: str,
    options: dict[str, Any],
    data: str,
    sequence_length: int,
    proxy: Scale,
    proxy_batch_size: int,
    proxy_steps: int,
    batch_size: int,
    steps: int,
    tuned: Sequence[str],
    seed: int,
    provenance: dict[str, Any],
    proxy_parameters: int | None = None,
    regularizers: Mapping[str, float] | None = None,
    unproven: Sequence[str] = (),
) -> TargetConfig:
    """Return the settings of the big run, with a warning for everything that is not known to carry over.

    Args:
        plan: the settings of every parameter at the target's scale, from the tuned recipe.
        model: reference of the model, as on the command line.
        options: further arguments of the model.
        data: name of the data.
        sequence_length: tokens per example, in the proxy and in the target; 1 for images.
        proxy: the scale at which the recipe was tuned.
        proxy_batch_size: examples per step of the proxy.
        proxy_steps: optimizer steps of the proxy.
        batch_size: examples per step of the target.
        steps: optimizer steps of the target.
        tuned: which hyperparameters were searched, by their names in the recipe; a dotted prefix does not matter.
        seed: of the target run.
        provenance: where the recipe came from; the proxy and the tuned names are added.
        proxy_parameters: how many the proxy has, which the law power-lines needs.
        regularizers: what regularizes the model itself, as `transferability.regularizers` saw it.
        unproven: sentences on what was not verified (`transferability.of_evidence`); they become warnings, and are kept in the
            provenance as well, as they may be true only today.

    Raises:
        RequestError: a batch or duration law that does not fit, a size that is not a positive whole number, or something
            that JSON cannot hold.
    """
    proxy = proxy.with_(batch=proxy_batch_size, tokens=None)
    origin = {
        "proxy": {**proxy.as_dict(), "steps": proxy_steps}, "tuned": list(tuned), "unproven": list(unproven),
    }  # fmt: skip
    if isinstance(proxy_steps, bool) or not isinstance(proxy_steps, int) or proxy_steps < 1:
        raise RequestError(f"proxy_steps is {proxy_steps!r}: give a whole number of at least 1.")
    target = TargetConfig(
        model, options, data, sequence_length, plan, batch_size, steps, seed, {**origin, **provenance}
    )
    m_B = batch_size / proxy_batch_size
    m_D = m_B * steps / proxy_steps
    unchanged = plan.recipe.law == "none"
    if not unchanged:
        tokens = proxy_batch_size * proxy_steps * sequence_length
        grown = None if proxy_parameters is None else sum(math.prod(row.shape) for row in plan.rows) / proxy_parameters
        sizes = plan.scale.with_(batch=batch_size, tokens=target.tokens)
        plan = apply_law(plan, sizes, proxy.with_(batch=proxy_batch_size, tokens=tokens), grown)
    warnings = [
        *unproven,
        *of_recipe(plan, tuned, proxy, m_B, m_D),
        *of_model(options, regularizers or {}),
        *(
            of_laws(m_B, m_D, (proxy_batch_size, batch_size), (proxy_batch_size * proxy_steps, batch_size * steps))
            if unchanged
            else ()
        ),
        *of_depth(plan, proxy),
        *of_width(plan, proxy),
        *of_columns(plan),
    ]
    scale = plan.scale.with_(batch=batch_size, tokens=target.tokens)
    warned = table(plan.parametrization).without_depth(plan.base.depth, plan.scale.depth)  # by `of_depth`
    notes = tuple(note for note in plan.notes if note != warned)
    return replace(target, plan=replace(plan, scale=scale, notes=notes), warnings=tuple(dict.fromkeys(warnings)))


def _refuse_other_files(data: Any, path: Any) -> None:
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        is_recipe = isinstance(data, dict) and "lr" in data
        what = f"has the format {found!r}" if found else "holds a recipe" if is_recipe else "has no format key"
        raise RequestError(
            f"{path} {what} and is not a target config ({FORMAT}): make one with `mutransfer transfer RUN --width W`."
        )
    for key in KEYS:
        if key not in data:
            raise RequestError(f"{path}: the key {key!r} is missing: run `mutransfer transfer` again.")
    for key in data:
        if key not in KEYS:
            raise RequestError(f"{path}: unknown key {key!r}: {nearest(key, KEYS)}")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
