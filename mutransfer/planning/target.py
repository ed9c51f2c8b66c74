"""Target configs: the settings of a target run, from a tuned recipe and a plan, with warnings for what may not transfer.

What transfers is listed in TP-V 2203.03466, Table 1.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch.overrides import TorchFunctionMode

from .. import run_dir
from .._torch_internals import FakeTensorMode, tree_map_only
from ..config import Positive, Settings, Whole, read_by
from ..errors import BuildError, RequestError, SettingsError
from ..family import Family
from ..initialization import InitTracer
from ..io import read_json, write_json
from ..optimizers.rules import optimizer_rule
from ..param_names import pattern_of
from ..parametrizations.tables import table
from ..recipe import Recipe, Scale
from ..run_dir import RunFolder
from ..tracing.run import LAYERS, build
from .build import apply_law
from .laws import Ratios, law
from .plan import Plan

__all__ = [
    "TargetConfig",
    "of_columns",
    "of_depth",
    "of_evidence",
    "of_laws",
    "of_model",
    "of_recipe",
    "of_width",
    "regularizers",
    "target_config",
]

FORMAT = "mutransfer-target/1"
KEYS = (
    "format", "model", "options", "data", "sequence_length", "scale", "base", "parametrization", "optimizer", "recipe",
    "parameters", "groups", "schedule", "clip", "batch_size", "steps", "tokens", "seed", "provenance", "warnings", "notes",
)  # fmt: skip

Name = Annotated[str, Field(min_length=1)]


def _as_json(value: Any) -> Any:
    """Return an independent copy of ``value`` as JSON data, with tuples as lists."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError(f"{value!s:.200} cannot be stored as JSON: give a dictionary that can.") from None


class TargetValues(Settings):
    """The settings of a target run besides its plan; see `TargetConfig`."""

    model: Name
    options: Annotated[dict[str, Any], BeforeValidator(_as_json)]
    data: Name
    sequence_length: Positive
    batch_size: Positive
    steps: Positive
    seed: Annotated[Whole, Field(ge=0)]
    provenance: Annotated[dict[str, Any], BeforeValidator(_as_json)]
    warnings: tuple[str, ...]


class _TargetFile(TargetValues):
    """A target config as `TargetConfig.save` writes it; `Plan.from_dict` reads the plan in it, and the rest follows from both."""

    format: str
    scale: Any
    base: Any
    parametrization: Any
    optimizer: Annotated[str, read_by(lambda data: str(data["name"]))]
    recipe: Any
    parameters: Any
    groups: Any
    schedule: Any
    clip: Any
    tokens: Any
    notes: Any


@dataclass(frozen=True)
class TargetConfig:
    """All settings of the target run. Unlike a `Recipe`, whose values refer to the base scale, it holds the target's own values.

    Args:
        model: reference to the model, as on the command line.
        options: further arguments of the model.
        data: name of the data, as on the command line.
        sequence_length: tokens per example; 1 for images.
        plan: the settings of every parameter at the target's scale.
        batch_size: examples per step.
        steps: optimizer steps of the whole run.
        seed: seed of the initial weights and of the order of the data.
        provenance: where the recipe came from, as plain JSON data: proxy, study, hashes, versions.
        warnings: what does not, or may not, transfer; one sentence each.
        read_from: the folder of the file that the config was read from.

    Raises:
        SettingsError: a value has the wrong type, or cannot be stored as JSON.
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
    read_from: Path = field(default=Path(), compare=False)

    def __post_init__(self) -> None:
        checked = TargetValues(**{name: getattr(self, name) for name in TargetValues.model_fields})
        for name in ("options", "provenance"):
            object.__setattr__(self, name, getattr(checked, name))

    def found(self) -> tuple[dict[str, str], str | None]:
        """Find the files that the target refers to; return the references to model, data and trainer, and their folder.

        References are relative to the current folder. The folder is None in targets that earlier versions wrote.

        Raises:
            FileError: one of them no longer exists.
        """
        call = (self.provenance.get("trainer") or {}).get("call")
        references = {"model": self.model, "data": self.data, **({} if call is None else {"call": str(call)})}
        folder = self.provenance.get("folder")
        if folder is None:  # written by an earlier version, with paths relative to the current folder
            return references, None
        places = self.provenance.get("places", {})
        now, home = run_dir.found(references, folder, places, self.read_from, f"the target {self.model}")
        return {key: run_dir.from_here(key, each, home) for key, each in now.items()}, home

    @property
    def tokens(self) -> int:
        """Training examples (tokens for language models) of the whole run."""
        return self.batch_size * self.steps * self.sequence_length

    def as_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON data with the keys ``KEYS``, which `save` writes."""
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
        """Write the config as JSON, atomically."""
        return write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TargetConfig:
        """Read a config that `save` wrote.

        Raises:
            FileError: the file is missing or not JSON.
            SettingsError: it is not a target config, is damaged, or was edited so that its parts contradict each other.
        """
        data = read_json(path, "a target config, as `mutransfer transfer` writes it")
        _refuse_other_files(data, path)
        found = _TargetFile.read(data, str(path), "run `mutransfer transfer` again")
        plan = Plan.from_dict({**data, "optimizer": found.optimizer}, str(path))
        values = {name: getattr(found, name) for name in TargetValues.model_fields}
        target = cls(plan=plan, read_from=Path(path).parent, **values)
        try:
            again = json.loads(json.dumps(target.as_dict()))
        except RequestError as error:  # the recipe does not fit the optimizer
            raise type(error)(f"{path}: {error}") from None
        target._refuse_contradictions(again, data, path)
        return target

    def _refuse_contradictions(self, again: dict[str, Any], data: dict[str, Any], path: Any) -> None:
        """Raise if a key that follows from others was edited: the edit would otherwise be silently ignored."""
        for key in KEYS:
            if again[key] != data[key]:
                raise SettingsError(
                    f"{path}: {key} contradicts the rest of the file, from which it is derived: change the recipe and run "
                    "`mutransfer transfer` again instead of editing it."
                )
        recipe = self.plan.recipe
        rule = optimizer_rule(self.plan.optimizer, recipe)
        if recipe.alpha_input == recipe.alpha_attention == recipe.alpha_residual == recipe.alpha_output == 1:
            for row in self.plan.rows:
                lr, _ = rule.of(row).base(recipe)
                if row.multiplier == 1 and not math.isclose(row.lr, lr * row.lr_factor, rel_tol=1e-9):
                    raise SettingsError(
                        f"{path}: lr of {row.name} is {row.lr:g}, which is not the recipe's lr {lr:g} times its factor "
                        f"{row.lr_factor:g}: run `mutransfer transfer` again instead of editing it."
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
    """Return the settings of the target run, with a warning for everything that is not known to transfer.

    Args:
        plan: the settings of every parameter at the target's scale, from the tuned recipe.
        model: reference to the model, as on the command line.
        options: further arguments of the model.
        data: name of the data.
        sequence_length: tokens per example, in the proxy and in the target; 1 for images.
        proxy: the scale at which the recipe was tuned.
        proxy_batch_size: examples per step of the proxy.
        proxy_steps: optimizer steps of the proxy.
        batch_size: examples per step of the target.
        steps: optimizer steps of the target.
        tuned: names of the hyperparameters that were searched; a prefix, as in ``recipe.lr``, is ignored.
        seed: seed of the target run.
        provenance: where the recipe came from; the proxy and the tuned names are added.
        proxy_parameters: number of parameters of the proxy; required by the law ``power-lines``.
        regularizers: regularization in the model itself, as returned by `regularizers`.
        unproven: sentences on what was not verified (`of_evidence`); they become warnings, and are also stored in the
            provenance, so that a report can drop them after a later `verify` or `check`.

    Raises:
        RequestError: a batch or duration law does not apply, a size is not a positive whole number, or a value cannot be
            stored as JSON.
    """
    proxy = proxy.with_(batch=proxy_batch_size, tokens=None)
    origin = {
        "proxy": {**proxy.as_dict(), "steps": proxy_steps}, "tuned": list(tuned), "unproven": list(unproven),
    }  # fmt: skip
    if isinstance(proxy_steps, bool) or not isinstance(proxy_steps, int) or proxy_steps < 1:
        raise SettingsError(f"proxy_steps is {proxy_steps!r}: give a whole number of at least 1.")
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
    warned = table(plan.parametrization).without_depth(plan.base.depth, plan.scale.depth)  # `of_depth` warns of it
    notes = tuple(note for note in plan.notes if note != warned)
    return replace(target, plan=replace(plan, scale=scale, notes=notes), warnings=tuple(dict.fromkeys(warnings)))


def _refuse_other_files(data: Any, path: Any) -> None:
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        is_recipe = isinstance(data, dict) and "lr" in data
        what = f"has the format {found!r}" if found else "holds a recipe" if is_recipe else "has no format key"
        raise SettingsError(
            f"{path} {what}, so it is not a target config ({FORMAT}): make one with `mutransfer transfer RUN --width W`."
        )


TABLE_1 = "TP-V 2203.03466, Table 1"
DEFAULTS = Recipe()

# Hyperparameters by what TP-V's Table 1 says about them, under the recipe's or the model's name.
REGULARIZATION = {"weight_decay", "decay", "decay_policy"}
TIED_TO_BATCH = {"betas", "beta1", "beta2", "momentum", "eps", "clip"}
TIED_TO_LENGTH = {"betas", "beta1", "beta2", "momentum", "eps", "warmup", "cooldown", "final"}
OF_THE_RUN = {"batch_size", "batch", "steps", "tokens", "epochs", "sequence_length", "warmup_steps", "max_steps"}
ALPHAS = {"alpha_input", "alpha_attention", "alpha_residual", "alpha_output"}
TRANSFERS = {"lr", "adamw_lr_ratio", "schedule", *ALPHAS}
# Names of regularization in model options and module attributes: attention_dropout, resid_pdrop, drop_path_rate, …
REGULARIZES = re.compile(
    r"dropout|pdrop|drop_?path|drop_?rate|drop_?prob|drop_?connect|drop_?block|layer_?drop|token_?drop|patch_?drop|"
    r"stochastic_?depth|smoothing|mixup|cutmix|cutout|weight_?decay|regulari[sz]ation|(?:^|_)l[12](?:$|_)|noise|augment"
)
# Rise of the best init_scale per factor 4 in width, measured from width 16 to 256 (docs/log.md).
INIT_SCALE_OCTAVES = 0.5


def of_recipe(plan: Plan, tuned: Sequence[str], proxy: Scale, m_B: float, m_D: float) -> Iterator[str]:
    """Yield a warning for every searched or set hyperparameter that is regularization or is tied to a size that changes.

    A hyperparameter counts as set if it differs from the recipe's default and the optimizer or the schedule reads it.
    """
    recipe, searched = plan.recipe, {name.rpartition(".")[2]: name for name in tuned}
    for name in dict.fromkeys([*searched, *_set(plan)]):
        value, done = getattr(recipe, name, None), "was tuned on" if name in searched else "was set for"
        what = f"{name} ({value})" if value is not None else name
        if name in REGULARIZATION or REGULARIZES.search(name):
            yield (
                f"{what} {done} the proxy, but regularization does not transfer across scale ({TABLE_1}): choose it "
                "for the target's own data and size."
            )
        elif name in OF_THE_RUN:
            yield f"{what} {done} the proxy, but settings tied to batch or length do not transfer ({TABLE_1})."
        elif name == "init_scale":
            yield from _of_init_scale(f"{what} {done}", proxy.width, plan.scale.width)
        elif name in TIED_TO_BATCH | TIED_TO_LENGTH:
            changed = [f"batch (m_B = {m_B:g})"] if name in TIED_TO_BATCH and m_B != 1 else []
            changed += [f"duration (m_D = {m_D:g})"] if name in TIED_TO_LENGTH and m_D != 1 else []
            if changed and not _has_law(recipe, name):
                yield f"{what} {done} the proxy, is tied to the {' and the '.join(changed)}, and is carried over unchanged."
        elif name in searched and name not in TRANSFERS:
            yield f"{what} was tuned on the proxy, but it is not known whether it transfers: check it at two widths."


def _set(plan: Plan) -> list[str]:
    """Return the hyperparameters that differ from their defaults and are read by the optimizer or the schedule."""
    recipe = plan.recipe
    rule, names = optimizer_rule(plan.optimizer, recipe), ["weight_decay", "init_scale", "clip", "warmup", "final"]
    if recipe.schedule == "wsd":
        names.append("cooldown")
    reads = {name: rule.reads(recipe.with_(**{name: value})) for name, value in _others(recipe).items()}
    names += [name for name, read in reads.items() if read != rule.reads(recipe)]
    return [name for name in names if getattr(recipe, name) != getattr(DEFAULTS, name)]


def _others(recipe: Recipe) -> dict[str, Any]:
    """Return a different value for each setting that only some optimizers read."""
    return {"betas": [beta / 2 for beta in recipe.betas], "momentum": recipe.momentum / 2, "eps": recipe.eps / 2}


def _has_law(recipe: Recipe, name: str) -> bool:
    """Return whether the recipe's batch or duration law rescales ``name``."""
    if recipe.law == "none":
        return False
    change = law(recipe.law).change(Ratios(2.0, 3.0, 1.0))  # arbitrary ratios: what the law does not change stays at 1
    moved = {**dict.fromkeys(("betas", "beta1", "beta2"), change.averaging), "eps": change.eps}
    return moved.get(name, 1.0) != 1.0


def _of_init_scale(what: str, proxy: int, target: int) -> Iterator[str]:
    if proxy == target:
        return
    octaves = INIT_SCALE_OCTAVES * math.log(target / proxy, 4)
    yield (
        f"{what} the proxy, but the best initial scale does not transfer: it rises by about half an octave whenever the width "
        f"quadruples (measured from width 16 to 256), so by about {octaves:+.1f} octaves from width {proxy} to {target}: "
        "search alpha_output instead, whose best value does transfer."
    )


def of_model(options: Mapping[str, Any], model: Mapping[str, float]) -> Iterator[str]:
    """Yield warnings for regularization in the model's ``options``, and for what `regularizers` found in the ``model``."""
    seen = set()
    for name, value in _flat(options):
        last = name.rpartition(".")[2].lower()
        if not value or value in ("none", "off"):
            continue
        if REGULARIZES.search(last):
            seen.add(value)
            yield (
                f"{name} ({value}) is an option of the proxy's model, but regularization does not transfer across scale "
                f"({TABLE_1}): choose it for the target's own data and size."
            )
        elif last in OF_THE_RUN:
            yield (
                f"{name} ({value}) is an option of the proxy's model, but settings tied to batch or length do not transfer "
                f"({TABLE_1})."
            )
    by_value: dict[float, list[str]] = {}
    for name, value in model.items():
        by_value.setdefault(value, []).append(name)
    for value, names in by_value.items():
        if value not in seen:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            yield (
                f"the model itself uses regularization ({', '.join(names[:2])}{more}: {value:g}), which does not transfer "
                f"across scale ({TABLE_1}): choose it for the target's own data and size."
            )


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def regularizers(family: Family) -> dict[str, float]:
    """Return the regularization in the model at its base: where → its nonzero rate.

    Detected are dropout modules, module attributes with names of regularization (`nn.MultiheadAttention.dropout`,
    ``drop_prob``, ``label_smoothing``), and functions of `torch.nn.functional` that the loss calls with a rate. Layer numbers
    are replaced by ``*``. The model is built and run on fake tensors, with only the first layers of a deep base.
    """
    scale = family.base.with_(depth=min(family.base.depth, LAYERS))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, InitTracer(), torch.random.fork_rng(devices=[]):
        try:
            model = build(family, scale)
        except BuildError:  # some models have a minimum depth
            model = build(family, family.base)
        found = {}
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                named = attribute in ("p", "rate") and REGULARIZES.search(type(module).__name__.lower())
                if (named or REGULARIZES.search(attribute.lower())) and _is_rate(value):
                    found[pattern_of(name or type(module).__name__) + ("" if named else f".{attribute}")] = float(value)
        model.train()
        calls = _RegularizingCalls()
        try:
            with torch.no_grad(), calls:
                family.loss(model, tree_map_only(torch.Tensor, mode.from_tensor, family.batch))
        except Exception:  # not all models run on fake tensors; planning reports those that do not run at all
            pass
    known = set(found.values())
    return found | {name: rate for name, rate in calls.found.items() if rate not in known}


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


class _RegularizingCalls(TorchFunctionMode):
    """Records calls of dropout, of attention with dropout, and of cross-entropy with label smoothing."""

    DROPOUT = re.compile(r"^(?:alpha_|feature_|feature_alpha_|native_)?dropout[123]?d?_?$")

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.DROPOUT.match(name):
            rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
            self._note(name, rate if training else 0.0)
        elif name == "scaled_dot_product_attention":
            self._note(f"{name}.dropout_p", kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
        elif name == "cross_entropy":
            self._note(f"{name}.label_smoothing", kwargs.get("label_smoothing", 0.0))
        return func(*args, **kwargs)

    def _note(self, name: str, rate: object) -> None:
        if _is_rate(rate):
            self.found[f"torch.nn.functional.{name}"] = float(rate)  # type: ignore[arg-type]


def of_laws(m_B: float, m_D: float, batch: tuple[int, int], examples: tuple[int, int]) -> Iterator[str]:
    """Yield warnings for a batch or amount of data that changes without a law; ``batch``, ``examples``: (proxy, target)."""
    if m_B != 1:
        yield (
            f"the batch grows {m_B:g}x ({batch[0]} to {batch[1]} examples): no batch or duration law is applied, so lr, betas "
            "and eps are those of the proxy's batch."
        )
    if m_D != 1:
        yield (
            f"the run's data grows {m_D:g}x ({examples[0]} to {examples[1]} examples): no batch or duration law is applied, "
            "so lr and weight decay are those of the proxy's duration."
        )


def of_depth(plan: Plan, proxy: Scale) -> Iterator[str]:
    """Yield a warning for a depth that differs from the proxy's or the base's when there is no rule for depth."""
    rules = table(plan.parametrization)
    if rules.depth is not None:
        return
    for what, depth in {"proxy": proxy.depth, "base model": plan.base.depth}.items():
        if plan.scale.depth != depth:
            yield (
                f"depth goes from {depth} in the {what} to {plan.scale.depth}, and "
                f"{rules.without_depth(depth, plan.scale.depth)}"
            )
            return


def of_width(plan: Plan, proxy: Scale) -> Iterator[str]:
    """Yield a warning for a target that is narrower than the proxy or the base."""
    if plan.scale.width < (least := max(proxy.width, plan.base.width)):
        yield (
            f"the target's width {plan.scale.width} is smaller than the {'base' if least == plan.base.width else 'proxy'}'s "
            f"{least}: transfer is only known to hold toward wider models."
        )


def of_evidence(
    folder: RunFolder, recipe: Recipe, question: Mapping[str, Any], widths: Sequence[int] = ()
) -> Iterator[str]:
    """Yield warnings for a transfer that was not verified and a model that was not checked, each with the command to run.

    Args:
        folder: the run folder.
        recipe: the recipe to transfer.
        question: what else a verdict must apply to: "parametrization", "optimizer", "model" and "options".
        widths: for the command of a check that has not been run yet.
    """
    for command in ("tune", "repeats"):
        if folder.unfinished(command):
            yield f"the search is not finished, so the recipe may not be its best: run `{folder.command('tune')}`."
            break
    fresh = {"--widths": ",".join(map(str, widths))} if widths else {}
    fresh |= {f"--{key}": question[key] for key in ("parametrization", "optimizer") if key in question}
    plain = {**question, "recipe": recipe.model_dump(mode="json")}
    yield from _of_verdict(folder, "verify", "the transfer of the learning rate was", "verified", plain, {})
    yield from _of_verdict(folder, "check", "the scaling of the model's coordinates was", "checked", question, fresh)


def _of_verdict(
    folder: RunFolder, command: str, what: str, verb: str, question: Mapping[str, Any], fresh: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a warning unless ``command`` passed for this ``question``; ``fresh`` are the arguments of a first run."""
    content, before = folder.verdict(command), folder.progress(command).get("arguments")
    other = folder.differences(command, question)
    if other and (content or before):
        yield (
            f"{what} {verb} for another {' and another '.join(other)} than the one to be transferred: run "
            f"`{folder.command(command, fresh)}`."
        )
    elif folder.unfinished(command):
        yield f"{what} only partly {verb}, as `mutransfer {command}` did not finish: continue with `{folder.command(command)}`."
    elif content is None:
        yield f"{what} never {verb}: run `{folder.command(command, fresh)}`."
    elif (status := content.get("verdict")) != "pass":
        cause = content.get("cause") or next(iter(content.get("reasons") or ()), None)
        why = f" ({str(cause).rstrip('.')})" if cause else ""
        if status == "fail":
            yield f"{what} {verb} and failed{why}: do not rely on this recipe, and see why with `{folder.command('report')}`."
        else:
            more = dict(before or fresh)
            if "--seeds" in more:
                more["--seeds"] = 2 * int(more["--seeds"])
            yield f"{what} {verb} without a decision{why}: try more seeds, with `{folder.command(command, more)}`."


def of_columns(plan: Plan) -> list[str]:
    """Return warnings for the layers that need a forward multiplier on a part of their input."""
    return [
        f"{row.name} trains as planned only with a forward multiplier on a part of its input: call plan.attach(model) after "
        "building the model and before plan.initialize(model), as mutransfer's own training does."
        for row in plan.rows
        if row.columns
    ]
