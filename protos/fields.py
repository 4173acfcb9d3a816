"""What the comments beside a document's fields say of them: one sentence each, for help, files and the reference."""

import re
from dataclasses import MISSING, fields
from inspect import getsource
from typing import Any

from pydantic.fields import FieldInfo

from offsite.protos.documents import to_plain

_FIELD = re.compile(r"^    (\w+): .*?(?:  # (.*))?$", re.MULTILINE)


def comments(document: type[Any]) -> dict[str, str]:
    """Return what each field of a document class holds, empty where nothing is said; of its bases' fields, too."""
    said: dict[str, str] = {}
    for cls in reversed(document.__mro__[:-1]):
        said |= {name: comment for name, comment in _FIELD.findall(getsource(cls)) if name in cls.__annotations__}
    return said


def defaults(document: type[Any]) -> dict[str, Any]:
    """Return the defaults of a document class as plain data, of those fields that have one."""
    values = {}
    for field in fields(document):
        default: Any = field.default
        if isinstance(default, FieldInfo):
            values[field.name] = to_plain(default.get_default(call_default_factory=True))
        elif default is not MISSING:
            values[field.name] = [to_plain(one) for one in default] if isinstance(default, tuple) else to_plain(default)
    return values
