"""Settings as one gives them on a command line: NAME=VALUE, merged into a document and its defaults.

A name goes into tables and lists by dots (`method.settings.rank=4`, `builders.0.settings.keep=20`), and a value is read
as what the field holds: as it stands for a text, else as JSON. What is not given keeps its default, so a setting of
the default method leaves the method what it is.
"""

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import from_json

from offsite.protos.documents import bare, inner, nearest, plain, quoted, to_plain
from offsite.protos.errors import InputError

EXAMPLE = "expected NAME=VALUE, such as training.steps=20"


def assign(settings: Iterable[str], value: dict[str, Any], document: type[Any]) -> dict[str, Any]:
    """Apply NAME=VALUE settings to the plain value of a document; raises InputError that says what was meant."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        where = f"--set {quoted(setting)[1:-1]}"
        if not equals or not name:
            raise _fault(f"{where}: {EXAMPLE}")
        if any("\ud800" <= character <= "\udfff" for character in setting):
            raise _fault(f"{where}: is not written in UTF-8")
        *parents, last = name.strip().split(".")
        place, kind = value, document
        for at, part in enumerate(parents):
            place, kind = _enter(place, kind, part, parents[:at], where)
        _check(place, kind, last, parents, where)
        place[_key(place, last)] = _read(text, inner(_bare(kind), last))
    return value


def _enter(place: Any, kind: Any, part: str, before: list[str], where: str) -> tuple[Any, Any]:
    """Go into a field, an entry or an item, which is first filled with its default if it is not there."""
    _check(place, kind, part, before, where)
    key = _key(place, part)
    if isinstance(place, dict) and key not in place:
        place[key] = _default(_bare(kind), part)
    if not isinstance(place[key], dict | list):
        raise _fault(f"{where}: {'.'.join([*before, part])} holds one value, and nothing in it can be set")
    return place[key], inner(_bare(kind), part)


def _check(place: Any, kind: Any, part: str, before: list[str], where: str) -> None:
    """Raise InputError unless `part` can stand in what it is looked for in."""
    if isinstance(place, list):
        if not (part.isdecimal() and len(part) < 6 and int(part) < len(place)):
            whole = ".".join([*before, "0", part])
            raise _fault(
                f"{where}: {'.'.join(before)} is a list of {len(place)}, counted from 0; write for example {whole}"
            )
    elif is_dataclass(kind := bare(kind)) and part not in (names := [field.name for field in fields(kind)]):
        raise _fault(f"{where}: there is no {'.'.join([*before, part])}; {nearest(part, names)}")


def _fault(message: str) -> InputError:
    return InputError(plain(message, most=500))


def _key(place: Any, part: str) -> Any:
    return int(part) if isinstance(place, list) else part


def _default(kind: Any, part: str) -> Any:
    """Return the default of a document's field as plain data; an empty table where there is none."""
    for field in fields(kind) if is_dataclass(kind) else ():
        if field.name == part:
            default: Any = field.default
            if isinstance(default, FieldInfo):
                default = default.get_default(call_default_factory=True)
            elif default is MISSING and field.default_factory is not MISSING:
                factory: Any = field.default_factory
                default = factory()
            if default is not MISSING:
                return [to_plain(one) for one in default] if isinstance(default, tuple) else to_plain(default) or {}
    return {}


def _bare(kind: Any) -> Any:
    return bare(kind) if is_dataclass(bare(kind)) else kind


def _read(text: str, kind: Any) -> Any:
    """Read a value: a text as it stands (or as JSON writes it), all else as JSON, and what is no JSON as text."""
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError:
        return text
    return text if _holds(kind) == {str} and not isinstance(value, str) else value


def _holds(kind: Any) -> set[Any]:
    """Return the plain types behind an annotated or optional one."""
    if hasattr(kind, "__metadata__"):
        return _holds(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return {held for one in get_args(kind) if one is not NoneType for held in _holds(one)}
    return {kind}
