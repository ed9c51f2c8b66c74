"""Import a user's model file or module together with its helper modules, and describe its failures in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mutransfer.errors import BuildError, RequestError, assertion
from mutransfer.printing import shown_once
from mutransfer.recipe import Scale

__all__ = ["FORMS", "guarded", "helpers_of", "import_file", "import_module", "modules_in", "describe_exception"]

FORMS = "a built-in (mlp, resnet, transformer), path/to/file.py:name, package.module:name or hf:config.json"

_loaded: dict[Path, tuple[tuple[int, int], ModuleType]] = {}  # file → ((mtime in ns, size) when imported, module)
_folders: list[str | None] = []  # folders of the active `modules_in` contexts
_sources: dict[str, Path] = {}  # helper module → folder it was imported from


def guarded(
    build: Callable[[Scale], Any], model: str, file: str | None = None, folder: Path | None = None
) -> Callable[[Scale], torch.nn.Module]:
    """Return ``build`` wrapped so that its failures become one-sentence `BuildError`s.

    Args:
        build: builds the model at a scale.
        model: how the user referred to the model; used in messages.
        file: the model's file, whose last line in the traceback is reported.
        folder: folder of the file, from which ``build`` can import helper modules.
    """

    def guarded_build(scale: Scale) -> torch.nn.Module:
        try:
            with shown_once(model, scale), helpers_of(folder) if folder else contextlib.nullcontext():
                built = build(scale)
        except RequestError:
            raise
        except (Exception, SystemExit) as error:
            raise BuildError(
                f"{model} could not be built at width {scale.width}, depth {scale.depth}: it raised "
                f"{describe_exception(error, file)}."
            ) from error
        if not isinstance(built, torch.nn.Module):
            raise BuildError(
                f"{model} returned {type(built).__name__} for width {scale.width}: return a torch.nn.Module."
            )
        return built

    return guarded_build


def import_file(path: Path, forms: str = FORMS) -> ModuleType:
    """Import a Python file under a unique module name; an unchanged file is imported once per process.

    Args:
        path: the file.
        forms: the accepted forms of the argument, for error messages.

    Raises:
        RequestError: if there is no such file, it is not a Python file, or importing it raised.
    """
    file = path.expanduser().resolve()
    if not file.is_file():
        raise RequestError(f"there is no file {path} (looked for {file}): give {forms}.")
    if file.suffix != ".py":
        raise RequestError(f"{path} is not a Python file: give {forms}.")
    stamp = file.stat().st_mtime_ns, file.stat().st_size
    if file in _loaded and _loaded[file][0] == stamp:
        return _loaded[file][1]
    name = f"_mutransfer_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while it is being executed
    try:
        with helpers_of(file.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, ImportError) and "relative import" in str(error):
            raise RequestError(_relative(path, file, error)) from error
        raise RequestError(
            f"{path} could not be imported: it raised {describe_exception(error, str(file))}."
        ) from error
    _loaded[file] = stamp, module
    return module


def _relative(path: Path, file: Path, error: ImportError) -> str:
    """Return the message for a file with relative imports: name it as a module, from the folder that contains its package."""
    folders = [file.parent]
    while (folders[-1] / "__init__.py").is_file() and (folders[-1].parent / "__init__.py").is_file():
        folders.append(folders[-1].parent)
    module = ".".join(
        [*(folder.name for folder in reversed(folders)), *([] if file.stem == "__init__" else [file.stem])]
    )
    return (
        f"{path} uses relative imports (from . import), which do not work in a file given by its path: it raised "
        f"{describe_exception(error, str(file))}. Write {module}:name instead, and run the command in {folders[-1].parent}."
    )


@contextlib.contextmanager
def modules_in(folder: str | None) -> Iterator[None]:
    """Let `import_module` also search in ``folder``, before the current folder."""
    _folders.append(folder)
    try:
        yield
    finally:
        _folders.pop()


def import_module(name: str, forms: str = FORMS) -> ModuleType:
    """Import an installed module, or a module in the current folder or in the folder of `modules_in`.

    Args:
        name: dotted name of the module.
        forms: the accepted forms of the argument, for error messages.

    Raises:
        RequestError: if there is no such module, or importing it raised.
    """
    try:
        with contextlib.ExitStack() as stack:
            for folder in dict.fromkeys([Path.cwd(), *(Path(each) for each in _folders if each is not None)]):
                stack.enter_context(_on_path(folder))
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise RequestError(f"there is no module {error.name!r}: give {forms}.") from None
        raise RequestError(f"{name} could not be imported: it raised {describe_exception(error)}.") from error
    except (Exception, SystemExit) as error:
        raise RequestError(f"{name} could not be imported: it raised {describe_exception(error)}.") from error


def describe_exception(error: BaseException, file: str | None = None) -> str:
    """Return a description of an exception as "Type: message (line n of file)".

    The line is the last one of the traceback in ``file``. If there is none, it is the line of a SyntaxError, or else the last
    one of the traceback outside this module. An ``assert`` without a message is described by its source line.
    """
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    line = next((frame for frame in reversed(frames) if frame.filename == file), outside[-1] if outside else None)
    text, place = str(error), f"line {line.lineno} of {line.filename}" if line else ""
    if isinstance(error, SyntaxError) and error.filename and not (line and line.filename == file):
        text, place = error.msg, f"line {error.lineno} of {error.filename}"
    if isinstance(error, AssertionError) and not text:
        text, place = assertion(error, place=False), f"line {frames[-1].lineno} of {frames[-1].filename}"
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
def helpers_of(folder: Path) -> Iterator[None]:
    """Make the modules in ``folder`` importable, even if another model file's folder has modules of the same names.

    Helper modules that were imported from other folders are removed from ``sys.modules`` first.
    """
    for name in [name for name, home in _sources.items() if home != folder]:
        sys.modules.pop(name, None)
        del _sources[name]
    before = set(sys.modules)
    try:
        with _on_path(folder):
            yield
    finally:
        for name in set(sys.modules) - before:
            top = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
            # Only files and packages directly in the folder count, not those of an environment somewhere below it.
            if top and folder == (Path(top).parent.parent if Path(top).stem == "__init__" else Path(top).parent):
                _sources[name] = folder
