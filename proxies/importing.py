"""Importing what a person wrote: their file or module, its helpers beside it, and its failures in one sentence."""

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

from mutransfer.errors import RequestError, assertion
from mutransfer.printing import shown_once
from mutransfer.scale import Scale

__all__ = ["FORMS", "guarded", "helpers_of", "import_file", "import_module", "modules_in", "said"]

FORMS = "a built-in (mlp, resnet, transformer), path/to/file.py:name, package.module:name or hf:config.json"

_loaded: dict[Path, tuple[tuple[int, int], ModuleType]] = {}  # file → (its time and size when read, what it gave)
_folders: list[str | None] = []  # of `modules_in`
_sources: dict[str, Path] = {}  # helper module → the folder it was imported from


def guarded(
    build: Callable[[Scale], Any], model: str, file: str | None = None, folder: Path | None = None
) -> Callable[[Scale], torch.nn.Module]:
    """Return ``build`` with its failures in one sentence, and with the file's folder at hand for imports inside it."""

    def build_or_say(scale: Scale) -> torch.nn.Module:
        try:
            with shown_once(model, scale), helpers_of(folder) if folder else contextlib.nullcontext():
                built = build(scale)
        except RequestError:
            raise
        except (Exception, SystemExit) as error:
            raise RequestError(
                f"{model} could not be built at width {scale.width}, depth {scale.depth}: it raised {said(error, file)}."
            ) from error
        if not isinstance(built, torch.nn.Module):
            raise RequestError(
                f"{model} returned {type(built).__name__} for width {scale.width}: return a torch.nn.Module."
            )
        return built

    return build_or_say


def import_file(path: Path, forms: str = FORMS) -> ModuleType:
    """Import a file under a name of its own; unchanged, it is imported once per process. ``forms`` is what to give instead.

    Raises:
        RequestError: there is no such file, or it raised.
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
    sys.modules[name] = module  # dataclasses look their module up while it is being executed
    try:
        with helpers_of(file.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, ImportError) and "relative import" in str(error):
            raise RequestError(_relative(path, file, error)) from error
        raise RequestError(f"{path} could not be imported: it raised {said(error, str(file))}.") from error
    _loaded[file] = stamp, module
    return module


def _relative(path: Path, file: Path, error: ImportError) -> str:
    """Say how a file that imports from its package is named: as a module, from the folder that holds the package."""
    folders = [file.parent]
    while (folders[-1] / "__init__.py").is_file() and (folders[-1].parent / "__init__.py").is_file():
        folders.append(folders[-1].parent)
    module = ".".join(
        [*(folder.name for folder in reversed(folders)), *([] if file.stem == "__init__" else [file.stem])]
    )
    return (
        f"{path} imports from its own package (from . import), which a file by itself has none of: it raised "
        f"{said(error, str(file))}. Write {module}:name in its place, and run the command in {folders[-1].parent}."
    )


@contextlib.contextmanager
def modules_in(folder: str | None) -> Iterator[None]:
    """Let `import_module` look below ``folder`` as well, before the current one."""
    _folders.append(folder)
    try:
        yield
    finally:
        _folders.pop()


def import_module(name: str, forms: str = FORMS) -> ModuleType:
    """Import an installed module, or one below the current folder or that of `modules_in`.

    Raises:
        RequestError: there is no such module, or it raised.
    """
    try:
        with contextlib.ExitStack() as held:
            for folder in dict.fromkeys([Path.cwd(), *(Path(each) for each in _folders if each is not None)]):
                held.enter_context(_on_path(folder))
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise RequestError(f"there is no module {error.name!r}: give {forms}.") from None
        raise RequestError(f"{name} could not be imported: it raised {said(error)}.") from error
    except (Exception, SystemExit) as error:
        raise RequestError(f"{name} could not be imported: it raised {said(error)}.") from error


def said(error: BaseException, file: str | None = None) -> str:
    """Return "Type: message (line n of file)": the last line in ``file`` or, if there is none, outside this module."""
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
    """Let modules in ``folder`` be imported, also where another model file's folder has some of the same names."""
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
            # Directly in the folder, as a file or a package: not in an environment somewhere below it.
            if top and folder == (Path(top).parent.parent if Path(top).stem == "__init__" else Path(top).parent):
                _sources[name] = folder
