"""What of a recipe is not known to transfer, one sentence each (TP-V 2203.03466, Table 1), and what nobody has verified."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .batch_duration import Ratios, law
from .errors import RequestError
from .family import Family
from .inits import InitWatcher
from .names import pattern_of
from .observing.running import LAYERS, build
from .optimizers.rules import optimizer_rule
from .parametrizations.tables import table
from .plans import Plan
from .recipe import Recipe
from .runs import RunFolder
from .scale import Scale

__all__ = ["of_columns", "of_depth", "of_evidence", "of_laws", "of_model", "of_recipe", "of_width", "regularizers"]

TABLE_1 = "TP-V 2203.03466, Table 1"
DEFAULTS = Recipe()

# What TP-V's Table 1 says of a hyperparameter, by the recipe's or the model's name for it.
REGULARIZATION = {"weight_decay", "decay", "decay_policy"}
TIED_TO_BATCH = {"betas", "beta1", "beta2", "momentum", "eps", "clip"}
TIED_TO_LENGTH = {"betas", "beta1", "beta2", "momentum", "eps", "warmup", "cooldown", "final"}
OF_THE_RUN = {"batch_size", "batch", "steps", "tokens", "epochs", "sequence_length", "warmup_steps", "max_steps"}
ALPHAS = {"alpha_input", "alpha_attention", "alpha_residual", "alpha_output"}
TRANSFERS = {"lr", "adamw_lr_ratio", "schedule", *ALPHAS}
# As models call it, in their options and in attributes of their modules: attention_dropout, resid_pdrop, drop_path_rate, …
REGULARIZES = re.compile(
    r"dropout|pdrop|drop_?path|drop_?rate|drop_?prob|drop_?connect|drop_?block|layer_?drop|token_?drop|patch_?drop|"
    r"stochastic_?depth|smoothing|mixup|cutmix|cutout|weight_?decay|regulari[sz]ation|(?:^|_)l[12](?:$|_)|noise|augment"
)
INIT_SCALE_OCTAVES = 0.5  # that its best value rises per factor 4 of width, measured from width 16 to 256 (docs/log.md)


def of_recipe(plan: Plan, tuned: Sequence[str], proxy: Scale, m_B: float, m_D: float) -> Iterator[str]:
    """Warn of every value, searched or set, that is regularization, or that is tied to a size which changes.

    A value is set where it differs from the recipe's default and the optimizer or the schedule reads it.
    """
    recipe, searched = plan.recipe, {name.rpartition(".")[2]: name for name in tuned}
    for name in dict.fromkeys([*searched, *_set(plan)]):
        value, done = getattr(recipe, name, None), "was tuned on" if name in searched else "was set for"
        what = f"{name} ({value})" if value is not None else name
        if name in REGULARIZATION or REGULARIZES.search(name):
            yield (
                f"{what} {done} the proxy, and regularisation does not transfer across scale ({TABLE_1}): choose it "
                "for the target's own data and size."
            )
        elif name in OF_THE_RUN:
            yield f"{what} {done} the proxy, and what is tied to batch or length does not transfer ({TABLE_1})."
        elif name == "init_scale":
            yield from _of_init_scale(f"{what} {done}", proxy.width, plan.scale.width)
        elif name in TIED_TO_BATCH | TIED_TO_LENGTH:
            changed = [f"batch (m_B = {m_B:g})"] if name in TIED_TO_BATCH and m_B != 1 else []
            changed += [f"duration (m_D = {m_D:g})"] if name in TIED_TO_LENGTH and m_D != 1 else []
            if changed and not _has_law(recipe, name):
                yield f"{what} {done} the proxy, is tied to the {' and the '.join(changed)}, and is carried unchanged."
        elif name in searched and name not in TRANSFERS:
            yield f"{what} was tuned on the proxy, and whether it transfers is not known: check it at two widths."


def _set(plan: Plan) -> list[str]:
    """Hyperparameters that were given a value which something reads."""
    recipe = plan.recipe
    rule, names = optimizer_rule(plan.optimizer, recipe), ["weight_decay", "init_scale", "clip", "warmup", "final"]
    if recipe.schedule == "wsd":
        names.append("cooldown")
    reads = {name: rule.told(recipe.with_(**{name: value})) for name, value in _others(recipe).items()}
    names += [name for name, told in reads.items() if told != rule.told(recipe)]
    return [name for name in names if getattr(recipe, name) != getattr(DEFAULTS, name)]


def _others(recipe: Recipe) -> dict[str, Any]:
    """Another value for each setting that only some optimizers read."""
    return {"betas": [beta / 2 for beta in recipe.betas], "momentum": recipe.momentum / 2, "eps": recipe.eps / 2}


def _has_law(recipe: Recipe, name: str) -> bool:
    """Whether the batch or duration law that the recipe names says what becomes of ``name``."""
    if recipe.law == "none":
        return False
    change = law(recipe.law).change(Ratios(2.0, 3.0, 1.0))  # any ratios, of which a law that says nothing makes 1
    moved = {**dict.fromkeys(("betas", "beta1", "beta2"), change.averaging), "eps": change.eps}
    return moved.get(name, 1.0) != 1.0


def _of_init_scale(what: str, proxy: int, target: int) -> Iterator[str]:
    if proxy == target:
        return
    octaves = INIT_SCALE_OCTAVES * math.log(target / proxy, 4)
    yield (
        f"{what} the proxy, and the best initial scale does not carry: it rises by about half an octave for every four times "
        f"the width (measured from width 16 to 256), so by about {octaves:+.1f} octaves from width {proxy} to {target}: "
        "search alpha_output in its place, whose best value does carry."
    )


def of_model(options: Mapping[str, Any], model: Mapping[str, float]) -> Iterator[str]:
    """Warn of regularization in the model's ``options``, and of what `regularizers` saw in the ``model`` itself."""
    seen = set()
    for name, value in _flat(options):
        last = name.rpartition(".")[2].lower()
        if not value or value in ("none", "off"):
            continue
        if REGULARIZES.search(last):
            seen.add(value)
            yield (
                f"{name} ({value}) is an option of the proxy's model, and regularisation does not transfer across scale "
                f"({TABLE_1}): choose it for the target's own data and size."
            )
        elif last in OF_THE_RUN:
            yield (
                f"{name} ({value}) is an option of the proxy's model, and what is tied to batch or length does not transfer "
                f"({TABLE_1})."
            )
    by_value: dict[float, list[str]] = {}
    for name, value in model.items():
        by_value.setdefault(value, []).append(name)
    for value, names in by_value.items():
        if value not in seen:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            yield (
                f"the model regularizes itself ({', '.join(names[:2])}{more}: {value:g}), and regularisation does not transfer "
                f"across scale ({TABLE_1}): choose it for the target's own data and size."
            )


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def regularizers(family: Family) -> dict[str, float]:
    """Return what regularizes the model at its base: where → its rate, which is not 0.

    Seen are dropout modules, attributes of modules that are called so (`nn.MultiheadAttention.dropout`, ``drop_prob``,
    ``label_smoothing``), and the functions of `torch.nn.functional` that the loss calls with a rate. Layer numbers stand as
    ``*``. Built and run on fake tensors, only the first layers of a deep base.
    """
    scale = family.base.with_(depth=min(family.base.depth, LAYERS))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, InitWatcher(), torch.random.fork_rng(devices=[]):
        try:
            model = build(family, scale)
        except RequestError:  # some models have a least depth
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
        except Exception:  # what fake tensors cannot run; planning has said what does not run at all
            pass
    known = set(found.values())
    return found | {name: rate for name, rate in calls.found.items() if rate not in known}


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


class _RegularizingCalls(TorchFunctionMode):
    """Notes calls of dropout, of attention with dropout, and of a smoothed cross-entropy."""

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
    """Warn of a batch or an amount of data that changes without a law; ``batch`` and ``examples`` are (proxy, target)."""
    if m_B != 1:
        yield (
            f"the batch grows {m_B:g}x ({batch[0]} to {batch[1]} examples): no batch or duration law applied, so lr, betas and "
            "eps are those of the proxy's batch."
        )
    if m_D != 1:
        yield (
            f"the run's data grows {m_D:g}x ({examples[0]} to {examples[1]} examples): no batch or duration law applied, so lr "
            "and weight decay are those of the proxy's duration."
        )


def of_depth(plan: Plan, proxy: Scale) -> Iterator[str]:
    """Warn of a depth that changes without a rule, from the proxy or from the base."""
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
    """Warn of a target that is narrower than the proxy or the base."""
    if plan.scale.width < (least := max(proxy.width, plan.base.width)):
        yield (
            f"the target's width {plan.scale.width} is smaller than the {'base' if least == plan.base.width else 'proxy'}'s "
            f"{least}: what is known of transfer is about wider models."
        )


def of_evidence(
    folder: RunFolder, recipe: Recipe, question: Mapping[str, Any], widths: Sequence[int] = ()
) -> Iterator[str]:
    """Warn of a transfer that nobody verified and of a model that nobody checked, each with the command to do it.

    Args:
        folder: the run folder.
        recipe: what is transferred.
        question: what else a verdict has to be about: "parametrization", "optimizer", "model" and "options".
        widths: for the command of a check that was not done yet.
    """
    for command in ("tune", "repeats"):
        if folder.unfinished(command):
            yield f"the search is not finished, so the recipe may not be its best: run `{folder.command('tune')}`."
            break
    fresh = {"--widths": ",".join(map(str, widths))} if widths else {}
    fresh |= {f"--{key}": question[key] for key in ("parametrization", "optimizer") if key in question}
    plain = {**question, "recipe": recipe.model_dump(mode="json")}
    yield from _of_verdict(folder, "verify", "whether the learning rate transfers was", "verified", plain, {})
    yield from _of_verdict(folder, "check", "how the model's coordinates scale was", "checked", question, fresh)


def _of_verdict(
    folder: RunFolder, command: str, what: str, verb: str, question: Mapping[str, Any], fresh: Mapping[str, Any]
) -> Iterator[str]:
    """Warn unless ``command`` ended with "pass" for this ``question``; ``fresh`` are the arguments of a first time."""
    content, before = folder.verdict(command), folder.progress(command).get("arguments")
    other = folder.differences(command, question)
    if other and (content or before):
        yield (
            f"{what} {verb} with another {' and another '.join(other)} than what is transferred: run "
            f"`{folder.command(command, fresh)}`."
        )
    elif folder.unfinished(command):
        yield f"{what} {verb} in part only, as `mutransfer {command}` did not end: go on with `{folder.command(command)}`."
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
            yield f"{what} {verb} and is undecided{why}: more seeds may tell, with `{folder.command(command, more)}`."


def of_columns(plan: Plan) -> list[str]:
    """Name the layers that need a forward multiplier on a part of their input."""
    return [
        f"{row.name} trains as planned only under a forward multiplier on a part of its input: call plan.attach(model) after "
        "building the model and before plan.initialize(model), as mutransfer's own training does."
        for row in plan.rows
        if row.columns
    ]
