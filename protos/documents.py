"""Documents: frozen dataclasses that travel as canonical JSON, and settings files in TOML, both checked the same way.

Canonical JSON (sorted keys, no spaces) gives equal documents equal bytes, so a document can be hashed and signed.
"""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _dataclass

from offsite.protos.errors import InputError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def document(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass whose fields are checked and whose unknown keys are refused."""
    made: Any = _dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    checked: type[T] = made
    return checked


def _sentence(where: str, error: ValidationError) -> str:
    """Name the first fault by its place: ``run spec: training.steps: Input should be ... (got 0)``."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    got = f" (got {first['input']!r})" if first["type"] != "missing" else ""
    return f"{where}: {place + ': ' if place else ''}{first['msg']}{got}"


def parse(cls: type[T], value: Any, *, where: str) -> T:
    """Check a plain value against a document class; raises InputError that names the field and what was expected."""
    try:
        return TypeAdapter(cls).validate_python(value)
    except ValidationError as error:
        raise InputError(_sentence(where, error)) from None


def from_json(cls: type[T], text: bytes | str, *, where: str) -> T:
    """Read a document from JSON; raises InputError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    return parse(cls, value, where=where)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as plain data; raises InputError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None


def from_toml(cls: type[T], path: Path) -> T:
    """Read a settings file; raises InputError that names the file and the field."""
    return parse(cls, read_toml(path), where=str(path))


def assign(settings: Iterable[str], value: dict[str, Any]) -> dict[str, Any]:
    """Apply NAME=VALUE settings, NAME with dots for tables; a value is JSON where it parses as JSON, else text."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected NAME=VALUE, such as training.steps=20")
        *tables, name = path.split(".")
        place = value
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {setting}: {table} is not a table")
        try:
            place[name] = json.loads(text)
        except ValueError:
            place[name] = text
    return value


def to_plain(value: Any) -> Any:
    """Return a document as dicts, lists, strings and numbers."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def to_json(value: Any) -> bytes:
    """Write a document as canonical JSON."""
    return canonical(to_plain(value))


def canonical(value: Any) -> bytes:
    """Write plain data as canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def plain(text: str, *, most: int = 2000) -> str:
    """Make another party's text fit for a log and a terminal: one line, no control characters, not without end."""
    return "".join(character if character.isprintable() else " " for character in text)[:most]
