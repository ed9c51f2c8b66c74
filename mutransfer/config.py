"""Base class and parser for user-written settings: validated once, frozen afterwards, with one-sentence errors."""

from __future__ import annotations

from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import SettingsError, nearest

__all__ = ["Settings", "parse"]

T = TypeVar("T", bound=BaseModel)


class Settings(BaseModel):
    """Base class of everything read from YAML or JSON: unknown keys, NaN and later changes are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _refusal(type(self), error, type(self).__name__) from None

    # Marks this __init__ as pydantic's: nested settings are validated with their parent, and errors keep the dotted key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def read(cls, data: Any, where: str) -> Self:
        """Validate ``data``; see `parse`."""
        return parse(cls, data, where)


def parse(model: type[T], data: Any, where: str) -> T:
    """Validate ``data`` as ``model``.

    Args:
        model: the pydantic model to build.
        data: the parsed YAML or JSON.
        where: the file or flag the data came from, for the error message.

    Raises:
        SettingsError: the data is invalid. The message is one sentence with the dotted key, the value, what was expected,
            and for an unknown key the nearest known one.
    """
    if not isinstance(data, dict):
        raise SettingsError(
            f"{where} should hold keys and values but holds {type(data).__name__}: see `mutransfer init`."
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _refusal(model, error, where) from None


def _refusal(model: type[BaseModel], error: ValidationError, where: str) -> SettingsError:
    # Report unknown keys first: an unknown "lrr" explains a missing "lr".
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return SettingsError(f"{where}: {_sentence(model, problems[0])}")


def _sentence(model: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in location if not part.startswith(("function-", "tagged-union", "union")))
    match problem["type"]:
        case "extra_forbidden":
            known = _fields(model, location[:-1])
            return f"unknown key {key!r}: {nearest(location[-1], known)}"
        case "missing":
            return f"the key {key!r} is missing: add it."
        case "value_error":
            text = str(problem["ctx"]["error"])
            return f"{key}: {text}" if key else text
        case _:
            expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            return f"{key} is {problem['input']!r}: it should be {expected}."


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names at ``path``; dictionaries and unions on the way contribute every model they can hold."""
    models = [model]
    for part in path:
        found: list[type[BaseModel]] = []
        for current in models:
            field = current.model_fields.get(part)
            if field is not None:
                found += _models_in(field.annotation)
        models = found or models
    return sorted({name for current in models for name in current.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
