"""Plug-ins by name: a family is a literal dict of frozen dataclasses whose fields are their settings."""

import json
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def make(family: str, kinds: Mapping[str, type[T]], name: str, settings: Mapping[str, Any]) -> T:
    """Make the plug-in `name` of a family; raises ValueError that names what is unknown, of another type or no number.

    Settings are plain data, taken strictly: a bool is no number, and neither are infinity and NaN.
    """
    if name not in kinds:
        raise ValueError(f"there is no {family} {_quoted(name)}{_meant(name, kinds)}; known are {_listed(kinds)}")
    kind: Any = kinds[name]
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(
            f"{family} {name!r} has no setting {_quoted(unknown[0])}{_meant(unknown[0], known)}; "
            f"its settings are {', '.join(known) or 'none'}"
        )
    try:
        document = json.dumps(dict(settings), allow_nan=False)
    except ValueError:
        raise ValueError(f"{family} {name!r}: infinity and NaN are no settings; give finite numbers") from None
    try:
        made: T = TypeAdapter(kind).validate_json(document, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        message = first["msg"].removeprefix("Value error, ").replace("valid array", "list")[:300]
        raise ValueError(f"{family} {name!r}: {place + ': ' if place else ''}{message}") from None
    return made


def _meant(name: str, known: Any) -> str:
    close = get_close_matches(str(name)[:100], list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _quoted(name: str) -> str:
    return repr(str(name)[:100])


def _listed(known: Any) -> str:
    return ", ".join(sorted(known))
