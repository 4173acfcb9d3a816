"""Plug-ins by name: a family is a literal dict of frozen dataclasses whose fields are their settings."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def make(family: str, kinds: Mapping[str, type[T]], name: str, settings: Mapping[str, Any]) -> T:
    """Make the plug-in `name` of a family; raises ValueError that names what is unknown or out of range."""
    if name not in kinds:
        raise ValueError(f"there is no {family} {name!r}; known are {', '.join(sorted(kinds))}")
    kind: Any = kinds[name]
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{family} {name!r} has no setting {unknown[0]!r}; its settings are {', '.join(known)}")
    try:
        made: T = TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{family} {name!r}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    return made
