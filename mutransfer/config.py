"""Base class and parser for user-written settings: validated once, frozen afterwards, with one-sentence errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, Strict, ValidationError, with_config

from .errors import SettingsError, describe, nearest

__all__ = ["Number", "Positive", "Settings", "Whole", "exact", "parse", "read_by", "sentence_of"]

T = TypeVar("T", bound=BaseModel)
# Types and configuration of dataclasses that are read from files which a program wrote.
Number = Annotated[float, Strict()]
Whole = Annotated[int, Strict()]
Positive = Annotated[Whole, Field(ge=1)]
exact = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))


def read_by(make: Callable[[Any], Any]) -> PlainValidator:
    """Return a validator that makes a value from a JSON object and refuses one that ``make`` cannot read."""

    def read(data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{data!r:.200} holds no keys and values.")
        try:
            return make(data)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{describe(error)}.") from None

    return PlainValidator(read)


class Settings(BaseModel):
    """Base class of everything read from YAML or JSON: unknown keys, NaN and later changes are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    shorthands: ClassVar[tuple[str, ...]] = ()  # keys that a validator accepts and moves elsewhere

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _refusal(type(self), error, type(self).__name__) from None

    # Marks this __init__ as pydantic's: nested settings are validated with their parent, and errors keep the dotted key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def read(cls, data: Any, where: str, again: str | None = None) -> Self:
        """Validate ``data``; see `parse`."""
        return parse(cls, data, where, again)


def parse(model: type[T], data: Any, where: str, again: str | None = None) -> T:
    """Validate ``data`` as ``model``.

    Args:
        model: the pydantic model to build.
        data: the parsed YAML or JSON.
        where: the file or flag the data came from, for the error message.
        again: how to write the file again if a program wrote it; by default the user corrects the value.

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
        raise _refusal(model, error, where, again) from None


def _refusal(model: type[BaseModel], error: ValidationError, where: str, again: str | None = None) -> SettingsError:
    if again is None:
        return SettingsError(f"{where}: {sentence_of(model, error, ': add it')}")
    return SettingsError(f"{where} is damaged ({sentence_of(model, error).rstrip('.')}): {again}.")


def sentence_of(model: type[BaseModel], error: ValidationError, add: str = "") -> str:
    """Return a sentence about the first problem of ``error``, with the dotted key; ``add`` is appended if a key is missing."""
    # Report unknown keys first: an unknown "lrr" explains a missing "lr".
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] not in unknown)
    return _sentence(model, problems[0], add)


def _sentence(model: type[BaseModel], problem: Any, add: str = "") -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in location if not part.startswith(("function-", "tagged-union", "union")))
    match problem["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            known = _fields(model, location[:-1])
            return f"unknown key {key!r}: {nearest(location[-1], known)}"
        case "missing":
            return f"the key {key!r} is missing{add}."
        case "value_error":
            text = str(problem["ctx"]["error"])
            return f"{key}: {text}" if key else text
        case _:
            _, should, expected = problem["msg"].partition(" should ")
            return f"{key} is {problem['input']!r:.200}: {f'it should {expected}' if should else problem['msg']}."


def _fields(model: type, path: list[str]) -> list[str]:
    """Return the field names at ``path``; dictionaries and unions on the way contribute every model they can hold."""
    models = [model]
    for part in path:
        found: list[type] = []
        for current in models:
            if issubclass(current, BaseModel) and part in current.model_fields:
                found += _models_in(current.model_fields[part].annotation)
        models = found or models
    return sorted({name for current in models for name in _names(current)})


def _models_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _names(model: Any) -> Iterable[str]:
    if not issubclass(model, BaseModel):
        return (field.name for field in fields(model))
    return [*model.model_fields, *getattr(model, "shorthands", ())]
