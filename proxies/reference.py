"""From what a person writes for MODEL to a family: a built-in name, ``file.py:name`` or ``package.module:name``.

The string itself is what travels to workers and into target configs; nothing that it leads to needs to be picklable.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mutransfer.errors import RequestError, nearest
from mutransfer.family import Family
from mutransfer.scale import Scale

from .builtin import BUILTIN, DEFAULT_DATA, builtin, cross_entropy
from .data.base import Data

__all__ = ["load_family"]

FORMS = "a built-in (mlp, resnet, transformer), path/to/file.py:name or package.module:name"
BUILD = "a function build(width, depth) that returns a torch.nn.Module"

_loaded: dict[Path, tuple[tuple[int, int], ModuleType]] = {}  # file → (its time and size when read, what it gave)
_beside: dict[str, Path] = {}  # helper module → the folder it was imported from


def load_family(
    model: str, data: Data | None, base: Scale | None, *, batch_size: int = 32, options: dict[str, Any] | None = None
) -> Family:
    """Return the family that ``model`` names.

    A file or module gives a `Family`, or a function ``build(width, depth)``; beside a function it may define ``batch`` (an
    example batch or a function that returns one) and ``loss(model, batch)``. Without them the example batch is the
    data's and the loss the mean cross-entropy of ``(inputs, targets)``. Relative paths are taken from the current folder.

    Args:
        model: a built-in's name, ``path/to/file.py:name`` or ``package.module:name``.
        data: where a built-in's, or a bare function's, example batch comes from.
        base: the scale at which µP changes nothing; a `Family` brings its own, which this replaces if given.
        batch_size: examples in the example batch, where it comes from ``data``.
        options: further keyword arguments of the built-in or of the function.

    Raises:
        RequestError: there is no such model, it cannot be imported or built, or its base or data is not given.
    """
    options = options or {}
    if model.startswith("hf:"):
        raise RequestError(
            f"{model!r}: hf: references are not in this version, so build the transformers model in a file.py as a "
            "mutransfer.Family and pass file.py:name."
        )
    if model in BUILTIN:
        return _builtin(model, data, base, batch_size, options)
    where, _, name = model.rpartition(":")
    if not where or not name.isidentifier():
        raise RequestError(_not_a_reference(model))
    is_file = where.endswith(".py") or "/" in where or "\\" in where
    module = _import_file(Path(where)) if is_file else _import_module(where)
    folder = Path(str(module.__file__)).parent if is_file else None  # a package finds its own modules
    found = _named(module, where, name)
    if isinstance(found, Family):
        if options:
            raise RequestError(
                f"{model} is a Family and takes no options, and {', '.join(map(str, options))} is given: set it in its build."
            )
        family = found if base is None else found.with_base(base)
        family = replace(family, build=_guarded(family.build, model, module.__file__, folder))
    else:
        family = _from_function(found, module, model, data, base, batch_size, options, folder)
    with FakeTensorMode(allow_non_fake_inputs=True):  # no memory: whether it can be built is known at once
        family.build(family.base)
    return family


def _builtin(model: str, data: Data | None, base: Scale | None, batch_size: int, options: dict[str, Any]) -> Family:
    if data is None:
        raise RequestError(f"the built-in {model} needs data, and none is given: pass --data {DEFAULT_DATA[model]}.")
    if base is None:
        raise RequestError(_baseless(model))
    reserved = options.keys() & {"name", "data", "base", "batch_size"}
    if reserved:
        raise RequestError(f"{model} has no option {min(reserved)!r}: see its class in mutransfer.proxies.models.")
    family = builtin(model, data, base, batch_size, **options)
    return replace(family, build=_guarded(family.build, model))


def _from_function(
    found: Any, module: ModuleType, model: str, data: Data | None, base: Scale | None, batch_size: int,
    options: dict[str, Any], folder: Path | None,
) -> Family:  # fmt: skip
    if isinstance(found, torch.nn.Module):
        raise RequestError(f"{model} is a model of one size ({type(found).__name__}): give a Family, or {BUILD}.")
    if not callable(found):
        raise RequestError(f"{model} is of type {type(found).__name__}: give a Family, or {BUILD}.")
    if base is None:
        raise RequestError(_baseless(model))
    batch = getattr(module, "batch", None)
    if callable(batch):
        try:
            batch = batch()
        except Exception as error:
            raise RequestError(f"batch() beside {model} raised {_said(error, module.__file__)}.") from error
    if batch is None:
        if data is None:
            raise RequestError(
                f"there is no example batch for {model}: define `batch` beside it, make it a Family, or pass --data."
            )
        batch = data.batch(0, batch_size, 0)
    loss = getattr(module, "loss", cross_entropy)
    build = _guarded(lambda scale: found(scale.width, scale.depth, **options), model, module.__file__, folder)
    return Family(build, batch, loss, base, model.rpartition(":")[2])


def _guarded(
    build: Callable[[Scale], Any], model: str, file: str | None = None, folder: Path | None = None
) -> Callable[[Scale], torch.nn.Module]:
    """Return ``build`` with its failures in one sentence, and with the file's folder at hand for imports inside it."""

    def guarded(scale: Scale) -> torch.nn.Module:
        try:
            with _helpers_of(folder) if folder else contextlib.nullcontext():
                built = build(scale)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(
                f"{model} could not be built at width {scale.width}, depth {scale.depth}: it raised {_said(error, file)}."
            ) from error
        if not isinstance(built, torch.nn.Module):
            raise RequestError(
                f"{model} returned {type(built).__name__} for width {scale.width}: return a torch.nn.Module."
            )
        return built

    return guarded


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own; unchanged, it is imported once per process."""
    file = path.expanduser().resolve()
    if not file.is_file():
        raise RequestError(f"there is no file {path} (looked for {file}): give {FORMS}.")
    if file.suffix != ".py":
        raise RequestError(f"{path} is not a Python file: give {FORMS}.")
    stamp = file.stat().st_mtime_ns, file.stat().st_size
    if file in _loaded and _loaded[file][0] == stamp:
        return _loaded[file][1]
    name = f"_mutransfer_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being executed
    try:
        with _helpers_of(file.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RequestError(f"{path} could not be imported: it raised {_said(error, str(file))}.") from error
    _loaded[file] = stamp, module
    return module


def _import_module(name: str) -> ModuleType:
    """Import an installed module, or one below the current folder."""
    try:
        with _on_path(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise RequestError(f"there is no module {error.name!r}: give {FORMS}.") from None
        raise RequestError(f"{name} could not be imported: it raised {_said(error)}.") from error
    except (Exception, SystemExit) as error:
        raise RequestError(f"{name} could not be imported: it raised {_said(error)}.") from error


def _named(module: ModuleType, where: str, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    own = {
        key
        for key, value in vars(module).items()
        if isinstance(value, Family) or (callable(value) and getattr(value, "__module__", "") == module.__name__)
    }
    hint = nearest(name, own) if own else f"define a Family or {BUILD} there."
    raise RequestError(f"{where} has no {name!r}: {hint}")


def _not_a_reference(model: str) -> str:
    if model.rstrip(":").endswith(".py") or "/" in model or "." in model:
        return f"the model {model!r} lacks the name of what to use: write {model.rstrip(':')}:name."
    hint = nearest(model, BUILTIN)
    return f"unknown model {model!r}: {hint if hint.startswith('did') else f'give {FORMS}.'}"


def _baseless(model: str) -> str:
    return f"{model} has no base width, and without one µP has nothing to scale from: pass --base-width."


def _said(error: BaseException, file: str | None = None) -> str:
    """Return "Type: message (line n of file)": the last line in ``file`` or, if there is none, outside this module."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    line = next((frame for frame in reversed(frames) if frame.filename == file), outside[-1] if outside else None)
    text, place = str(error), f"line {line.lineno} of {line.filename}" if line else ""
    if isinstance(error, SyntaxError) and error.filename and not (line and line.filename == file):
        text, place = error.msg, f"line {error.lineno} of {error.filename}"
    text = " ".join(text.split()).rstrip(".") or "no message"
    return f"{type(error).__name__}: {text}" + (f" ({place})" if place else "")


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    importlib.invalidate_caches()
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


@contextlib.contextmanager
def _helpers_of(folder: Path) -> Iterator[None]:
    """Let modules in ``folder`` be imported, also where another model file's folder has some of the same names."""
    for name in [name for name, home in _beside.items() if home != folder]:
        sys.modules.pop(name, None)
        del _beside[name]
    before = set(sys.modules)
    try:
        with _on_path(folder):
            yield
    finally:
        for name in set(sys.modules) - before:
            top = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
            # Directly in the folder, as a file or a package: not in an environment somewhere below it.
            if top and folder == (Path(top).parent.parent if Path(top).stem == "__init__" else Path(top).parent):
                _beside[name] = folder
