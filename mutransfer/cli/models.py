"""Load the family and the data that MODEL names on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..family import Family
    from ..methods import Method
    from ..proxies.data import Data
    from ..recipe import Scale
    from ..sweeps.experiment import Experiment


MODEL = (
    "mlp, transformer, resnet, hf:config.json, or your own file.py:name or package.module:name: a Family, or a function "
    "build(width, depth), which also needs --base-width."
)
BASE_WIDTH_HELP = (
    "Width at which nothing is scaled; required for a bare build function. A Family and a config define their own, and "
    "built-in models have a default."
)
Parametrization = Annotated[
    str, typer.Option(help="mup, sp, completep (with depth), depth-mup, umup, spectral (for muon) or ntk (a control).")
]
Optimizer = Annotated[
    str,
    typer.Option(
        help="adamw, adam, nadam, adamax, rmsprop, adagrad, adafactor, adafactor-hf, adafactor-unscaled, lion, signum, sgd, "
        "asgd, muon or muon-match-rms-adamw."
    ),
]
FIELD = "(hf: models) A field of the config that grows with {}, instead of the inferred ones; may be repeated."
WidthField = Annotated[list[str] | None, typer.Option("--width-field", help=FIELD.format("width"))]
Roles = Annotated[
    list[str] | None,
    typer.Option("--role", help="Role of parameters by name, such as '*.router.weight=output'; may be repeated."),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Training method with its settings, such as pruned,density=0.1; by default backprop, or that of an experiment.",
    ),
]
DepthField = Annotated[list[str] | None, typer.Option("--depth-field", help=FIELD.format("depth"))]


def fields_asked_for(model: str, width: list[str] | None, depth: list[str] | None) -> dict[str, Any]:
    """Return --width-field and --depth-field as options of an ``hf:`` model.

    Raises:
        RequestError: one of them is given, but the model is not an ``hf:`` model.
    """
    from ..errors import RequestError

    options = {"width_fields": width, "depth_fields": depth}
    requested = {name: fields for name, fields in options.items() if fields}
    if requested and not model.startswith("hf:"):
        flag = f"--{min(requested).replace('_fields', '-field')}"
        raise RequestError(f"{flag} names a field of a transformers config, but {model} has none: leave it out.")
    return requested


def fields_between(family: Family, target: Scale) -> dict[str, Any] | None:
    """Return what grows in the family's config from its base to ``target``, or None if it is not an ``hf:`` model."""
    fields = getattr(family.build, "fields", None)
    return None if fields is None else dict(fields.between(family.base, target))


def family_for(
    model: str,
    data: str | None,
    base_width: int | None,
    base_depth: int | None,
    *,
    default_width: int | None = None,
    batch_size: int = 32,
    sequence_length: int = 32,
    options: dict[str, Any] | None = None,
    roles: list[str] | None = None,
) -> tuple[Family, Data | None]:
    """Return the family that MODEL names, at the requested base scale, and its data.

    Built-in models have default data, depth and (if ``default_width`` is given) base width. Other models define their own, and
    an experiment file also defines options, roles, data and base. The entries of ``roles`` have the form PATTERN=ROLE.
    """
    from .. import run_dir
    from ..proxies.data import load_data
    from ..proxies.load import DEFAULT_DATA, DEFAULT_DEPTH, load_family
    from ..recipe import Scale
    from ..tracing.roles import roles_from, with_roles

    role_overrides = roles_from(roles or (), "--role")
    if (experiment := experiment_of(model)) is not None:
        from ..sweeps.jobs import RunContext

        if data is not None:  # its path is relative to the current folder
            typed = data if experiment.folder is None else run_dir.anchored("data", data, experiment.folder)
            experiment = experiment.model_copy(update={"data": typed})
        context = RunContext(experiment)
        family, source = context.family, context.data
        at = family.base.with_(width=base_width or family.base.width, depth=base_depth or family.base.depth)
        return with_roles(family.with_base(at), role_overrides), source
    source = load_data(data or DEFAULT_DATA[model], sequence_length) if data or model in DEFAULT_DATA else None
    depth = base_depth or DEFAULT_DEPTH.get(model, 2)
    fallback = base_width or (default_width if model in DEFAULT_DATA else None)
    base = Scale(fallback, depth) if fallback else None
    if model not in DEFAULT_DATA:
        # A Family has its own base, of which only the requested sizes are replaced; a bare function needs one.
        family = load_own(model, source, base, batch_size, options)
        at = family.base.with_(width=base_width or family.base.width, depth=base_depth or family.base.depth)
        return with_roles(family.with_base(at), role_overrides), source
    return load_family(model, source, base, batch_size=batch_size, options=options, roles=role_overrides), source


def experiment_of(model: str) -> Experiment | None:
    """Return the experiment if MODEL is the path of an experiment file."""
    from pathlib import Path

    from ..sweeps.experiment import Experiment

    names_file = not model.startswith("hf:") and Path(model).suffix in (".yaml", ".yml")
    return Experiment.load(model) if names_file else None


def method_for(model: str, text: str | None) -> Method:
    """Return the training method that --method names, or else that of the experiment that MODEL names.

    Raises:
        RequestError: ``text`` is not NAME or NAME,KEY=VALUE,…, or a setting is unknown or out of range.
    """
    import yaml

    from ..errors import RequestError
    from ..recipe import Recipe

    if text is None:
        experiment = experiment_of(model)
        return Recipe().method if experiment is None else experiment.recipe.method
    name, *settings = text.split(",")
    given: dict[str, Any] = {"name": name}
    for each in settings:
        key, equals, value = each.partition("=")
        if not equals:
            raise RequestError(f"--method {text!r}: {each!r} is not of the form key=value, as in pruned,density=0.1.")
        given[key] = yaml.safe_load(value)
    return Recipe.read({"method": given}, "--method").method


def subject_of(
    model: str, parametrization: str, optimizer: str, options: dict[str, Any] | None, method: Method | None = None
) -> dict[str, Any]:
    """Return the model and the rules that scale it, as plain data (see `Experiment.subject`)."""
    experiment = experiment_of(model)
    known = {"model": model, "options": options or {}} if experiment is None else experiment.subject()
    known |= {} if method is None else {"method": str(method)}
    return {**known, "parametrization": parametrization, "optimizer": optimizer}


def load_own(
    model: str, data: Data | None, base: Scale | None, batch_size: int, options: dict[str, Any] | None
) -> Family:
    """Return the user's Family at its own base, or the family of a bare build function at ``base``."""
    from ..errors import MissingBaseError
    from ..proxies.load import load_family

    try:
        return load_family(model, data, None, batch_size=batch_size, options=options)
    except MissingBaseError:
        if base is None:
            raise
    return load_family(model, data, base, batch_size=batch_size, options=options)
