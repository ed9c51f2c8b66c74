"""Load the family that a MODEL argument names: a built-in, ``file.py:name``, ``package.module:name`` or ``hf:config.json``.

Workers and target configs receive the string itself, so the model does not need to be picklable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from mutransfer.errors import DataError, MissingBaseError, RequestError, closest, nearest
from mutransfer.family import Family
from mutransfer.recipe import Scale
from mutransfer.tracing.roles import check_roles, with_roles
from mutransfer.tracing.run import build, on_fake_tensors

from .data.base import Data
from .importing import FORMS, describe_exception, guarded, import_file, import_module

__all__ = ["BUILTIN", "DEFAULT_DATA", "builtin", "load_family"]

DEFAULT_DATA = {"mlp": "digits", "resnet": "digits", "transformer": "bytes"}
DEFAULT_DEPTH = {"mlp": 4, "resnet": 2, "transformer": 2}


def cross_entropy(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean cross-entropy in nats on a batch ``(inputs, targets)``; targets can have any shape."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def _mlp(data: Data, **options: Any) -> Callable[[Scale], torch.nn.Module]:
    from .models import MLP

    inputs = data.batch(0, 1, 0)[0].numel()
    return lambda scale: MLP(inputs, scale.width, scale.depth, data.classes, **options)


def _resnet(data: Data, **options: Any) -> Callable[[Scale], torch.nn.Module]:
    from .models import ResNet

    return lambda scale: ResNet(data.inputs, scale.width, scale.depth, data.classes, **options)


def _transformer(data: Data, **options: Any) -> Callable[[Scale], torch.nn.Module]:
    from .models import Transformer, TransformerShape

    return lambda scale: Transformer(TransformerShape(scale.width, scale.depth, data.classes, **options))


BUILTIN = {"mlp": (_mlp, "images"), "resnet": (_resnet, "images"), "transformer": (_transformer, "tokens")}


def builtin(name: str, data: Data, base: Scale, batch_size: int = 32, **options: Any) -> Family:
    """Return the built-in model ``name`` as a `Family` for ``data``.

    Args:
        name: mlp, resnet or transformer.
        data: source of the example batch and of the number of classes or tokens.
        base: the base scale, at which µP changes nothing.
        batch_size: number of examples in the family's example batch.
        options: further arguments of the model (such as a transformer's ``head_dim`` or ``tied``).

    Raises:
        RequestError: if the model or an option is unknown.
        DataError: if the data is of another kind.
        BuildError: if the model cannot be built at ``base``.
    """
    if name not in BUILTIN:
        raise RequestError(f"unknown model {name!r}: {nearest(name, BUILTIN)}")
    make, kind = BUILTIN[name]
    if data.kind != kind:
        raise DataError(
            f"{name} reads {kind}, but the data {data.name!r} holds {data.kind}: choose data that holds {kind}."
        )
    build = make(data, **options)
    try:
        with torch.device("meta"):
            build(base)
    except TypeError as error:
        raise RequestError(
            f"{name} does not take these options ({error}): see its class in mutransfer.proxies.models."
        ) from None
    return Family(build, data.batch(0, batch_size, 0), cross_entropy, base, name)


BUILD = "a function build(width, depth) that returns a torch.nn.Module"


def load_family(
    model: str, data: Data | None, base: Scale | None, *, batch_size: int = 32, options: dict[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Family:  # fmt: skip
    """Return the `Family` that ``model`` names.

    A file or module provides a `Family` or a function ``build(width, depth)``. Along with a function it may define ``batch``
    (an example batch, or a function that returns one), ``loss(model, batch)`` and ``roles`` (in the format of `Family`).
    By default the example batch comes from ``data`` and the loss is the mean cross-entropy of ``(inputs, targets)``. Relative
    paths are resolved against the current folder.

    Args:
        model: name of a built-in, ``path/to/file.py:name``, ``package.module:name`` or ``hf:path/to/config.json``.
        data: source of the example batch for a built-in or a function without ``batch``.
        base: the base scale, at which µP changes nothing; optional for a `Family` or a config, whose own base it replaces.
        batch_size: number of examples in an example batch from ``data``.
        options: further keyword arguments of the built-in or of the function; for a config see
            `hf.load_transformers`.
        roles: name pattern → role; these take precedence over the family's own roles.

    Raises:
        RequestError: if there is no such model, or it cannot be imported.
        BuildError: if it cannot be built at its base, or does not return a module.
        MissingBaseError: if it has no base of its own and ``base`` is None.
        DataError: if its data is missing or does not fit it.
        RoleError: if a role is unknown.
    """
    family = _load(model, data, base, batch_size, options or {})
    return with_roles(family, check_roles(roles or {}, "roles"))


def _load(model: str, data: Data | None, base: Scale | None, batch_size: int, options: dict[str, Any]) -> Family:
    if model.startswith("hf:"):
        from .hf import load_transformers  # transformers takes seconds to import

        return load_transformers(model, data, base, batch_size=batch_size, options=options)
    if model in BUILTIN:
        return _builtin(model, data, base, batch_size, options)
    where, _, name = model.rpartition(":")
    if not where or not name.isidentifier():
        raise RequestError(_not_a_reference(model))
    is_file = where.endswith(".py") or "/" in where or "\\" in where
    module = import_file(Path(where)) if is_file else import_module(where)
    folder = Path(str(module.__file__)).parent if is_file else None  # the modules of a package can be imported already
    found = _named(module, where, name)
    if isinstance(found, Family):
        if options:
            raise RequestError(
                f"{model} is a Family and takes no options, but {', '.join(map(str, options))} is given: set it in its build."
            )
        family = found if base is None else found.with_base(base)
        family = replace(family, build=guarded(family.build, model, module.__file__, folder))
    else:
        family = _from_function(found, module, model, data, base, batch_size, options, folder)
    with on_fake_tensors():  # build once without allocating memory, so that a broken model is reported here
        build(family, family.base)
    return family


def _builtin(model: str, data: Data | None, base: Scale | None, batch_size: int, options: dict[str, Any]) -> Family:
    if data is None:
        raise DataError(f"the built-in {model} needs data, but none is given: pass --data {DEFAULT_DATA[model]}.")
    if base is None:
        raise MissingBaseError(_baseless(model))
    reserved = options.keys() & {"name", "data", "base", "batch_size"}
    if reserved:
        raise RequestError(f"{model} has no option {min(reserved)!r}: see its class in mutransfer.proxies.models.")
    family = builtin(model, data, base, batch_size, **options)
    return replace(family, build=guarded(family.build, model))


def _from_function(
    found: Any, module: ModuleType, model: str, data: Data | None, base: Scale | None, batch_size: int,
    options: dict[str, Any], folder: Path | None,
) -> Family:  # fmt: skip
    if isinstance(found, torch.nn.Module):
        raise RequestError(f"{model} is a model of one size ({type(found).__name__}): give a Family, or {BUILD}.")
    if not callable(found):
        raise RequestError(f"{model} is of type {type(found).__name__}: give a Family, or {BUILD}.")
    if _takes_nothing(found):
        raise RequestError(
            f"{model} is a function without arguments: if it returns a Family, store it in a variable and name that; "
            f"otherwise give {BUILD}."
        )
    if base is None:
        raise MissingBaseError(_baseless(model))
    batch = getattr(module, "batch", None)
    if callable(batch):
        try:
            batch = batch()
        except Exception as error:
            raise DataError(f"batch() next to {model} raised {describe_exception(error, module.__file__)}.") from error
    if batch is None:
        if data is None:
            raise DataError(
                f"there is no example batch for {model}: define `batch` next to it, make it a Family, or pass --data."
            )
        batch = data.batch(0, batch_size, 0)
    loss = getattr(module, "loss", cross_entropy)
    build = guarded(lambda scale: found(scale.width, scale.depth, **options), model, module.__file__, folder)
    roles = check_roles(getattr(module, "roles", {}), f"roles next to {model}")
    return Family(build, batch, loss, base, model.rpartition(":")[2], roles)


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        return not inspect.signature(function, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def _named(module: ModuleType, where: str, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    candidates = {
        key
        for key, value in vars(module).items()
        if isinstance(value, Family) or (callable(value) and getattr(value, "__module__", "") == module.__name__)
    }
    hint = nearest(name, candidates) if candidates else f"define a Family or {BUILD} there."
    raise RequestError(f"{where} has no {name!r}: {hint}")


def _not_a_reference(model: str) -> str:
    if model.rstrip(":").endswith(".py") or "/" in model or "." in model:
        return f"the model {model!r} lacks the name of a Family or function: write {model.rstrip(':')}:name."
    meant = closest(model, BUILTIN)
    return f"unknown model {model!r}: {f'did you mean {meant!r}?' if meant else f'give {FORMS}.'}"


def _baseless(model: str) -> str:
    return f"{model} has no base width, which µP needs to scale from: pass --base-width."
