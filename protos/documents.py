"""Documents: frozen dataclasses that travel as canonical JSON, and settings files in TOML, both checked the same way.

Canonical JSON (sorted keys, no spaces) gives equal documents equal bytes, so a document can be hashed and signed.
"""

import json
import reprlib
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _dataclass
from pydantic_core import CoreSchema, core_schema, to_jsonable_python
from pydantic_core import from_json as _read_json

from offsite.protos.errors import InputError
from offsite.protos.ranges import check_plain

T = TypeVar("T")

TOML_BYTES = 1 << 20
_MEANT = {
    "Input should be a valid array": "expected a list",
    "Input should be an object": "expected a table",
    "Input should be a valid tuple": "expected a list",
    "Input should be a valid dictionary": "expected a table",
}
_TEXT, _STATED, _PLAIN = "<text>", "<stated>", "<plain>"  # pydantic's places of what `Written` and `Stated` read
_adapter: Any = cache(TypeAdapter)
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
_quoting = reprlib.Repr()
_quoting.maxstring = _quoting.maxother = 120
_quoting.maxlevel, _quoting.maxlong = 3, 40


@dataclass_transform(kw_only_default=True, frozen_default=True)
def document(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass whose fields are checked and whose unknown keys are refused.

    Its fields have bounds, as `ranges` has them; a document that is read is also held to its types strictly.
    """
    untyped: Any = _dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    result: type[T] = untyped
    return result


class Written:
    """Marks a field that can also be written as a text, which a function reads; it may raise ValueError."""

    def __init__(self, read: Callable[[str], Any], *, most: int) -> None:
        """Take the function, and how many characters it reads at most."""
        self._read, self._most = read, most

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read a text by the function, and all else as the field's type; a text adds no place to an error's."""
        text = core_schema.no_info_after_validator_function(
            self._read, core_schema.str_schema(strict=True, max_length=self._most)
        )
        kinds = {_TEXT: text, _PLAIN: handler(source)}
        return core_schema.tagged_union_schema(kinds, lambda value: _TEXT if isinstance(value, str) else _PLAIN)


class Stated:
    """Marks a choice, or a chain, that can also be stated by objects which have a `choice`, such as the SDK's."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Take an object's choice for it, and one object for a chain of it alone."""
        whole, chain = handler(source), get_origin(source) is tuple

        def choice(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return tuple(getattr(one, "choice", one) for one in value)
            return (value.choice,) if chain else value.choice

        def kind(value: Any) -> str:
            parts = value if isinstance(value, list | tuple) else (value,)
            return _STATED if any(hasattr(one, "choice") for one in parts) else _PLAIN

        stated = core_schema.no_info_before_validator_function(choice, whole)
        return core_schema.tagged_union_schema({_STATED: stated, _PLAIN: whole}, kind)


def parse(cls: type[T], value: Any, *, where: str) -> T:
    """Check a plain value against a document class; raises InputError that names the field and what was expected."""
    try:
        value = to_jsonable_python(value)
        check_plain(value)
        result: T = _adapter(cls).validate_json(canonical(value), strict=True)
        return result
    except ValidationError as error:
        raise InputError(f"{where}: {_fault(cls, error, value)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {plain(str(error), most=200)}") from None


def from_json(cls: type[T], text: bytes | str, *, where: str) -> T:
    """Read a document from JSON; raises InputError."""
    try:
        value = _read_json(text.encode() if isinstance(text, str) else text, allow_inf_nan=False)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {plain(str(error), most=200)}") from None
    return parse(cls, value, where=where)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of at most a MiB as plain data; raises InputError."""
    try:
        with path.open("rb") as file:
            data = file.read(TOML_BYTES + 1)
        if len(data) > TOML_BYTES:
            raise InputError(f"{path}: not a settings file: it has more than {TOML_BYTES} bytes")
        value = tomllib.loads(data.decode("utf-8-sig"))
        check_plain(value)
        return value
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path}: lists or tables nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not TOML: {plain(str(error), most=200)}") from None


def from_toml(cls: type[T], path: Path) -> T:
    """Read a settings file; raises InputError that names the file and the field."""
    return parse(cls, read_toml(path), where=str(path))


def to_plain(value: Any) -> Any:
    """Return a document as dicts, lists, strings and numbers."""
    return _adapter(type(value)).dump_python(value, mode="json")


def to_json(value: Any) -> bytes:
    """Write a document as canonical JSON."""
    return canonical(to_plain(value))


def canonical(value: Any) -> bytes:
    """Write plain data as canonical JSON."""
    return _canonical.encode(value).encode()


def plain(text: str, *, most: int = 2000) -> str:
    """Make another party's text fit for a log and a terminal: one line, no control characters, not without end."""
    return "".join(character if character.isprintable() else " " for character in text[:most])


def quoted(value: Any) -> str:
    """Quote a value in a message, in at most some two hundred characters."""
    return plain(_quoting.repr(value), most=200)


def nearest(name: str, known: list[str]) -> str:
    """Say which of the known names was meant, or name them all."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"


def inner(kind: Any, part: Any) -> Any:
    """Return the type of what a type holds under a field's name, a key or an index; Any where it is not known."""
    if is_dataclass(kind):
        return get_type_hints(kind, include_extras=True).get(str(part), Any)
    held = [one for one in get_args(kind) if one not in (type(None), ...)]
    if hasattr(kind, "__metadata__") or type(None) in get_args(kind):  # Annotated, or optional
        return inner(held[0], part)
    return held[-1] if held else Any


def _fault(cls: Any, error: ValidationError, value: Any) -> str:
    """Name the first fault by its place: ``training.steps: Input should be ... (got 0)``."""
    first = error.errors(include_url=False, include_context=False)[0]
    parts = [part for part in first["loc"] if part not in (_TEXT, _STATED, _PLAIN)]
    *parents, last = parts or ("",)
    place = plain(".".join(map(str, parts)), most=100)
    place += ": " if place else ""
    if first["type"] == "unexpected_keyword_argument":
        for part in parents:
            cls = inner(cls, part)
        names = [field.name for field in fields(bare(cls))]
        return f"{place}there is no such field; {nearest(str(last), names)}"
    if first["type"] == "missing":
        return f"{place}is missing, and has no default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch" and (meant := _meant(cls, parts)):
        message = f"expected {meant}"
    suffix = f" (got {quoted(first['input'])})" if place else ""  # a fault of the whole names what is wrong itself
    return f"{place}{_MEANT.get(message, plain(message, most=300))}{suffix}"


def _meant(kind: Any, parts: Iterable[Any]) -> str:
    """Return what the type of a field says of itself; empty where it says nothing."""
    for part in parts:
        kind = inner(kind, part)
    said = (getattr(one, "description", None) for one in getattr(kind, "__metadata__", ()))
    return next(filter(None, said), "")


def bare(kind: Any) -> Any:
    """Return the class behind an annotated or optional one."""
    while not is_dataclass(kind) and get_args(kind):
        kind = next(one for one in get_args(kind) if one is not type(None))
    return kind
