"""Plug-ins by name: ours, and those of other packages.

A plug-in is a frozen dataclass whose fields are its settings. A family of them is a mapping from names to such classes.
It loads a class when it is first asked for, so that names can be checked where no tensor library is loaded.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class Plugins(Mapping[str, type[T]]):
    """A family of plug-ins by name.

    Another package adds one of its own by an entry point in the group `offsite.<kind>s`. A name that two packages claim
    stands for neither: whoever asks for it is told so.
    """

    def __init__(
        self,
        kind: str,
        ours: Mapping[str, str],
        *,
        group: str,
        states: Sequence[str] = (),
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Take what one plug-in is called, where ours are ("module:class" by name), and the group of others'.

        `states` are what a class must say of itself beside its name; `refused` are names that somebody may expect and
        that stand for nothing, with the reason of each.
        """
        self.kind, self.group, self._ours, self._states, self._refused = kind, group, ours, states, refused or {}
        self._loaded: dict[str, type[T]] = {}

    @property
    def ours(self) -> tuple[str, ...]:
        """The names of those in this package."""
        return (*self._ours,)

    @property
    def refused(self) -> dict[str, str]:
        """The names that stand for nothing, with the reason of each; another package may give one of them a meaning."""
        return {name: reason for name, reason in self._refused.items() if name not in self}

    @cached_property
    def _points(self) -> dict[str, list[EntryPoint]]:
        points = {name: [EntryPoint(name, value, self.group)] for name, value in self._ours.items()}
        for point in sorted(entry_points(group=self.group), key=lambda point: (point.name, _package(point))):
            points.setdefault(point.name, []).append(point)
        return points

    def __getitem__(self, name: str) -> type[T]:
        """Load a plug-in's class; raises KeyError on an unknown name, ValueError if another package's is unfit."""
        if name not in self._loaded:
            first, *more = self._points[name]
            if more:
                raise ValueError(
                    f"{self.kind} {name!r} is claimed by {' and by '.join(map(_package, (first, *more)))}; "
                    "uninstall what you do not trust, or have it renamed"
                )
            self._loaded[name] = first.load() if name in self._ours else self._foreign(first)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether there is such a plug-in, without loading it."""
        return name in self._points

    def __iter__(self) -> Iterator[str]:
        """Yield the names, ours first, without loading anything."""
        return iter(self._points)

    def __len__(self) -> int:
        """Count the names."""
        return len(self._points)

    def preload(self) -> None:
        """Load all of ours; not others', of which nobody knows what they do when they are imported."""
        for name in self._ours:
            if len(self._points[name]) == 1:
                self[name]

    def sound(self) -> dict[str, type[T]]:
        """Load all; `unsound` says why some are missing."""
        return {name: self[name] for name in self if not self._fault(name)}

    def unsound(self) -> list[str]:
        """Return why plug-ins of other packages cannot be loaded, or which names two packages claim."""
        return [fault for name in self if (fault := self._fault(name))]

    def _fault(self, name: str) -> str:
        try:
            self[name]
        except ValueError as error:
            return str(error)
        return ""

    def make(self, name: str, settings: Mapping[str, Any]) -> T:
        """Make a plug-in; raises ValueError that says what is unknown, of another type, no number, or unfit."""
        if reason := self.refused.get(name):
            raise ValueError(f"there is no {self.kind} {name!r}: {reason}")
        return make(self.kind, self, name, settings)

    def _foreign(self, point: EntryPoint) -> Any:
        try:
            loaded: Any = point.load()
        except Exception as error:  # another package's code may fail in any way
            raise ValueError(
                f"{self.kind} {point.name!r} of {_package(point)} cannot be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        frozen = is_dataclass(loaded) and isinstance(loaded, type) and loaded.__dataclass_params__.frozen  # type: ignore[attr-defined]
        if not frozen or getattr(loaded, "name", None) != point.name:
            raise ValueError(
                f"{self.kind} {point.name!r} of {_package(point)} is unfit: {point.value} must be a frozen dataclass "
                f"whose `name` is {point.name!r}"
            )
        if missing := [word for word in self._states if not hasattr(loaded, word)]:
            raise ValueError(
                f"{self.kind} {point.name!r} of {_package(point)} is unfit: {point.value} does not state its "
                f"{', '.join(missing)}"
            )
        return loaded


def make(kind: str, known: Mapping[str, type[T]], name: str, settings: Mapping[str, Any]) -> T:
    """Make a dataclass by name; raises ValueError that names what is unknown, of another type or no number.

    Settings are plain data, taken strictly: a bool is no number, and neither are infinity and NaN.
    """
    if name not in known:
        raise ValueError(f"there is no {kind} {_quoted(name)}{_meant(name, known)}; known are {_listed(known)}")
    cls: Any = known[name]
    settable = [field.name for field in fields(cls)]
    if unknown := sorted(set(settings) - set(settable)):
        raise ValueError(
            f"{kind} {name!r} has no setting {_quoted(unknown[0])}{_meant(unknown[0], settable)}; "
            f"its settings are {', '.join(settable) or 'none'}"
        )
    try:
        document = json.dumps(dict(settings), allow_nan=False)
    except ValueError:
        raise ValueError(f"{kind} {name!r}: infinity and NaN are no settings; give finite numbers") from None
    try:
        plugin: T = TypeAdapter(cls).validate_json(document, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        message = first["msg"].removeprefix("Value error, ").replace("valid array", "list")[:300]
        raise ValueError(f"{kind} {name!r}: {place + ': ' if place else ''}{message}") from None
    return plugin


def _package(point: EntryPoint) -> str:
    return f"the package {point.dist.name} {point.dist.version}" if point.dist else "Offsite itself"


def _meant(name: str, known: Any) -> str:
    close = get_close_matches(str(name)[:100], list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _quoted(name: str) -> str:
    return repr(str(name)[:100])


def _listed(known: Any) -> str:
    return ", ".join(sorted(known))
